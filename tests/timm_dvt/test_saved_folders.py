"""Folders and repos that save_pretrained writes: loaded again they give the model that was saved, bit for bit."""

import json
import os
import warnings

import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers import reference
from tests.helpers.fabricated import images_for, publish, publish_backbone
from timm_dvt.errors import UserError
from timm_dvt.weights import saving

NAME = "vit_small_patch14_dinov2.lvd142m_dvt"
BACKBONE = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture
def model():
    return timm.create_model(NAME, depth=2, img_size=56).eval()


@pytest.mark.parametrize(
    "backbone", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_512.v2_webli"]
)
@torch.no_grad()
def test_a_saved_model_loads_bit_equal(backbone, tmp_path):
    patch = 14 if "patch14" in backbone else 16
    arguments = dict(depth=2, img_size=4 * patch, dynamic_img_size=True, embed_dim=48)
    model = timm_dvt.add_denoiser(timm.create_model(backbone, **arguments).eval(), depth=2, grid_size=(4, 6))
    folder = timm_dvt.save_pretrained(model, tmp_path / "new" / "folder", model_args=arguments)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = images_for(model)
    assert type(again) is type(model) and torch.equal(again(images), model(images))
    assert torch.equal(again.forward_features(images), model.forward_features(images))
    for overwritten in (model, again):
        overwritten.denoiser.pos_embed.add_(1)
    timm_dvt.save_pretrained(again, folder)  # what it was made with came along
    third = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(third.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize(("grid", "out"), [((6, 6), (4, 9)), ((4, 9), (6, 6)), ((4, 9), (9, 4)), ((2, 8), (4, 4))])
@pytest.mark.parametrize("layers", [None, [0, -1]])
@torch.no_grad()
def test_grids_of_as_many_places_are_told_apart(grid, out, layers, tmp_path):
    arguments = dict(depth=2, img_size=64, dynamic_img_size=True)
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    timm_dvt.add_denoiser(model, grid_size=grid, pos_embed_out=out, layers=layers)
    for denoiser in model.denoisers().values():
        denoiser.pos_embed_out.normal_()
    folder = timm_dvt.save_pretrained(model, tmp_path, model_args=arguments)
    images = images_for(model)
    other = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments).eval(), grid_size=6)
    for name, parameter in model.named_parameters():
        if not name.startswith("denoiser."):
            other.get_parameter(name).copy_(parameter)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for loaded in (again, timm_dvt.load_denoiser(other, folder)):
        assert [(one.grid_size, one.out_grid_size) for one in loaded.denoisers().values()] == [
            (grid, out) for _ in model.denoisers()
        ]
        assert torch.equal(loaded.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("mixer_s32_224", {"img_size": 64}),
        ("tnt_s_legacy_patch16_224", {"depth": 1, "img_size": 64}),
        ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": 64}),
        ("vit_tiny_r_s16_p8_224", {"depth": 1, "img_size": 64}),
    ],
)
@torch.no_grad()
def test_a_saved_model_loads_whatever_embeds_its_patches(name, small, tmp_path):
    model = timm_dvt.add_denoiser(timm.create_model(name, **small).eval(), pos_embed_out=(3, 2))
    model.denoiser.pos_embed_out.normal_()
    timm_dvt.save_pretrained(model, tmp_path, model_args=small)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, *model.layout.img_size)
    torch.testing.assert_close(again.forward_features(images), model.forward_features(images))
    fixed = any(getattr(part, "strict_img_size", False) for part in model.children())
    assert again.denoiser.out_grid_size == (model.layout.grid if fixed else (3, 2))


@torch.no_grad()
def test_a_saved_variant_loads_bit_equal_with_its_class_count_and_size(tmp_path):
    name = "vit_base_patch16_224.mae_dvt"
    model = timm.create_model(name, depth=1, num_classes=5, img_size=(48, 64), global_pool="avg").eval()
    folder = timm_dvt.save_pretrained(model, tmp_path, model_args={"depth": 1})
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224_dvt"
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 3, 48, 64)
    assert again.backbone_name == "vit_base_patch16_224.mae" and torch.equal(again(images), model(images))
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).eval()
    assert other(images).shape == (1, 3) and torch.equal(other.forward_features(images), model.forward_features(images))
    assert tuple(timm.data.resolve_model_data_config(again)["input_size"]) == (3, 48, 64)


@torch.no_grad()
def test_a_saved_model_of_other_channels_loads_bit_equal(tmp_path):
    model = timm.create_model(NAME, depth=1, in_chans=5, img_size=28).eval()
    folder = timm_dvt.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 5, 28, 42)
    assert torch.equal(again.forward_features(images), model.forward_features(images))


