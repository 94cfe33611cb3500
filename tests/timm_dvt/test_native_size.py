"""Position embeddings are resampled once, from the grid they were learned on to the image's, as the authors do."""

import copy

import pytest
import timm
import torch
from timm.data import resolve_model_data_config

import timm_dvt
from tests.helpers import reference
from tests.helpers.fabricated import publish, publish_backbone
from timm_dvt.layouts import meant_size
from timm_dvt.variants import ROWS

BACKBONES = [row.backbone for row in ROWS if "small" in row.backbone or "patch16" in row.backbone]
THIN = {"depth": 1, "embed_dim": 64, "num_heads": 1}
SIZES = [(3, 4), (14, 14), (32, 32), (20, 9)]  # in patches; a learned grid, the denoiser's, and others


def published(hub, backbone: str, resolution: int) -> tuple[dict, dict]:
    """The states of a backbone and of its denoiser, both on the stand-in hub."""
    state = publish_backbone(hub, backbone, **THIN)
    patch = 14 if "patch14" in backbone else 16
    denoiser = reference.published_state(state["pos_embed"].shape[-1], resolution // patch)
    publish(hub, f"voc_denoised/{backbone}.pth", {"denoiser": denoiser})
    return state, denoiser


def theirs(backbone: str) -> torch.nn.Module:
    """The backbone as the authors' wrapper makes it: at its own size, any size in forward, no head."""
    return timm.create_model(backbone, num_classes=0, dynamic_img_size=True, **THIN).eval()


def images_of(model, grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(1, 3, *(patches * model.patch_embed.patch_size[0] for patches in grid))


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_the_features_are_the_authors_at_every_size(backbone, hub, tmp_path):
    resolution = next(row.resolution for row in ROWS if row.backbone == backbone)
    state, denoiser = published(hub, backbone, resolution)
    model = timm.create_model(f"{backbone}_dvt", pretrained=True, cache_dir=tmp_path, **THIN).eval()
    plain = theirs(backbone)
    plain.load_state_dict({key: value for key, value in state.items() if not key.startswith("head.")})
    assert torch.equal(model.pos_embed, state["pos_embed"])
    for grid in SIZES:
        images = images_of(model, grid)
        (raw,) = plain.forward_intermediates(images, [0], norm=True, output_fmt="NLC", intermediates_only=True)
        with model.denoising(False):
            (off,) = model.forward_intermediates(images, [0], norm=True, output_fmt="NLC", intermediates_only=True)
        assert torch.equal(off, raw), grid
        want = reference.denoise(denoiser, raw, grid, raw.shape[-1] // 64)
        assert torch.allclose(model.forward_features(images)[:, model.num_prefix_tokens :], want, atol=1e-3), grid
    assert tuple(resolve_model_data_config(model)["input_size"]) == (3, resolution, resolution)


@pytest.mark.parametrize("backbone", ["vit_base_patch16_224.mae", "eva02_base_patch16_clip_224.merged2b"])
@torch.no_grad()
def test_a_distilled_model_and_its_folder_are_the_authors_at_every_size(backbone, tmp_path):
    plain = theirs(backbone)
    torch.save({"model": {f"model.{key}": value for key, value in plain.state_dict().items()}}, tmp_path / "file.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "file.pth")}}
    model = timm.create_model(f"{backbone}_dvt_distilled", pretrained=True, **THIN, **overlay).eval()
    timm_dvt.weights.saving.save_plain(model, tmp_path / "folder", backbone)
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    for grid in SIZES:
        images = images_of(plain, grid)
        want = plain.forward_features(images)
        assert torch.equal(model.forward_features(images), want) and torch.equal(again.forward_features(images), want)
    for made in (model, again):
        assert tuple(resolve_model_data_config(made)["input_size"]) == (3, 512, 512)


@torch.no_grad()
def test_a_distilled_file_of_the_denoisers_resolution_is_not_resampled_on_loading(tmp_path):
    create = dict(num_classes=0, img_size=512, dynamic_img_size=True, **THIN)
    plain = timm.create_model("vit_base_patch16_224.mae", **create)
    torch.save({"model": {f"model.{key}": value for key, value in plain.state_dict().items()}}, tmp_path / "file.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "file.pth")}}
    model = timm.create_model("vit_base_patch16_224.mae_dvt_distilled", pretrained=True, **THIN, **overlay)
    images = images_of(plain, (20, 9))
    assert torch.equal(model.eval().forward_features(images), plain.eval().forward_features(images))


@torch.no_grad()
def test_a_saved_folder_is_the_model_that_was_saved_at_every_size(tmp_path):
    model = timm.create_model("vit_base_patch16_224.dino_dvt", **THIN).eval()
    again = timm.create_model(f"local-dir:{timm_dvt.save_pretrained(model, tmp_path)}", pretrained=True).eval()
    for grid in SIZES:
        images = images_of(model, grid)
        assert torch.equal(again.forward_features(images), model.forward_features(images))
    assert tuple(resolve_model_data_config(again)["input_size"]) == (3, 512, 512)
    assert again.patch_embed.img_size == model.patch_embed.img_size == (224, 224)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"img_size": 512}, {"img_size": 224}, {"img_size": (64, 96)}, {"dynamic_img_size": False, "img_size": 64}],
)
@torch.no_grad()
def test_it_is_plain_timm_bit_for_bit_with_the_same_arguments(arguments, hub, tmp_path):
    published(hub, "vit_base_patch16_224.dino", 512)
    create = dict(pretrained=True, cache_dir=tmp_path, **THIN, **{"dynamic_img_size": True, **arguments})
    model = timm.create_model("vit_base_patch16_224.dino_dvt", **create).eval()
    plain = timm.create_model("vit_base_patch16_224.dino", **create).eval()
    model.set_denoise(False)
    for grid in [(4, 6), (32, 32)] if create["dynamic_img_size"] else [(4, 4)]:
        images = images_of(model, grid)
        assert torch.equal(model.forward_features(images), plain.forward_features(images))
    size = arguments.get("img_size", 512)
    size = 512 if size == 224 else size  # the same model as by default
    want = (size, size) if isinstance(size, int) else size
    assert tuple(resolve_model_data_config(model)["input_size"]) == (3, *want)


@pytest.mark.parametrize("made", ["for one size", "fixed afterwards"])
@torch.no_grad()
def test_at_one_size_nothing_is_resampled_in_forward(made, hub, tmp_path, monkeypatch):
    published(hub, "vit_base_patch16_224.dino", 512)
    create = dict(pretrained=True, cache_dir=tmp_path, img_size=64, **THIN)
    any_size = timm.create_model("vit_base_patch16_224.dino_dvt", **create).eval()
    images = images_of(any_size, (4, 4))
    want = any_size.forward_features(images)
    assert any_size.denoiser.grid_size == (32, 32)
    if made == "for one size":
        model = timm.create_model("vit_base_patch16_224.dino_dvt", **create, dynamic_img_size=False).eval()
    else:
        model = any_size
        model.denoiser.fix_grid((4, 4))
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)
    assert torch.equal(model.forward_features(images), want)
    monkeypatch.undo()
    again = timm.create_model(f"local-dir:{timm_dvt.save_pretrained(model, tmp_path / 'saved')}", pretrained=True)
    assert torch.equal(again.eval().forward_features(images), want)
    timm_dvt.load_denoiser(model, hub.folder / "jjiaweiyang/DVT/voc_denoised/vit_base_patch16_224.dino.pth")
    assert torch.equal(model.forward_features(images), want)


@pytest.mark.parametrize("kind", ["published", "whole folder", "denoiser-only folder"])
@torch.no_grad()
def test_another_patch_size_is_adapted_as_timm_does(kind, hub, tmp_path):
    backbone, other = "vit_small_patch14_dinov2.lvd142m", dict(patch_size=16, img_size=96, **THIN)
    _, denoiser = published(hub, backbone, 518)
    plain = timm.create_model(backbone, pretrained=True, dynamic_img_size=True, cache_dir=tmp_path, **other).eval()
    name, more = f"{backbone}_dvt", {"cache_dir": tmp_path}
    if "folder" in kind:
        whole = timm.create_model(name, pretrained=True, **THIN, **more)
        name = f"local-dir:{timm_dvt.save_pretrained(whole, tmp_path / 'saved', 'only' in kind)}"
    model = timm.create_model(name, pretrained=True, **other, **more).eval()
    images = torch.randn(1, 3, 96, 96)
    raw = plain.forward_features(images)[:, 1:]
    want = reference.denoise(denoiser, raw, (6, 6), raw.shape[-1] // 64)
    assert torch.allclose(model.forward_features(images)[:, 1:], want, atol=1e-3)
    assert torch.equal(model.forward_features(images)[:, :1], plain.forward_features(images)[:, :1])


@torch.no_grad()
def test_a_size_that_patches_do_not_divide_leaves_the_denoiser_its_grid(hub, tmp_path):
    published(hub, "vit_small_patch14_dinov2.lvd142m", 518)
    create = dict(pretrained=True, cache_dir=tmp_path, img_size=100, **THIN)
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m_dvt", **create)
    assert model.denoiser.grid_size == (37, 37) and model.patch_embed.grid_size == (7, 7)


@torch.no_grad()
def test_another_patch_size_of_a_distilled_model_is_adapted_as_timm_does(tmp_path):
    backbone, other = "vit_base_patch16_224.mae", dict(patch_size=8, img_size=96, num_classes=0, **THIN)
    plain = theirs(backbone)
    torch.save({"model": {f"model.{key}": value for key, value in plain.state_dict().items()}}, tmp_path / "file.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "file.pth")}}
    model = timm.create_model(f"{backbone}_dvt_distilled", pretrained=True, **other, **overlay).eval()
    timm.models.save_for_hf(plain, tmp_path / "plain", safe_serialization=True, model_args=THIN)
    want = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True, **other).eval()
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(model.forward_features(images), want.forward_features(images))


def test_a_model_of_one_size_is_made_at_the_denoisers():
    model = timm.create_model("vit_base_patch16_224.dino_dvt", dynamic_img_size=False, **THIN)
    assert model.patch_embed.img_size == (512, 512)
    assert model.forward_features(torch.randn(1, 3, 512, 512)).shape == (1, 1025, 64)


def test_a_variant_whose_size_was_changed_is_meant_for_that():
    model = timm.create_model("vit_base_patch16_224.dino_dvt", **THIN)
    assert meant_size(model) == (512, 512) and meant_size(copy.deepcopy(model)) == (512, 512)
    model.set_input_size(128)
    assert meant_size(model) == meant_size(copy.deepcopy(model)) == (128, 128)


def test_a_size_that_is_not_of_whole_patches_is_cut_where_any_size_is_taken():
    """SigLIP's 384 pixels are 27 patches of 14 and 6 pixels, which timm cuts off of a model for that size alone."""
    for dynamic, size in ((False, 70), (True, 64)):
        model = timm.create_model("vit_tiny_patch16_224", img_size=70, depth=1, dynamic_img_size=dynamic)
        assert meant_size(model) == (size, size)
        assert timm_dvt.inspect(model, views=32).size == (size, size)
        timm_dvt.calibrate(model, views=32)
        assert model.forward_features(torch.zeros(1, 3, size, size)).shape == (1, 17, 192)
