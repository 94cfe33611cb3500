"""Images without content: how they are drawn, how their tokens are known, and what a denoiser makes of them."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate

import timm_dvt
from tests.helpers.walls import wall
from timm_dvt.calibration.blanks import draw_blank, fit_gate
from timm_dvt.denoiser import Denoiser
from timm_dvt.flat import BELOW, flat_patches
from timm_dvt.image_files import load_image

SIZES = [(518, 518), (280, 420)]


def kinds(apart: float, count: int = 6, channels: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, 50, C) of two kinds whose means lie so many deviations apart."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, count, 50, channels, generator=draw)
    first[..., 3] += apart
    return first, second


def test_a_gate_parts_two_kinds_of_tokens_as_the_true_direction_does():
    blank, other = kinds(apart=12.0)
    weight, bias = fit_gate(blank, other)
    logits = [kind @ weight + bias for kind in (blank, other)]
    assert (logits[0] > 3).float().mean() > 0.98 and (logits[1] < -3).float().mean() > 0.98
    assert weight[3] / weight.norm() > 0.95  # the one channel in which they differ


def test_tokens_that_do_not_differ_get_no_gate_however_few_they_are():
    blank, other = kinds(apart=0.0)
    assert fit_gate(blank, other) is None
    assert fit_gate(blank[:2, :4], other[:2, :4]) is None  # 8 tokens of 16 channels can be parted by chance
    assert fit_gate(blank, kinds(apart=12.0)[1][:1]) is None  # one photograph cannot tell


def test_blank_images_are_of_one_color_or_stationary_noise_and_follow_from_the_seed():
    for seed in range(8):
        image = draw_blank(3, (28, 42), seed)
        assert image.shape == (3, 28, 42) and 0 <= image.min() <= image.max() <= 1
        assert torch.equal(image, draw_blank(3, (28, 42), seed))
        assert (image.amax((1, 2)) == image.amin((1, 2))).all() == (seed % 2 == 0)


def test_an_open_gate_gives_the_mean_of_the_open_tokens_and_a_shut_one_changes_nothing():
    torch.manual_seed(0)
    plain = Denoiser(16, (3, 4), keep_length=True).eval()
    gated = Denoiser(16, (3, 4), keep_length=True, blank_gate=True).eval()
    gated.load_state_dict(plain.state_dict() | {k: v for k, v in gated.state_dict().items() if "gate" in k})
    tokens = torch.randn(2, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(gated(tokens, (3, 4)), plain(tokens, (3, 4)), atol=1e-3, rtol=1e-3)
        gated.start_gating(torch.eye(16)[0] * 1e4, 0.0)  # open where the first channel is above 0
        clean = gated(tokens, (3, 4))
        for image, before, after in zip(tokens, plain(tokens, (3, 4)), clean):
            opened = image[:, 0] > 0
            torch.testing.assert_close(after[opened], image[opened].mean(0).expand(int(opened.sum()), -1))
            torch.testing.assert_close(after[~opened], before[~opened])


@pytest.mark.parametrize("arch", ["block", "static", "conv1x1", "project"])
def test_a_gate_is_saved_and_loaded_with_its_denoiser(arch, tmp_path):
    model = timm_dvt.add_denoiser(timm.create_model("test_vit"), arch=arch, blank_gate=True).eval()
    model.denoiser.start_gating(torch.randn(64), 0.5)
    timm_dvt.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["denoiser"]["blank_gate"] is True
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(again.forward_features(images), model.forward_features(images))


def test_in_half_precision_the_mean_of_many_tokens_does_not_overflow():
    denoiser = Denoiser(8, (60, 60), arch="static", blank_gate=True).half()
    denoiser.start_gating(torch.zeros(8), 20.0)
    tokens = torch.full((1, 3600, 8), 50.0).half()
    with torch.no_grad():
        assert torch.equal(denoiser(tokens, (60, 60)), tokens)


def inputs(model, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, h, w) in [0, 1] as the model takes them."""
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.fixture(scope="module")
def shipped():
    pytest.importorskip("onnx")
    return timm.create_model("vit_small_patch14_dinov2.focus_dvt", pretrained=True).eval()


def spread(tokens: torch.Tensor) -> float:
    exact = tokens.double()
    return float((exact - exact.mean(0)).square().mean().sqrt())


