"""The numbers of an inspection against planted truth: they lie within their own errors; at chance is nothing."""

import numpy as np
import pytest
import timm
import torch

from timm_dvt.calibration.positions import PositionSums, Windows
from timm_dvt.inspection import counting
from timm_dvt.inspection.estimates import alikeness, grid_energy, position_share, products_of
from timm_dvt.inspection.outliers import cut_of, outliers_of
from timm_dvt.inspection.probe import PlaceProbe
from timm_dvt.inspection.reader import layer_reader
from training.evaluate.position.share import PositionStatistics

ROWS, COLUMNS, DIM = 5, 4, 6


def views_of(draw: torch.Generator, windows: Windows) -> torch.Tensor:
    """(V, H, W, C): what windows of a canvas of independent cells show, each cell of variance 4, and noise of 1."""
    canvas = 2 * torch.randn(ROWS + 2, COLUMNS + 2, DIM, generator=draw)
    cut = [canvas[y : y + ROWS, x : x + COLUMNS].flip(turned) for y, x, turned in windows.places]
    return torch.stack(cut) + torch.randn(len(cut), ROWS, COLUMNS, DIM, generator=draw)


def share_of(seed: int, artifacts: torch.Tensor):
    draw, windows = torch.Generator().manual_seed(seed), Windows.draw(8, (2, 2))
    sums = PositionSums(windows, 8, directions=False)
    for visit in range(16):
        sums.add(views_of(draw, windows) + artifacts, visit % 8)
    maps, weights, variances = sums.of_groups()
    return position_share(products_of(maps), weights, variances)


def test_a_planted_share_is_found_within_two_of_its_own_errors():
    places = ROWS * COLUMNS
    for size in (0.5, 2.0):
        artifacts = size * torch.randn(ROWS, COLUMNS, DIM)
        artifacts -= artifacts.mean((0, 1))
        planted = float(artifacts.square().sum()) / places
        truth = planted / (planted + 5 * DIM * (1 - 1 / places))
        shares = [share_of(seed, artifacts) for seed in range(24)]
        assert np.mean([abs(share.value - truth) < 2 * share.error for share in shares]) > 0.85
        assert np.mean([share.value for share in shares]) == pytest.approx(truth, rel=0.05)
        spread = np.std([share.value for share in shares])
        assert 0.65 < np.mean([share.error for share in shares]) / spread < 1.5


def test_where_nothing_is_planted_the_share_is_zero_on_average_and_below_chance_nearly_always():
    shares = [share_of(seed, torch.zeros(())) for seed in range(40)]
    values = np.array([share.value for share in shares])
    assert abs(values.mean()) < 2.5 * values.std() / 40**0.5
    assert np.mean([share.value < share.chance for share in shares]) > 0.9
    assert 0.65 < np.mean([share.chance for share in shares]) / (2 * values.std()) < 1.5


def test_calibrate_the_position_task_and_inspect_measure_the_same_share():
    maps = torch.randn(8, ROWS, COLUMNS, DIM) + 2 * torch.randn(ROWS, COLUMNS, DIM)
    sums, task = PositionSums(Windows.whole(), 8), PositionStatistics()
    for group, one in enumerate(maps):
        sums.add(one[None], group)
    task.add(maps)
    groups, weights, variances = sums.of_groups()
    share = position_share(products_of(groups), weights, variances)
    assert share.value == pytest.approx(task.share(), rel=1e-5) == sums.estimate().share


def test_alike_maps_correlate_and_others_are_at_chance():
    pattern, other = torch.randn(2, 1, 6, 6, 8, dtype=torch.float64)
    maps, weights = pattern + 0.3 * torch.randn(8, 6, 6, 8, dtype=torch.float64), torch.full((8,), 1 / 8).double()
    numbers = [
        alikeness(products_of(maps), weights, products_of(maps, one)[:, 0], float(products_of(one)))
        for one in (pattern, other)
    ]
    mean = (maps.mean(0) - maps.mean((0, 1, 2))).ravel()
    for number, one in zip(numbers, (pattern, other)):
        want = np.corrcoef(mean, (one[0] - one.mean((0, 1, 2))).ravel())[0, 1]
        assert number.value == pytest.approx(want, abs=1e-9)
    assert numbers[0].value > 0.9 > numbers[0].chance and abs(numbers[1].value) < 0.2


