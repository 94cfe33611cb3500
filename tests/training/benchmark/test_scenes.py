"""The synthetic scenes are what they say, and the benchmark runs on them."""

import math

import pytest
import torch

from training.benchmark import stage1
from training.benchmark._scenes import REGIMES, Regime, Scene, relative_error
from training.common.views import view_axes


@pytest.mark.parametrize("name", [name for name, regime in REGIMES.items() if regime.grid == 14])
def test_a_scenes_parts_have_their_sizes(name):
    regime = REGIMES[name]
    scene = Scene(regime)
    assert float(scene.artifacts.mean((0, 1)).abs().max()) < 1e-5
    size = regime.artifact_size if regime.artifacts != "none" else 0.0
    assert float(scene.artifacts.square().mean().sqrt()) == pytest.approx(size, rel=1e-4)
    semantics = scene.semantics(scene.centers, scene.centers)
    assert 0.6 < float(semantics.square().mean().sqrt()) < 1.4


def test_views_show_f_at_their_coordinates_and_g_at_their_patches():
    scene = Scene(Regime(noise=0.0, residual=0.0, grid=6, channels=8))
    views = scene.views(4)
    xs, ys = view_axes(views, scene.centers)
    for index in range(4):
        expected = scene.semantics(xs[index], ys[index]) + scene.artifacts
        torch.testing.assert_close(scene.view(views, index), expected)
    swapped = scene.semantics(ys[1], xs[1]).transpose(0, 1)
    assert relative_error(scene.semantics(xs[1], ys[1]), swapped) > 0.1


def test_noise_and_outliers_are_as_many_as_asked_for():
    still = Scene(Regime(noise=0.0, residual=0.0, grid=20, channels=16))
    loud = Scene(Regime(noise=0.5, residual=0.0, outliers=0.05, outlier_size=50.0, grid=20, channels=16))
    views = still.views(10)
    difference = torch.stack([loud.view(views, v) - still.view(views, v) for v in range(10)])
    struck = difference.norm(dim=-1) > 40
    assert float(struck.double().mean()) == pytest.approx(0.05, abs=0.01)
    assert float(difference[~struck].std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(loud.view(views, 3), loud.view(views, 3))


def test_the_error_ignores_constants_and_nothing_else():
    truth = torch.randn(5, 5, 3)
    assert relative_error(truth + torch.randn(3), truth) < 1e-6
    assert relative_error(torch.zeros(5, 5, 3), truth) == pytest.approx(1)
    assert relative_error(1.5 * truth, truth) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_benchmark_measures_each_method():
    results = {m: stage1.measure(m, "smooth, low", 12, 0, 20) for m in ("raw", "average", "linear", "field")}
    assert results["linear"].semantics < results["average"].semantics < results["raw"].semantics
    assert all(math.isfinite(r.semantics) and r.seconds >= 0 for r in results.values())
    assert results["linear"].cosine > 0.99
