"""Patches without texture: found by their pixels as a least-squares plane finds them, and leveled among themselves."""

import json

import numpy as np
import pytest
import timm
import torch

import timm_dvt
from tests.helpers.walls import GRID, PATCH, wall
from timm_dvt.denoiser import Denoiser
from timm_dvt.flat import BELOW, BITS, _level, cell_means, flat_patches, group_numbers, level, patch_side


def roughness_by_least_squares(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What a plane leaves of a patch's 4 x 4 cells, or a tenth of their grain, opened over 3 x 3: loops, in float64."""
    rows, columns = image.shape[1] // grid[0], image.shape[2] // grid[1]
    fine = image.repeat(4, 1).repeat(4, 2)  # four times the pixels: cells are whole ones
    rough = np.zeros(grid)
    place = np.arange(4.0)
    plane = np.stack([np.ones(16), np.repeat(place, 4), np.tile(place, 4)], 1)
    for i in range(grid[0]):
        for j in range(grid[1]):
            for channel in fine:
                patch = channel[4 * i * rows : 4 * (i + 1) * rows, 4 * j * columns : 4 * (j + 1) * columns]
                pixels = patch.reshape(4, rows, 4, columns)
                cells = pixels.mean((1, 3)).ravel()
                rest = cells - plane @ np.linalg.lstsq(plane, cells, rcond=None)[0]
                grain = np.sqrt(pixels.var((1, 3)).mean())
                rough[i, j] += max(np.sqrt((rest**2).mean()), grain / 10) / len(fine)
    around = [(di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]

    def over(values, pick):
        there = lambda i, j: 0 <= i < grid[0] and 0 <= j < grid[1]  # noqa: E731
        return np.array(
            [
                [pick(values[i + a, j + b] for a, b in around if there(i + a, j + b)) for j in range(grid[1])]
                for i in range(grid[0])
            ]
        )

    return over(over(rough, max), min)


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_roughness_is_what_a_least_squares_plane_leaves_of_the_cells(sigma):
    image = wall(sigma)
    want = roughness_by_least_squares(image.double().numpy(), GRID)
    logits, marks, _ = (part[0] for part in flat_patches(image[None], GRID, torch.tensor(BELOW)))
    logits = logits.reshape(GRID)
    expected = np.maximum(8 * (1 - want / BELOW), -30)
    assert np.abs(logits.numpy() - expected).max() < 1e-3
    means = image.double().numpy().reshape(3, GRID[0], PATCH[0], GRID[1], PATCH[1]).mean((2, 4)).reshape(3, -1).T
    np.testing.assert_allclose(marks[:, :3].numpy(), means / 0.35 / 3**0.5, atol=1e-5)
    assert marks.shape[1] == 3 + BITS
    assert (logits[:, :3] > 0).all() and (logits[:, 3:] == -30).all()  # walls with noise of two levels, too


def test_one_flat_patch_among_textured_ones_is_content():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 70, 84)
    image[:, :, 28:42, 28:42] = 0.5  # one patch
    assert (flat_patches(image, (5, 6), torch.tensor(BELOW))[0] == -30).all()
    image[:, :, :42, :42] = 0.5  # three by three of them
    assert (flat_patches(image, (5, 6), torch.tensor(BELOW))[0].reshape(5, 6)[:3, :3] == 8).all()


@pytest.mark.parametrize("period", [1, 2])
def test_a_fine_strong_texture_is_none_though_its_cells_are_alike(period):
    at = torch.arange(112) // period
    board = ((at + at[:, None]) % 2).float().expand(1, 3, 112, 112)
    for grid in ((8, 8), (7, 7)):  # patches of 14 and 16
        assert (flat_patches(board, grid, torch.tensor(BELOW))[0] < 0).all()


@pytest.mark.parametrize(("pixels", "count", "side"), [(518, 37, 14), (512, 37, 14), (520, 37, 14), (230, 15, 16)])
def test_a_patch_keeps_its_side_where_the_last_is_padded_or_a_rest_is_left(pixels, count, side):
    assert patch_side(pixels, count) == side


def test_pixels_are_those_of_the_patch_where_timm_pads_the_image():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 510, 512)
    image[:, :, : 14 * 24] = 0.6  # 24 rows of patches; of the 25th the next pixels would look flat
    padded = torch.nn.functional.pad(image, (0, 6, 0, 8))
    found, want = (flat_patches(each, (37, 37), torch.tensor(BELOW))[0].reshape(37, 37) for each in (image, padded))
    assert torch.equal(found, want) and (found[:24, :35] == 8).all() and (found[24:] == -30).all()


@pytest.mark.parametrize("pixels", [1, 2, 4, 14, 16, 32])
def test_cells_are_means_over_equal_parts_of_a_side(pixels):
    weights = cell_means(pixels)
    fine = np.repeat(np.random.default_rng(0).random(pixels), 4)
    assert np.allclose(weights.numpy() @ fine[::4], fine.reshape(4, pixels).mean(1), atol=1e-6)


