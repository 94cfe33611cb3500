"""Every registered variant, one test class for all: a variant without tests is impossible."""

import re

import pytest
import timm
import torch

import timm_dvt
from tests.helpers import reference
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import FOCUS, ROWS, published_variants

TABLE = [*published_variants(), FOCUS]
NAMES = [variant.name for variant in TABLE]
DENOISED = [variant.name for variant in TABLE if not variant.distilled]
ARCHITECTURES = sorted({f"{variant.architecture}_dvt" for variant in TABLE})
# The real patch sizes, prefix tokens and positions; the width and depth are what a test can afford.
SMALL = {"depth": 2, "embed_dim": 128, "num_heads": 2}


def pair(name: str, dtype=torch.float32, **kwargs):
    """A variant, its plain timm model with the same arguments and weights, and images of a grid of its own."""
    model = timm.create_model(name, **SMALL, **kwargs).eval().to(dtype)
    size = model.patch_embed.img_size
    kwargs.pop("denoiser", None)
    arguments = {"img_size": size, "dynamic_img_size": True, **SMALL, **kwargs}
    # Random weights would be drawn in vain, but buffers that no state dict holds (EVA-02's) are computed on the way.
    device = None if any(True for _ in model.buffers()) else "meta"
    plain = timm.create_model(model.backbone_name, device=device, **arguments).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("denoiser.")}
    plain.load_state_dict(state, assign=device is not None)
    plain.to(dtype)
    patch = model.patch_embed.patch_size[0]
    return model, plain, torch.randn(2, 3, 5 * patch, 4 * patch, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float32) for n in DENOISED] + [(n, torch.bfloat16) for n in ARCHITECTURES]
)
@torch.no_grad()
def test_switching_off_gives_the_backbone_bit_for_bit(name, dtype):
    model, plain, images = pair(name, dtype)
    prefix = model.num_prefix_tokens
    tokens, maps, logits = (
        plain.forward_features(images),
        plain.forward_intermediates(images, indices=2, intermediates_only=True, norm=True),
        plain(images),
    )
    on = model.forward_features(images)
    assert torch.equal(on[:, :prefix], tokens[:, :prefix])
    assert not torch.allclose(on[:, prefix:], tokens[:, prefix:], atol=1e-2)
    model.set_denoise(False)
    assert torch.equal(model.forward_features(images), tokens)
    assert torch.equal(model(images), logits)
    off = model.forward_intermediates(images, indices=2, intermediates_only=True, norm=True)
    assert all(torch.equal(a, b) for a, b in zip(off, maps, strict=True))
    with model.denoising():
        assert torch.equal(model.forward_features(images), on)
        if model.global_pool == "token":
            assert torch.equal(model(images), logits)


@pytest.mark.parametrize("name", DENOISED)
@torch.no_grad()
def test_switched_on_equals_the_recomputed_denoiser_on_the_backbones_tokens(name):
    # what FOCUS has beyond the paper's
    papers = {"keep_length": False, "pos_embed_out": False, "blank_gate": False, "flat_gate": False}
    model, plain, images = pair(name, torch.float64, denoiser=papers)
    grid, prefix = (5, 4), plain.num_prefix_tokens
    want = reference.denoise(
        reference.published_keys(model), plain.forward_features(images)[:, prefix:], grid, plain.embed_dim // 64
    )
    assert (model.forward_features(images)[:, prefix:] - want).abs().max() < 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_denoisers_resolution_and_any_input_size(name):
    model = timm.create_model(name, device="meta")
    variant = VARIANTS[name]
    config = timm.data.resolve_model_data_config(model)
    base = timm.get_pretrained_cfg(variant.backbone)
    assert config["input_size"] == (3, variant.resolution, variant.resolution)
    assert config["mean"] == base.mean and config["std"] == base.std
    # Made at the backbone's own size: its position embedding is resampled once, to whatever size an image has.
    assert model.dynamic_img_size and model.patch_embed.img_size == tuple(base.input_size[1:])
    assert hasattr(model, "set_denoise") != variant.distilled
    if not variant.distilled:
        side = variant.resolution // model.patch_embed.patch_size[0]
        assert model.denoiser.pos_embed.shape == (1, side * side, model.embed_dim)
        assert len(model.blocks) == len(timm.create_model(variant.backbone, device="meta").blocks)


