"""Loading weights: the published layouts, through the real Hub client and from files, and all that can be wrong."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers import authors, reference
from tests.helpers.fabricated import images_for, publish, publish_backbone
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import DVT_REPO, published_variants

NAME = "vit_small_patch14_dinov2.lvd142m_dvt"
BACKBONE = "vit_small_patch14_dinov2.lvd142m"
PUBLISHED = [variant for variant in published_variants() if variant.hub_file]
THIN = {"depth": 1, "embed_dim": 64, "num_heads": 1}  # test_variants has the real widths


@pytest.mark.parametrize("variant", PUBLISHED, ids=lambda variant: variant.name)
@torch.no_grad()
def test_a_training_checkpoint_loads_from_the_hub_where_it_is_published(variant, hub, tmp_path):
    backbone = publish_backbone(hub, variant.backbone, **THIN)
    patch = timm.create_model(variant.backbone, device="meta", **THIN).patch_embed.patch_size[0]
    if variant.distilled:
        state = {k: torch.randn_like(v) * 0.05 for k, v in backbone.items() if not k.startswith("head.")}
        whole = {f"model.{key}": value for key, value in state.items()}
        publish(hub, variant.hub_file, authors.training_checkpoint("model", whole))
    else:
        state = reference.published_state(64, variant.resolution // patch)
        publish(hub, variant.hub_file, authors.training_checkpoint("denoiser", state))
    hub.requests.clear()
    model = timm.create_model(variant.name, pretrained=True, cache_dir=tmp_path, **THIN).eval()
    assert f"HEAD /{DVT_REPO}/resolve/main/{variant.hub_file}" in hub.requests
    arguments = {**THIN, "dynamic_img_size": True, "cache_dir": tmp_path}
    plain = timm.create_model(variant.backbone, pretrained=True, **arguments).eval()
    images = images_for(model)
    if variant.distilled:
        own = model.state_dict()
        assert all(torch.equal(own[key], state[key]) for key in own)
        assert model.num_classes == 0 and type(model) is type(plain)
        return
    tokens, prefix = plain.forward_features(images), plain.num_prefix_tokens
    want = reference.denoise(state, tokens[:, prefix:], (3, 4), 1)
    assert torch.allclose(model.forward_features(images)[:, prefix:], want, atol=1e-3)
    model.set_denoise(False)
    assert torch.equal(model.forward_features(images), tokens) and torch.equal(model(images), plain(images))


@pytest.mark.slow
def test_the_network_is_not_needed_once_the_files_are_cached(hub, tmp_path):
    publish_backbone(hub, BACKBONE, depth=1)
    publish(hub, f"voc_denoised/{BACKBONE}.pth", {"denoiser": reference.published_state(384, 37)})
    timm.create_model(NAME, pretrained=True, depth=1, cache_dir=tmp_path)
    code = f"import timm, timm_dvt; timm.create_model({NAME!r}, pretrained=True, depth=1, cache_dir={str(tmp_path)!r})"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["nothing", "the denoiser"])
def test_without_network_the_error_names_both_files_and_the_commands(hub, tmp_path, cached):
    if cached == "the denoiser":
        publish(hub, f"voc_denoised/{BACKBONE}.pth", {"denoiser": reference.published_state(384, 37)})
        timm.models._hub.hf_hub_download(DVT_REPO, f"voc_denoised/{BACKBONE}.pth", cache_dir=tmp_path)
    code = f"import timm, timm_dvt; timm.create_model({NAME!r}, pretrained=True, depth=1, cache_dir={str(tmp_path)!r})"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    error = run.stderr[run.stderr.rindex("WeightsNotFoundError") :]
    assert f"hf download jjiaweiyang/DVT voc_denoised/{BACKBONE}.pth && " in error
    assert f"hf download timm/{BACKBONE} model.safetensors " in error and error.strip().count("\n") == 0


def test_a_variant_without_weights_says_so():
    for name in ("vit_giant_patch14_dinov2.lvd142m_dvt", "vit_giant_patch14_reg4_dinov2_dvt"):
        with pytest.raises(timm_dvt.WeightsNotFoundError, match="No denoiser has been published for vit_giant"):
            timm.create_model(name, pretrained=True, depth=1)


# ---- files of one's own


@pytest.fixture
def model():
    return timm.create_model(NAME, depth=2, img_size=56).eval()


def published(blocks=1, pos_embed=True, side=37, dim=384) -> dict:
    return reference.published_state(dim, side, blocks, pos_embed)


LAYOUTS = {
    "denoiser": lambda: {"denoiser": published()},
    "with training state": lambda: authors.training_checkpoint("denoiser", published()),
    "several blocks": lambda: {"denoiser": published(3)},
    "no position embedding": lambda: {"denoiser": published(1, False)},
    "several blocks, no position embedding": lambda: {"denoiser": published(2, False)},
    "a bare state dict": lambda: published(),
    "distributed training": lambda: {"denoiser": {f"module.{k}": v for k, v in published().items()}},
    "half precision": lambda: {"denoiser": {k: v.half() for k, v in published().items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_published_layout_of_a_denoiser_is_read(layout, model, tmp_path):
    content = LAYOUTS[layout]()
    torch.save(content, tmp_path / "file.pth")
    assert timm_dvt.load_denoiser(model, tmp_path / "file.pth") is model
    state = {k.removeprefix("module."): v.float() for k, v in content.get("denoiser", content).items()}
    images = images_for(model)
    with model.denoising(False):
        tokens = model.forward_features(images)[:, 1:]
    assert torch.allclose(model.forward_features(images)[:, 1:], reference.denoise(state, tokens, (3, 4), 6), atol=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("key", ["model", "denoiser"])
@torch.no_grad()
def test_old_and_new_keys_of_distilled_files(key, tmp_path):
    plain = timm.create_model(BACKBONE, depth=2)
    torch.save({key: {f"model.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "file.pth")
    name = "vit_base_patch14_dinov2.lvd142m_dvt_distilled"
    arguments = dict(depth=2, embed_dim=384, num_heads=6, pretrained_cfg_overlay={"file": str(tmp_path / "file.pth")})
    model = timm.create_model(name, pretrained=True, **arguments).eval()
    images = torch.randn(1, 3, 518, 518)
    assert torch.equal(model.forward_features(images), plain.eval().forward_features(images))


def change(state: dict, **changes) -> dict:
    return {k: v for k, v in {**state, **changes}.items() if v is not None}


BAD = {
    "missing key": (lambda: change(published(), **{"denoiser.attn.qkv.bias": None}), "denoiser.blocks.0.attn.qkv.bias"),
    "unexpected key": (lambda: change(published(), **{"denoiser.extra": torch.ones(1)}), "denoiser.blocks.0.extra"),
    "stray key": (lambda: change(published(), extra=torch.ones(1)), "unexpected keys: denoiser.extra"),
    "wrong shape": (
        lambda: change(published(), **{"denoiser.norm1.weight": torch.ones(5)}),
        r"norm1.weight \(5,\) instead of \(384,\)",
    ),
    "other width": (lambda: published(dim=768), r"pos_embed \(1, 1369, 768\) instead of \(1, 1369, 384\)"),
    "other grid": (lambda: published(side=32), r"pos_embed \(1, 1024, 384\) instead of \(1, 1369, 384\)"),
    "missing block": (
        lambda: {k: v for k, v in published(3).items() if not k.startswith("denoiser.1.")},
        "missing keys: denoiser.blocks.1",
    ),
    "no denoiser": (lambda: timm.create_model(BACKBONE, depth=1).state_dict(), "holds no denoiser"),
    "block number": (lambda: {"denoiser.999999999.norm1.weight": torch.ones(384)}, "beyond reason"),
}


@pytest.mark.parametrize("how", ["load_denoiser", "create_model"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_its_keys_and_the_model_is_as_it_was(case, how, model, tmp_path):
    make, message = BAD[case]
    path = tmp_path / "bad.pth"
    torch.save({"denoiser": make()}, path)
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    with pytest.raises(timm_dvt.CheckpointError, match=f"bad.pth.*{message}"):
        if how == "load_denoiser":
            timm_dvt.load_denoiser(model, path)
        else:
            timm.create_model(NAME, pretrained=True, depth=1, pretrained_cfg_overlay={"file": str(path)})
    after = model.state_dict()
    assert list(model.modules()) == modules and all(torch.equal(before[k], after[k]) for k in before)


def test_a_file_of_another_backbone_is_refused_by_its_name(model, tmp_path):
    path = tmp_path / "vit_small_patch14_reg4_dinov2.lvd142m.pth"
    torch.save({"denoiser": published()}, path)
    with pytest.raises(timm_dvt.CheckpointError, match=f"made for vit_small_.*reg4_dinov2.lvd142m, not for {BACKBONE}"):
        timm_dvt.load_denoiser(model, path)


def damaged(tmp_path, how: str):
    path = tmp_path / ("file.safetensors" if "safetensors" in how else "file.pth")
    if "safetensors" in how:
        safetensors.torch.save_file(published(), path)
    else:
        torch.save({"denoiser": published()}, path)
    content = path.read_bytes()
    if "truncated" in how:
        path.write_bytes(content[: len(content) // 2])
    elif "empty" in how:
        path.write_bytes(b"")
    elif "header" in how:
        path.write_bytes(b"\xff" * 16 + content[16:])
    elif "text" in how:
        path.write_text("<html>not a checkpoint</html>")
    elif "list" in how:
        torch.save([1, 2, 3], path)
    elif "numbers" in how:
        torch.save({"denoiser": {"pos_embed": 3.0}}, path)
    else:
        path.unlink()
    return path


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "truncated safetensors",
        "empty",
        "empty safetensors",
        "header",
        "header safetensors",
        "text",
        "list",
        "numbers",
        "missing",
    ],
)
def test_a_damaged_file_is_one_clear_error(how, model, tmp_path):
    path = damaged(tmp_path, how)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(timm_dvt.CheckpointError, match=path.name):
        timm_dvt.load_denoiser(model, path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("protocol", ["torch", "plain pickle"])
@pytest.mark.parametrize("how", ["load_denoiser", "overlay", "checkpoint_path", "local-dir"])
def test_a_malicious_pickle_raises_and_runs_nothing(how, protocol, model, tmp_path):
    target, folder = tmp_path / "pwned", tmp_path / "folder"
    folder.mkdir()
    path = folder / ("model.safetensors" if how == "local-dir" else "file.pth")
    content = {"denoiser": {**published(), "pos_embed": Malicious(target)}}
    if protocol == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(RuntimeError):
        if how == "load_denoiser":
            timm_dvt.load_denoiser(model, path)
        elif how == "overlay":
            timm.create_model(NAME, pretrained=True, depth=1, pretrained_cfg_overlay={"file": str(path)})
        elif how == "checkpoint_path":
            timm.create_model(NAME, depth=1, checkpoint_path=str(path))
        else:
            (folder / "config.json").write_text(
                json.dumps({"architecture": "vit_small_patch14_dinov2_dvt", "pretrained_cfg": {}, "num_classes": 0})
            )
            timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target))).close()
    assert target.exists()  # the pickle is a malicious one


def test_a_persons_own_variant_loads_its_file(hub, tmp_path):
    publish_backbone(hub, "vit_tiny_patch16_224.augreg_in21k_ft_in1k", depth=1)
    torch.save({"denoiser": published(dim=192, side=14)}, tmp_path / "own.pth")
    name = timm_dvt.register("vit_tiny_patch16_224", "own", file=tmp_path / "own.pth")
    model = timm.create_model(name, pretrained=True, depth=1, cache_dir=tmp_path)
    assert timm.is_model_pretrained(name) and VARIANTS[name].source == str(tmp_path / "own.pth")
    want = torch.load(tmp_path / "own.pth", weights_only=True)["denoiser"]["pos_embed"]
    assert torch.equal(model.denoiser.pos_embed, want)


def test_an_overlay_with_a_whole_models_state_dict_or_file(tmp_path):
    model = timm.create_model(NAME, depth=1)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "whole.safetensors")
    for overlay in ({"file": str(tmp_path / "whole.safetensors")}, {"state_dict": model.state_dict()}):
        again = timm.create_model(NAME, pretrained=True, depth=1, pretrained_cfg_overlay=overlay)
        pairs = zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert "state_dict" not in again.pretrained_cfg