def test_leveling_is_two_rounds_of_a_mean_of_flat_tokens_like_each_of_its_mark():
    torch.manual_seed(0)
    tokens, logits, marks = torch.randn(2, 9, 8) * 0.2 + torch.randn(8), torch.randn(2, 9) * 4, torch.randn(2, 9, 3)
    logits[:, 0] = -30
    found = level(tokens, logits, marks)
    assert torch.equal(found[:, 0], tokens[:, 0])
    torch.testing.assert_close(_level(tokens, logits, marks), found)  # as where nothing may look at values
    timm.layers.set_fused_attn(False)
    try:
        torch.testing.assert_close(_level(tokens, logits, marks), found)
        torch.func.jvp(lambda x: level(x, logits, marks), (tokens,), (tokens,))  # what no fused kernel can
    finally:
        timm.layers.set_fused_attn(True)
    parts = (part.double().numpy() for part in (tokens, logits, marks))
    for given, logit, mark, leveled in zip(*parts, found):
        flat = 1 / (1 + np.exp(-logit))
        want = given
        for _ in range(2):
            unit = want / np.linalg.norm(want, axis=1, keepdims=True)
            alike = np.exp(40 * (unit @ unit.T - 1) - ((mark[:, None] - mark) ** 2).sum(-1))
            weights = alike * flat
            mean = weights @ want / weights.sum(1, keepdims=True)
            want = want + flat[:, None] * (mean - want)
        assert np.abs(leveled.numpy() - want).max() < 1e-5


def model_with_gate(name: str = "test_vit", **options):
    torch.manual_seed(0)
    model = timm.create_model(name, dynamic_img_size=True)
    return timm_dvt.add_denoiser(model, flat_gate=True, **options).eval()


@pytest.mark.parametrize("options", [{}, {"layers": [3, -1]}, {"arch": "static"}])
@torch.no_grad()
def test_every_method_levels_walls_and_leaves_the_rest_to_the_bit(options):
    model = model_with_gate(**options)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = ((wall(1.0, grid=(10, 10), patch=(16, 16)) - mean) / std)[None]
    on_wall = (torch.arange(100) % 10 < 5)[None]
    denoisers = model.denoisers().values()

    def features():
        final, maps = model.forward_intermediates(images, indices=[3, 5], output_fmt="NLC")
        return model.forward_features(images)[:, 1:], final[:, 1:], *maps[0 if "layers" in options else 1 :]

    gated = features()
    below = [denoiser.flat_below for denoiser in denoisers]
    assert below == [torch.tensor(0.6 / 255 / 0.5)] * len(below)  # by test_vit's standard deviation
    for denoiser in denoisers:
        denoiser.flat_below = None
    for leveled, as_before in zip(gated, features(), strict=True):
        assert torch.equal(leveled[~on_wall], as_before[~on_wall])
        want = level(as_before, *flat_patches(images, (10, 10), below[0])[:2])
        assert torch.equal(leveled, want) and (leveled - as_before)[on_wall].abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_finds_the_same_walls(dtype):
    image = (wall(1.0)[None] - 0.45) / 0.225
    below = torch.tensor(BELOW / 0.225)
    want, found = (flat_patches(image.to(d), GRID, below.to(d)) for d in (torch.float32, dtype))
    assert ((want[0] > 0) == (found[0] > 0)).all() and found[0].dtype == torch.float32
    tokens = torch.randn(1, 30, 8).to(dtype)
    leveled = level(tokens.float(), *want[:2])
    assert (level(tokens, *found[:2]) - leveled).abs().max() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        found = flat_patches(image, GRID, below)
        assert ((want[0] > 0) == (found[0] > 0)).all()
        assert (level(tokens.float(), *found[:2]) - leveled).abs().max() < 0.1


def test_gradients_reach_tokens_and_images_and_are_finite():
    model = model_with_gate()
    images = torch.zeros(1, 3, 160, 160, requires_grad=True)  # as flat as can be
    model.forward_features(images).square().sum().backward()
    assert images.grad is not None and bool(images.grad.isfinite().all()) and bool(images.grad.any())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("channels", [1, 4])
@torch.no_grad()
def test_images_of_other_channels_are_leveled_too(channels):
    model = timm_dvt.add_denoiser(timm.create_model("test_vit", in_chans=channels), flat_gate=True).eval()
    tokens = model.forward_features(torch.full((1, channels, 160, 160), 0.3))[0, 1:]
    assert (tokens - tokens.mean(0)).abs().max() < 1e-3


def test_things_drawn_in_plain_colors_stay_apart():
    image = torch.full((1, 3, 112, 112), 0.5)
    image[:, :, :, :56] = torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1)
    image[:, :, :, 56:] = torch.tensor([0.1, 0.1, 0.8]).view(3, 1, 1)
    logits, marks, _ = flat_patches(image, (8, 8), torch.tensor(BELOW))
    tokens = torch.randn(1, 1, 64).expand(1, 64, 64) + 0.05 * torch.randn(1, 64, 64)  # cosines of 0.997
    red = torch.arange(64) % 8 < 4
    tokens = tokens + 0.1 * red[None, :, None] * torch.randn(64)
    leveled = level(tokens, logits, marks)[0]
    apart, apart_before = ((each[red].mean(0) - each[~red].mean(0)).norm() for each in (leveled, tokens[0]))
    assert apart > 0.99 * apart_before and leveled[red].std(0).norm() < 0.2 * tokens[0][red].std(0).norm()