@pytest.mark.parametrize("size", [(280, 280), *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES)])
@pytest.mark.parametrize("kind", ["olive", "black", "noise"])
def test_the_shipped_denoiser_leaves_a_tenth_of_the_pattern_of_blank_images_at_most(shipped, size, kind):
    images = {
        "olive": torch.tensor([0.4, 0.42, 0.1]).view(1, 3, 1, 1).expand(1, 3, *size),
        "black": torch.zeros(1, 3, *size),
        "noise": torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3)),
    }
    image = inputs(shipped, images[kind])
    with torch.no_grad():
        on = shipped.forward_features(image)[0, 1:]
        with shipped.denoising(False):
            off = shipped.forward_features(image)[0, 1:]
    assert spread(on) < 0.1 * spread(off)


@pytest.mark.parametrize("size", [(280, 280), pytest.param((518, 784), marks=pytest.mark.slow)])
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_the_shipped_denoiser_leaves_a_tenth_of_the_pattern_of_a_wall_beside_a_cat_and_the_cat_as_it_is(
    shipped, size, noise
):
    photograph = interpolate(load_image("timm_dvt/assets/cat.jpg")[None], size, mode="bilinear", antialias=True)[0]
    rows = size[0] // 14 // 2
    shade = 0.7 - 0.1 * torch.linspace(0, 1, size[1])
    drawn = shade + noise / 255 * torch.randn(3, 14 * rows, size[1], generator=torch.Generator().manual_seed(0))
    photograph[:, : 14 * rows] = (255 * drawn).round() / 255  # 8 bits, as a file has
    images = inputs(shipped, photograph[None])
    with torch.no_grad():
        on = shipped.forward_features(images)[0, 1:].unflatten(0, (size[0] // 14, -1))
        with shipped.denoising(False):
            off = shipped.forward_features(images)[0, 1:].unflatten(0, (size[0] // 14, -1))
        block = copy.deepcopy(shipped.denoiser)
        block.blank_gate = None
        ungated = block(off.flatten(0, 1)[None], off.shape[:2])[0].unflatten(0, off.shape[:2])
    wall = slice(0, rows - 2)  # what is below shows in the rows of patches next to it
    assert spread(on[wall].flatten(0, 1)) < 0.1 * spread(off[wall].flatten(0, 1))
    assert (on - ungated)[rows:].norm(dim=-1).median() == 0  # the cat is as it was; behind it the picture is blurred


def page(size: int) -> torch.Tensor:
    """Lines of text, as gray as print on a screen, with margins: an image (3, size, size) in [0, 1]."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for y in range(size // 8, 7 * size // 8, 16):
        draw.text((size // 8, y), "the tokens of a page are near those of paper " * 2, fill=(80, 80, 80))
    draw.rectangle((7 * size // 8, 0, size, size), fill="white")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def alike(image: torch.Tensor, patch: int = 14) -> float:
    return float(flat_patches(image[None], (image.shape[1] // patch, image.shape[2] // patch), torch.tensor(BELOW))[2])


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_blank_images_have_the_same_texture_all_over_and_others_have_not(patch):
    size = 12 * patch
    blanks = [
        torch.full((3, size, size), 0.3),
        torch.rand(3, size, size),
        torch.linspace(0.2, 0.7, size).expand(3, size, size),
    ]
    blanks += [draw_blank(3, (size, size), seed) for seed in range(24)]
    assert min(alike(blank, patch) for blank in blanks) > 0.9
    cat = load_image("timm_dvt/assets/cat.jpg")
    others = [
        page(size),
        cat[:, :size, :size],
        0.12 * cat[:, :size, :size] + 0.7,
        wall(1.0, grid=(12, 12), patch=(patch,) * 2),
    ]
    assert max(alike(other, patch) for other in others) < 0.01


@pytest.mark.parametrize("size", [280, pytest.param(518, marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_shipped_denoiser_takes_no_page_of_text_for_blank(shipped, size):
    images = inputs(shipped, page(size)[None])
    on = shipped.forward_features(images)[0, 1:]
    with shipped.denoising(False):
        off = shipped.forward_features(images)[0, 1:]
    text = (page(size).unflatten(2, (-1, 14)).unflatten(1, (-1, 14)).amin((0, 2, 4)) < 0.5).flatten()
    apart, apart_before = ((each[text].mean(0) - each[~text].mean(0)).norm() for each in (on, off))
    assert apart > 0.8 * apart_before
