"""Images and patches without content: how they are drawn and known, and what a denoiser makes of them."""

import json
import math

import pytest
import timm
import torch

import timm_dvt
from timm_dvt.calibration.blanks import (
    BETWEEN,
    BUSY,
    GATE_BLANKS,
    GATE_WALLS,
    PLAIN,
    busy_patches,
    draw_blank,
    draw_plain,
    draw_wall,
    fit_gate,
)
from timm_dvt.denoiser import ROUNDS, SHARPNESS, Denoiser, level

SIZES = [(518, 518), (280, 420)]


def kinds(apart: float, count: int = 6, channels: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, 50, C) of two kinds whose means lie so many deviations apart."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, count, 50, channels, generator=draw)
    first[..., 3] += apart
    return first, second


def images_of(apart: float, shown: int = BUSY) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (12, 50, C) of six blank images and of six others, and what their patches show."""
    blank, other = kinds(apart)
    seen = torch.full((12, 50), PLAIN, dtype=torch.uint8)
    seen[6:] = shown
    return torch.cat([blank, other]), seen


def test_a_gate_parts_two_kinds_of_tokens_as_the_true_direction_does():
    tokens, seen = images_of(apart=12.0)
    weight, bias = fit_gate(tokens, seen)
    logits = tokens @ weight + bias
    assert (logits[:6] > 5.9).float().mean() > 0.98 and (logits[6:] < 0).float().mean() > 0.95
    assert weight[3] / weight.norm() > 0.95  # the one channel in which they differ


def test_walls_are_known_as_blank_images_are_busy_patches_are_not_and_others_do_not_count():
    tokens, seen = images_of(apart=12.0)
    seen[6:, :20], seen[6:, 20:30] = PLAIN, BETWEEN
    tokens[6:, :20, 5] += 20.0  # unlike blank images, and unlike all else
    tokens[6:, 20:30] = tokens[6:, :10]  # as walls, of which nobody said that they are
    weight, bias = fit_gate(tokens, seen)
    known = [float((tokens[seen == kind] @ weight + bias > 0).float().mean()) for kind in (PLAIN, BETWEEN, BUSY)]
    assert known[0] > 0.98 and known[1] > 0.98 and known[2] < 0.05


def test_tokens_that_do_not_differ_get_no_gate_however_few_they_are():
    assert fit_gate(*images_of(apart=0.0)) is None
    tokens, seen = images_of(apart=0.0)
    assert fit_gate(tokens[:, :4], seen[:, :4]) is None  # 24 tokens of 16 channels can be parted by chance


def test_without_blank_images_or_busy_patches_there_is_no_gate():
    tokens, seen = images_of(apart=12.0)
    assert fit_gate(*images_of(apart=12.0, shown=BETWEEN)) is None
    assert fit_gate(tokens[6:], seen[6:]) is None
    assert fit_gate(tokens[:7], seen[:7]) is None  # one photograph


@pytest.mark.parametrize("size, grid", [((56, 56), (4, 4)), ((42, 70), (3, 5))])
def test_walls_hide_whole_patches_of_a_photograph_and_follow_from_the_seed(size, grid):
    for seed in range(12):
        image, hidden = draw_wall(size, grid, seed)
        assert image.shape == (3, *size) and 0 <= image.min() <= image.max() <= 1
        assert hidden.shape == grid and 0 < hidden.sum() < grid[0] * grid[1]
        again, same = draw_wall(size, grid, seed)
        assert torch.equal(image, again) and torch.equal(hidden, same)
        deviations = image.unflatten(1, (grid[0], 14)).unflatten(3, (grid[1], 14)).std((2, 4)).mean(0)
        assert deviations[hidden].max() < 0.06  # noise and light are faint


def test_what_a_gate_is_fitted_to_is_plain_where_nothing_is_and_walls_are():
    images, seen = draw_plain(3, (56, 70), (4, 5))
    assert images.shape == (GATE_BLANKS + GATE_WALLS, 3, 56, 70) and seen.shape == (GATE_BLANKS + GATE_WALLS, 20)
    assert (seen[:GATE_BLANKS] == PLAIN).all() and set(seen.flatten().tolist()) == {PLAIN, BETWEEN}
    _, hidden = draw_wall((56, 70), (4, 5), 3)
    assert torch.equal(seen[GATE_BLANKS + 3] == PLAIN, hidden.flatten())
    assert len(draw_plain(4, (56, 70), (4, 5))[0]) == GATE_BLANKS  # there is no photograph of four channels


def test_busy_patches_are_those_whose_pixels_differ():
    image = torch.full((1, 3, 56, 70), 0.5)  # 4 x 5 patches of 14
    image[..., 28:42, 56:] += torch.linspace(-0.2, 0.2, 14)
    image[..., :14, :14] += torch.linspace(-0.011, 0.011, 14)  # of a deviation of 0.007
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    wanted[2, 4] = True
    assert torch.equal(busy_patches(image, (4, 5))[0], wanted)


def test_tokens_of_blank_patches_get_the_mean_of_those_like_them():
    torch.manual_seed(0)
    tokens, logits = torch.randn(2, 9, 4).double(), 3 * torch.randn(2, 9, 1).double()
    leveled = level(tokens.float(), logits.float())
    for b in range(2):
        known = [1 / (1 + math.exp(-float(logit))) for logit in logits[b]]
        now = [tokens[b, i] for i in range(9)]
        for _ in range(ROUNDS):
            means = []
            for x in now:
                likeness = [float(x @ y) / (float(x.norm()) * float(y.norm())) for y in now]
                weights = [s * math.exp(SHARPNESS * (cos - 1)) for s, cos in zip(known, likeness)]
                means.append(sum(w * y for w, y in zip(weights, now)) / sum(weights))
            now = [(1 - s) * x + s * mean for s, x, mean in zip(known, now, means)]
        torch.testing.assert_close(leveled[b].double(), torch.stack(now), atol=1e-4, rtol=1e-4)


def test_two_plain_walls_of_different_kinds_stay_two():
    walls = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    tokens = (walls.repeat_interleave(50, 0) + 0.1 * torch.randn(100, 8))[None]
    leveled = level(tokens, torch.full((1, 100, 1), 8.0))[0]
    for wall, before, after in zip(walls, tokens[0].split(50), leveled.split(50)):
        assert after.std(0).norm() < 0.02 * before.std(0).norm()
        assert (after.mean(0) - wall).norm() < 0.1


def test_blank_images_are_of_one_color_or_stationary_noise_and_follow_from_the_seed():
    for seed in range(8):
        image = draw_blank(3, (28, 42), seed)
        assert image.shape == (3, 28, 42) and 0 <= image.min() <= image.max() <= 1
        assert torch.equal(image, draw_blank(3, (28, 42), seed))
        assert (image.amax((1, 2)) == image.amin((1, 2))).all() == (seed % 2 == 0)


def test_an_open_gate_levels_what_a_denoiser_gives_and_a_shut_one_changes_nothing():
    torch.manual_seed(0)
    plain = Denoiser(16, (3, 4), keep_length=True).eval()
    gated = Denoiser(16, (3, 4), keep_length=True, blank_gate=True).eval()
    gated.load_state_dict(plain.state_dict() | {k: v for k, v in gated.state_dict().items() if "gate" in k})
    tokens = 2 + 0.5 * torch.randn(2, 12, 16)
    with torch.no_grad():
        torch.testing.assert_close(gated(tokens, (3, 4)), plain(tokens, (3, 4)), atol=1e-3, rtol=1e-3)
        gated.start_gating(torch.eye(16)[0] * 1e4, -2e4)  # open where the first channel is above 2
        opened = tokens[..., :1] > 2
        clean, before = gated(tokens, (3, 4)), plain(tokens, (3, 4))
        torch.testing.assert_close(clean, level(before, 1e4 * (tokens[..., :1] - 2)))
        torch.testing.assert_close(clean * ~opened, before * ~opened)
        assert ((clean - before) * opened).norm() > 0.1 * (before * opened).norm()


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
    config = timm.data.resolve_model_data_config(shipped)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        on = shipped.forward_features((images[kind] - mean) / std)[0, 1:]
        with shipped.denoising(False):
            off = shipped.forward_features((images[kind] - mean) / std)[0, 1:]
    assert spread(on) < 0.1 * spread(off)