@torch.no_grad()
def test_a_denoiser_only_folder_is_composed_with_its_backbone(hub, tmp_path):
    publish_backbone(hub, BACKBONE, depth=2)
    publish(hub, f"voc_denoised/{BACKBONE}.pth", {"denoiser": reference.published_state(384, 37)})
    model = timm.create_model(NAME, pretrained=True, depth=2, cache_dir=tmp_path / "cache").eval()
    folder = timm_dvt.save_pretrained(model, tmp_path / "part", denoiser_only=True, model_args={"depth": 2})
    state = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(key.startswith("denoiser.") for key in state)
    images = images_for(model)
    for source in (f"local-dir:{folder}", "hf-hub:someone/part"):
        if source.startswith("hf-hub"):
            (hub.folder / "someone").mkdir(exist_ok=True)
            os.symlink(folder, hub.folder / "someone" / "part")
        again = timm.create_model(source, pretrained=True, cache_dir=tmp_path / "other").eval()
        assert torch.equal(again.forward_features(images), model.forward_features(images))
        again.set_denoise(False)
        with model.denoising(False):
            assert torch.equal(again.forward_features(images), model.forward_features(images))


@torch.no_grad()
def test_a_whole_model_of_the_hub_needs_no_other_repo(hub, tmp_path):
    model = timm.create_model(NAME, depth=1).eval()
    timm_dvt.save_pretrained(model, hub.folder / "someone" / "whole", model_args={"depth": 1})
    hub.requests.clear()
    again = timm.create_model("hf-hub:someone/whole", pretrained=True, cache_dir=tmp_path).eval()
    images = images_for(model)
    assert torch.equal(again.forward_features(images), model.forward_features(images))
    assert not any("timm/" in request for request in hub.requests)


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(model, tmp_path, monkeypatch):
    folder = timm_dvt.save_pretrained(model, tmp_path)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device: .*/model\.safetensors"):
        timm_dvt.save_pretrained(model, tmp_path)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_only_denoised_models_with_a_name_are_saved(tmp_path):
    with pytest.raises(TypeError, match="has no denoiser to save"):
        timm_dvt.save_pretrained(timm.create_model("vit_tiny_patch16_224", depth=1), tmp_path)
    classy = timm.create_model("vit_tiny_patch16_224", depth=1, norm_layer=torch.nn.RMSNorm)
    with pytest.raises(UserError, match="was made with norm_layer=<class"):
        timm_dvt.save_pretrained(
            timm_dvt.add_denoiser(classy), tmp_path / "classy", model_args={"norm_layer": torch.nn.RMSNorm}
        )
    assert not (tmp_path / "classy").exists()
    nameless = timm_dvt.add_denoiser(timm.models.VisionTransformer(img_size=32, embed_dim=64, depth=1, num_heads=1))
    with pytest.raises(ValueError, match="no timm name"):
        timm_dvt.save_pretrained(nameless, tmp_path)


def test_weights_that_are_no_plain_tensors_are_refused_before_anything_is_written(model, tmp_path):
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match="save a model before it is quantized"):
        timm_dvt.save_pretrained(quantized, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("backbone", ["hf-hub:evil/repo", "local-dir:/tmp", "../x", "no_such_model", 3])
def test_a_config_cannot_name_a_backbone_outside_timms_registry(backbone, tmp_path):
    config = {"architecture": "denoised_vit", "pretrained_cfg": {}, "model_args": {"backbone": backbone}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not a model of timm's registry"):
        timm.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("written", ["now", "by an older version"])
@torch.no_grad()
def test_heads_are_the_files(written, tmp_path):
    small = {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 0}
    models = [
        timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **small), num_heads=heads).eval()
        for heads in (4, 1)
    ]
    models[1].load_state_dict(models[0].state_dict())
    folder = timm_dvt.save_pretrained(models[0], tmp_path, model_args=small)
    if written != "now":
        state = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    timm_dvt.load_denoiser(models[1], folder)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(models[0].forward_features(images), models[1].forward_features(images))


def test_what_will_not_load_is_warned_of(tmp_path):
    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.low = inner, torch.nn.Linear(8, 8)

    arguments = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dvt.save_pretrained(model, tmp_path / "good", model_args=arguments)
    model.head = torch.nn.Linear(32, 4)
    with pytest.warns(UserWarning, match="will not load as the model that was saved: head.bias, head.weight differ"):
        timm_dvt.save_pretrained(model, tmp_path / "head", model_args=arguments)
    model.head = torch.nn.Identity()
    model.blocks[0].attn.qkv = Adapter(model.blocks[0].attn.qkv)
    with pytest.warns(UserWarning, match="blocks.0.attn.qkv.bias, .* and 2 more differ"):
        timm_dvt.save_pretrained(model, tmp_path / "adapter", model_args=arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dvt.save_pretrained(model, tmp_path / "denoiser", denoiser_only=True, model_args=arguments)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("options", [{"num_heads": 6}, {"act_layer": "relu"}])
def test_what_shapes_do_not_tell_is_kept_or_warned_of(options, recorded, tmp_path):
    arguments = {"img_size": 32, "depth": 1}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments, **options)).eval()
    if not recorded or not hasattr(model, "_model_args"):  # by timm, from 1.0.31 on
        vars(model).pop("_model_args", None)
        with pytest.warns(UserWarning, match="will not load as the model that was saved"):
            timm_dvt.save_pretrained(model, tmp_path, model_args=arguments)
        arguments |= options
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dvt.save_pretrained(model, tmp_path, model_args=arguments)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.forward_features(images), model.forward_features(images))


def test_what_computes_the_same_is_not_warned_of(tmp_path):
    model = timm_dvt.add_denoiser(timm.create_model("levit_128s", num_classes=0)).eval()
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dvt.save_pretrained(model, tmp_path)