@pytest.mark.parametrize("name", NAMES + ARCHITECTURES)
def test_names_are_known_to_timm(name):
    assert timm.is_model(name)
    cfg = timm.get_pretrained_cfg(name)
    row = next(row for row in ROWS if row.backbone.split(".")[0] == name.split(".")[0].removesuffix("_dvt"))
    assert cfg.input_size == (3, row.resolution, row.resolution)
    published = "giant" not in name
    assert timm.is_model_pretrained(name) == published
    assert bool(cfg.has_weights) == published
    if published:
        assert cfg.hf_hub_id == (None if name == FOCUS.name else "jjiaweiyang/DVT")


def test_the_table_is_the_published_one():
    folders = {}
    for variant in published_variants():
        if variant.hub_file:
            folders.setdefault(variant.hub_file.split("/")[0], []).append(variant.backbone)
    assert {folder: len(backbones) for folder, backbones in folders.items()} == {
        "voc_denoised": 12,
        "voc_distilled": 8,
        "imgnet_denoised": 1,
        "imgnet_distilled": 1,
    }
    assert folders["imgnet_denoised"] == folders["imgnet_distilled"] == ["vit_base_patch14_dinov2.lvd142m"]
    assert all("base" in backbone for backbone in folders["voc_distilled"])
    assert len(published_variants()) == 24


def test_licenses_are_those_timm_records():
    assert {row.backbone: row.license for row in ROWS} == {
        row.backbone: timm.get_pretrained_cfg(row.backbone).license for row in ROWS
    }


def test_listings_show_the_variants():
    def listed(*args, **kwargs) -> set:  # but for what other tests register at run time
        return {name for name in timm.list_models(*args, **kwargs) if not re.search("vit_tiny|test_vit", name)}

    weights = {name for name in NAMES if "giant" not in name}
    assert listed("*_dvt*") == set(ARCHITECTURES)
    assert listed("*_dvt*", include_tags=True) == set(NAMES)
    assert listed("*_dvt*", pretrained=True) == weights == set(timm.list_pretrained("*_dvt*")) & set(NAMES)
    assert listed(module="timm_dvt") == {*ARCHITECTURES, "denoised_vit"}


def test_a_wrong_tag_is_timms_own_error():
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("vit_base_patch14_dinov2.lvd_dvt")


def test_denoising_restores_the_state_even_on_an_exception():
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m_dvt", depth=1, device="meta")
    for state in (True, False):
        model.set_denoise(state)
        with pytest.raises(KeyError):
            with model.denoising(not state):
                assert model.denoise is not state
                raise KeyError
        assert model.denoise is state


def test_a_persons_own_variant():
    name = timm_dvt.register("vit_tiny_patch16_224", "mine", resolution=160)
    assert name == "vit_tiny_patch16_224.augreg_in21k_ft_in1k_mine"
    model = timm.create_model(name, depth=1)
    assert model.denoiser.grid_size == (10, 10) and isinstance(model, timm_dvt.DenoisedVisionTransformer)
    assert name in timm.list_models("vit_tiny*_mine", include_tags=True) and not timm.is_model_pretrained(name)
    assert type(timm.create_model("vit_tiny_patch16_224", depth=1)) is timm.models.VisionTransformer
    with pytest.raises(ValueError, match="backbone is 'vit_no'"):
        timm_dvt.register("vit_no")
    with pytest.raises(ValueError, match="is a published variant; pass another suffix"):
        timm_dvt.register("vit_base_patch14_dinov2")
    with pytest.raises(TypeError, match="not to ResNet"):
        timm_dvt.register("resnet18.a1_in1k")