def test_groups_are_those_that_scipy_labels():
    from scipy import ndimage  # seconds to import

    torch.manual_seed(0)
    flat = torch.rand(2, 1, 37, 30) < torch.tensor([0.97, 0.85]).view(2, 1, 1, 1)
    flat[1, 0, 10:25, 5:20] = False
    flat[1, 0, 12:22, 7:18] = True  # one within a ring
    flat[1, 0, 11, 6] = True  # and one that touches it at a corner alone
    numbers = (group_numbers(flat, torch.zeros(2, 3, 37, 30)) * 2**0.5).round()
    assert set(numbers.unique().tolist()) == {-4, 4}
    for mask, found in zip(flat[:, 0].numpy(), numbers.permute(0, 2, 3, 1)):
        labels, count = ndimage.label(mask)
        pairs = {(label, tuple(digits.tolist())) for label, digits in zip(labels[mask], found[torch.from_numpy(mask)])}
        assert len(pairs) == count == len({digits for _, digits in pairs})


def test_what_has_an_outline_stays_apart_from_a_background_of_its_color():
    image = torch.ones(1, 3, 140, 140)
    image[:, :, 28:112, 28:112] = 0.0
    image[:, :, 42:98, 42:98] = 1.0  # white, four patches wide, in a black frame
    logits, marks, _ = flat_patches(image, (10, 10), torch.tensor(BELOW))
    inside = torch.zeros(10, 10, dtype=torch.bool)
    inside[3:7, 3:7] = True
    white = (logits[0] > 0).reshape(10, 10)
    assert white[inside].all()
    tokens = torch.randn(64).expand(1, 100, 64) + 0.1 * inside.flatten()[None, :, None] * torch.randn(
        64
    )  # cosine 0.995
    leveled = level(tokens, logits, marks)[0].unflatten(0, (10, 10))
    torch.testing.assert_close(leveled, tokens[0].unflatten(0, (10, 10)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_file_with_no_such_number_is_refused(number, tmp_path):
    model = model_with_gate()
    model.denoiser.flat_below.fill_(number)
    timm_dvt.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="flat_below is"):
        timm_dvt.load_denoiser(model_with_gate(), tmp_path)


def test_made_on_the_meta_device_it_is_filled_with_the_other_weights():
    with torch.device("meta"):
        denoiser = Denoiser(64, (4, 4), flat_below=0.02)
    denoiser.to_empty(device="cpu").init_weights()
    assert denoiser.flat_below == torch.tensor(0.02)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "naflexvit_base_patch16_gap", "samvit_base_patch16"])
@torch.no_grad()
def test_other_classes_level_too(name):
    """Their features come by other methods than those of VisionTransformer."""
    torch.manual_seed(0)
    small = {"embed_dim": 64, "num_heads": 1, "depth": 1} if "naflex" not in name else {}
    model = timm_dvt.add_denoiser(
        timm.create_model(name, **small, **({} if "naflex" in name else {"img_size": 128})), flat_gate=True
    ).eval()
    size = model.layout.img_size
    image = wall(1.0, 0, model.layout.grid, (16, 16))[None] * 4 - 2
    assert image.shape[2:] == size
    leveled = model.forward_features(image)
    below, model.denoiser.flat_below = model.denoiser.flat_below, None
    as_before = model.forward_features(image)
    leveled, as_before = (
        model.layout.patches(each["patches"] if isinstance(each, dict) else each, model.prefix_tokens())
        for each in (leveled, as_before)
    )
    assert torch.equal(leveled, level(as_before, *flat_patches(image, model.layout.grid, below)[:2]))
    assert (leveled - as_before).abs().max() > 0.05


def test_it_is_saved_and_loaded_with_its_denoiser_and_old_files_have_none(tmp_path):
    model = model_with_gate(blank_gate=True)
    model.denoiser.flat_below.fill_(0.02)
    timm_dvt.save_pretrained(model, tmp_path / "with")
    assert json.loads((tmp_path / "with/config.json").read_text())["model_args"]["denoiser"]["flat_gate"] is True
    again: Denoiser = timm.create_model(f"local-dir:{tmp_path / 'with'}", pretrained=True).denoiser
    assert again.flat_below == torch.tensor(0.02)
    model.denoiser.flat_below = None
    timm_dvt.save_pretrained(model, tmp_path / "without")
    loaded = timm_dvt.load_denoiser(model_with_gate(), tmp_path / "without")
    assert loaded.denoiser.flat_below is None
    assert timm_dvt.load_denoiser(loaded, tmp_path / "with").denoiser.flat_below == torch.tensor(0.02)