def test_waves_lie_in_their_band():
    y, x = np.mgrid[:16, :16]
    waves = {"low": np.cos(2 * np.pi * y / 16), "high": np.cos(2 * np.pi * x / 3.2), "patch": (-1.0) ** (x + y)}
    for name, wave in waves.items():
        maps = torch.from_numpy(wave)[None, ..., None] * torch.randn(3).double()
        grid = grid_energy(maps + 0.01 * torch.randn(8, 16, 16, 3), torch.full((8,), 1 / 8).double())
        energy = {name: getattr(grid, name).value for name in waves}
        assert energy["low"] + energy["high"] == pytest.approx(1, abs=0.01)
        assert energy[name] == pytest.approx(1, abs=0.01) and energy["patch"] == pytest.approx(
            float(name == "patch"), abs=0.01
        )
    noise = grid_energy(torch.randn(8, 16, 16, 3).double() + torch.randn(16, 16, 3), torch.full((8,), 1 / 8).double())
    for band in (noise.low, noise.high, noise.patch):
        assert band.value == pytest.approx(band.chance, abs=0.15)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_linear_map_reads_the_place_as_well_as_it_can_be_read(noise):
    # Tokens are the row along one direction and noise along all: R2 is that of least squares with infinite data.
    probe, direction, images = PlaceProbe(), torch.randn(DIM), 40
    rows = torch.linspace(-1, 1, ROWS).view(1, ROWS, 1, 1)
    for image in range(2 * images):
        maps = rows * direction + (noise + 1e-3) * torch.randn(4, ROWS, COLUMNS, DIM)
        probe.add(maps) if image < images else probe.test(maps, image)
    row, column = probe.r2()
    signal = 0.5 * float(direction.square().sum())  # the variance of five rows is a half
    assert abs(row.value - signal / (signal + noise**2)) < 3 * row.error + 0.01
    assert column.value <= column.chance + 0.01 and row.chance < 0.05


def planted(count: int, times: float = 6.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-normal norms (V, H, W) of which `count` of each view's are larger, where content is low; and that content."""
    draw = np.random.default_rng(0)
    norms, content = np.exp(0.1 * draw.standard_normal((32, 14, 14))), draw.random((32, 14, 14))
    mask = np.zeros(norms.shape, bool)
    for view in mask:
        view.flat[draw.choice(196, count, replace=False)] = True
    norms[mask] *= times
    content[mask] /= 4
    return norms, content, mask


@pytest.mark.parametrize("count", [1, 7])
def test_planted_outlier_tokens_are_counted_exactly(count):
    norms, content, mask = planted(count)
    found, places = outliers_of(norms, content, np.arange(32) // 4)
    assert found.count == mask.sum() and found.patches == norms.size and found.share.value == count / 196
    assert found.robust_count - mask.sum() in range(4)  # those that chance would put there
    assert found.ratio == pytest.approx(6, rel=0.1) and np.array_equal(places, mask.mean(0))
    assert (
        found.low_content.value - 2 * found.low_content.error > 0.5 and found.place.value < 3 * found.place.error + 0.02
    )
    assert abs(found.border.value - found.border.chance) < 4 * found.border.error


def test_outliers_that_lie_where_they_lie_are_explained_by_place_and_not_by_content():
    norms, content, _ = planted(0)
    norms[:, 0, :5] *= 8
    found, _ = outliers_of(norms, content, np.arange(32) // 4)
    assert found.place.value == pytest.approx(1, abs=1e-6) and found.border.value == 1 and found.count == 32 * 5
    assert abs(found.low_content.value - 0.5) < 3 * found.low_content.error


def test_norms_of_one_kind_have_no_outliers_whatever_their_spread():
    draw = np.random.default_rng(1)
    for spread in (0.02, 0.1, 0.5):
        norms = np.exp(spread * draw.standard_normal((32, 14, 14)))
        found, _ = outliers_of(norms, norms, np.arange(32))
        assert found.count == 0 and cut_of(norms.ravel()) is None and found.robust_count < 10


def test_of_two_images_no_share_of_the_place_is_told():
    norms, content, _ = planted(3)
    found, _ = outliers_of(norms, content, np.arange(32) // 16)
    assert found.place is None and found.count == 32 * 3 and found.low_content is not None


@pytest.mark.parametrize("images", [4, 6, 30])
def test_norms_are_kept_of_as_many_images_as_there_is_room_for(images, monkeypatch):
    """Whatever the number of images and of views; here there is room for those of 8 canvases of 8 windows."""
    monkeypatch.setattr(counting, "MOST_NORMS", 64)
    model = timm.create_model("test_vit", img_size=32, dynamic_img_size=True).eval()
    count = counting.Count(layer_reader(model, [-1], 8), list(torch.rand(images, 3, 40, 40)), count=max(images, 16))
    count.run(progress=False)
    seen = np.bincount(count.images, minlength=images) // 8
    assert seen.sum() == 8 and (seen > 0).sum() == min(images, 8) and seen.max() <= -(-8 // images)
