"""The model inside the package: real weights with no network, honest artifacts in, few of them out."""

from importlib import resources

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import timm_dvt
from timm_dvt.variants import EMBEDDED

ASSETS = resources.files("timm_dvt") / "assets" / "stamps"
NAME = "vit_tiny_patch16_224.stamps_dvt"


@pytest.fixture(scope="module")
def model():
    return timm.create_model(NAME, pretrained=True).eval()


@pytest.fixture(scope="module")
def images():
    """Crops of photographs, of all places and sizes: what is common to them is not in the pictures."""
    with Image.open(str(resources.files("timm_dvt") / "assets" / "cat.jpg")) as cat:
        photographs = [np.asarray(cat.convert("RGB"))]
    data = pytest.importorskip("skimage.data")
    photographs += [getattr(data, name)() for name in ("astronaut", "coffee", "rocket")]
    draw = np.random.default_rng(0)
    mean, std = (torch.tensor(EMBEDDED_STATISTICS[key]).view(3, 1, 1) for key in ("mean", "std"))
    crops = []
    for photograph in photographs:
        height, width = photograph.shape[:2]
        for _ in range(24):
            side = int(draw.uniform(0.25, 0.9) * min(height, width))
            top, left = draw.integers(height - side), draw.integers(width - side)
            crop = Image.fromarray(photograph[top:top + side, left:left + side]).resize((192, 192))
            crops.append((torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255 - mean) / std)
    return torch.stack(crops)


EMBEDDED_STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def position_share(tokens: torch.Tensor) -> float:
    """Variance between places over all variance, of (B, N, C), as a one-way analysis of variance in plain sums."""
    values = tokens.double()
    overall = values.mean((0, 1))
    between = len(values) * (values.mean(0) - overall).square().sum()
    total = (values - overall).square().sum()
    residual = (total - between) / (values.shape[0] * values.shape[1] - values.shape[1])
    return float((between - (values.shape[1] - 1) * residual) / total)


def test_it_loads_in_one_line_without_a_network(model, hub):
    assert isinstance(model, timm.models.VisionTransformer) and model.denoise
    assert model.pretrained_cfg["input_size"] == (3, 192, 192) and model.num_classes == 0
    with safe_open(str(ASSETS / "backbone.safetensors"), "pt") as file:
        assert torch.equal(model.blocks[5].attn.qkv.weight, file.get_tensor("blocks.5.attn.qkv.weight").float())
    with safe_open(str(ASSETS / "denoiser.safetensors"), "pt") as file:
        assert torch.equal(model.denoiser.pos_embed, file.get_tensor("denoiser.pos_embed").float())


def test_the_files_are_in_half_precision_and_small():
    files = [ASSETS / f"{part}.safetensors" for part in ("backbone", "denoiser")]
    assert sum(len(file.read_bytes()) for file in files) <= 12_000_000
    for file in files:
        with safe_open(str(file), "pt") as opened:
            assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}
    text = (ASSETS / "README.md").read_text()
    assert "Licence" in text and "python -m training.pretrain_tiny" in text


@torch.no_grad()
def test_switching_off_gives_the_backbone_of_its_own_name_bit_for_bit(model, images):
    backbone = timm.create_model("vit_tiny_patch16_224.stamps", pretrained=True).eval()
    assert type(backbone) is timm.models.VisionTransformer
    with model.denoising(False):
        assert torch.equal(model.forward_features(images[:2]), backbone.forward_features(images[:2]))
    assert not torch.equal(model.forward_features(images[:2]), backbone.forward_features(images[:2]))


@torch.no_grad()
def test_position_explains_a_tenth_of_what_it_did(model, images):
    denoised = model.forward_features(images)[:, 1:]
    with model.denoising(False):
        raw = model.forward_features(images)[:, 1:]
    assert position_share(raw) > 0.05
    assert position_share(denoised) < 0.1 * position_share(raw)


def test_it_is_listed_and_it_can_be_saved_and_loaded(model, tmp_path):
    assert EMBEDDED.name == NAME and NAME in timm.list_pretrained("*stamps*")
    timm_dvt.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_its_names_leave_timms_own_as_they_are():
    assert timm.get_pretrained_cfg("vit_tiny_patch16_224").tag == "augreg_in21k_ft_in1k"
    assert not any("stamps" in name and not name.endswith("_dvt") for name in timm.list_pretrained())
