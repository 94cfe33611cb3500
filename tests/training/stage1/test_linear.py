"""The linear solver against dense float64 algebra, and on scenes whose answer is known."""

import math

import numpy as np
import pytest
import torch

from training.benchmark._scenes import Regime, Scene, relative_error
from training.common.views import Views, patch_centers, sample_views, view_axes, whole_view
from training.stage1.conditioning import IllConditioned, check_views
from training.stage1.linear.banded import BandedFactor, roughness, roughness_diagonals, roughness_probes
from training.stage1.linear.evidence import Strengths, factorise, solve
from training.stage1.linear.normal_equations import NormalEquations, interpolate
from training.stage1.linear.solver import LinearSettings, LinearSolver

GRID, NODES, CHANNELS = 4, 7, 3


def weights_along(x: float, nodes: int) -> np.ndarray:
    """Linear interpolation between nodes at (a + 1/2) / nodes, written as hat functions."""
    place = min(max(x * nodes - 0.5, 0.0), nodes - 1.0)
    return np.maximum(0, 1 - np.abs(place - np.arange(nodes)))


def dense_of(diagonals: torch.Tensor, nodes: int) -> np.ndarray:
    """The matrix whose entry (n, 5 * (dy + 2) + dx + 2) of `diagonals` couples n with n + dy * nodes + dx."""
    dense = np.zeros((nodes**2, nodes**2))
    for (n, index), value in np.ndenumerate(diagonals.numpy()):
        if value:
            dense[n, n + (index // 5 - 2) * nodes + index % 5 - 2] = value
    return dense


def rough_rows(nodes: int) -> np.ndarray:
    """Rows Q with Q'Q = R: every second difference of a grid of nodes, the mixed ones times sqrt 2."""
    index = np.arange(nodes * nodes).reshape(nodes, nodes)
    rows = []

    def row(places, values):
        line = np.zeros(nodes * nodes)
        line[places] = values
        rows.append(line)

    for a in range(nodes):
        for b in range(nodes - 2):
            row([index[a, b], index[a, b + 1], index[a, b + 2]], [1, -2, 1])
            row([index[b, a], index[b + 1, a], index[b + 2, a]], [1, -2, 1])
    for a in range(nodes - 1):
        for b in range(nodes - 1):
            corners = [index[a, b], index[a, b + 1], index[a + 1, b], index[a + 1, b + 1]]
            row(corners, math.sqrt(2) * np.array([1, -1, -1, 1]))
    return np.array(rows)


@pytest.fixture(scope="module")
def problem():
    """Views of random features: the equations, and the same as one explicit weighted design matrix."""
    views = sample_views(9, (400, 300), seed=5)
    xs, ys = view_axes(views, patch_centers(64, 16, 16))
    draw = torch.Generator().manual_seed(0)
    equations = NormalEquations(NODES, GRID, CHANNELS)
    rows, targets = [], []
    for v in range(len(views)):
        features = torch.randn(GRID, GRID, CHANNELS, generator=draw)
        weights = torch.rand(GRID, GRID, generator=draw)
        equations.add(xs[v], ys[v], features, weights)
        for i in range(GRID):
            for j in range(GRID):
                f = np.outer(weights_along(float(ys[v, i]), NODES), weights_along(float(xs[v, j]), NODES))
                g = np.eye(GRID * GRID)[i * GRID + j]
                root = math.sqrt(float(weights[i, j]))
                rows.append(root * np.concatenate([f.ravel(), g]))
                targets.append(root * features[i, j].double().numpy())
    return equations, np.array(rows), np.array(targets)


def test_sums_are_those_of_the_explicit_matrix(problem):
    equations, design, target = problem
    nodes = NODES * NODES
    gram, right = design.T @ design, design.T @ target
    np.testing.assert_allclose(dense_of(equations.ff, NODES), gram[:nodes, :nodes], atol=1e-12)
    np.testing.assert_allclose(equations.fg, gram[:nodes, nodes:], atol=1e-12)
    np.testing.assert_allclose(torch.diag(equations.gg), gram[nodes:, nodes:], atol=1e-12)
    np.testing.assert_allclose(equations.fy, right[:nodes], atol=2e-6)  # products in float32
    np.testing.assert_allclose(equations.gy, right[nodes:], atol=2e-6)
    assert equations.yy == pytest.approx((target**2).sum(), rel=1e-6)


@pytest.mark.parametrize("smooth, ridge", [(1.0, 1.0), (1e-4, 1e-3), (300.0, 0.1), (0.1, 500.0)])
def test_the_solution_is_that_of_dense_least_squares(problem, smooth, ridge):
    equations, design, target = problem
    penalties = [
        np.hstack([math.sqrt(smooth) * rough_rows(NODES), np.zeros((len(rough_rows(NODES)), GRID * GRID))]),
        np.hstack([np.zeros((GRID * GRID, NODES * NODES)), math.sqrt(ridge) * np.eye(GRID * GRID)]),
    ]
    stacked = np.vstack([design, *penalties])
    zeros = np.zeros((len(stacked) - len(design), CHANNELS))
    expected = np.linalg.lstsq(stacked, np.vstack([target, zeros]), rcond=None)[0]
    solution = solve(equations, factorise(equations, Strengths(smooth, ridge)))
    np.testing.assert_allclose(solution.semantics, expected[: NODES * NODES], atol=1e-4)
    np.testing.assert_allclose(solution.artifacts, expected[NODES * NODES :], atol=1e-4)


def test_freedoms_and_noise_are_those_of_dense_algebra(problem):
    equations, design, target = problem
    smooth, ridge = 0.3, 2.0
    rows, nodes = rough_rows(NODES), NODES * NODES
    penalty = np.zeros((design.shape[1], design.shape[1]))
    penalty[:nodes, :nodes] = smooth * rows.T @ rows
    penalty[nodes:, nodes:] = ridge * np.eye(GRID * GRID)
    inverse = np.linalg.inv(design.T @ design + penalty)
    determined = np.eye(len(inverse)) - inverse @ penalty
    solution = solve(equations, factorise(equations, Strengths(smooth, ridge)))
    assert solution.factors.artifact_freedom == pytest.approx(np.trace(determined[nodes:, nodes:]), rel=1e-6)
    assert solution.factors.semantic_freedom == pytest.approx(np.trace(determined[:nodes, :nodes]), rel=0.1)
    fitted = np.vstack([solution.semantics, solution.artifacts])
    misfit = ((target - design @ fitted) ** 2).sum()
    left = equations.weight - solution.factors.semantic_freedom - solution.factors.artifact_freedom
    assert solution.noise == pytest.approx(misfit / left / CHANNELS, rel=1e-5)


def test_the_chosen_strengths_maximize_the_evidence():
    scene = Scene(Regime("smooth", "high", noise=0.5, residual=0.0, grid=GRID, channels=40), seed=1)
    views = scene.views(12)
    xs, ys = view_axes(views, scene.centers)
    equations, rows, targets = NormalEquations(NODES, GRID, 40), [], []
    for v in range(len(views)):
        features = scene.view(views, v)
        equations.add(xs[v], ys[v], features, torch.ones(GRID, GRID))
        for i in range(GRID):
            for j in range(GRID):
                f = np.outer(weights_along(float(ys[v, i]), NODES), weights_along(float(xs[v, j]), NODES))
                rows.append(np.concatenate([f.ravel(), np.eye(GRID * GRID)[i * GRID + j]]))
                targets.append(features[i, j].double().numpy())
    design, target = np.array(rows), np.array(targets)
    strengths = Strengths()
    for _ in range(60):
        strengths = solve(equations, factorise(equations, strengths)).strengths
    rough = rough_rows(NODES).T @ rough_rows(NODES)

    def evidence(smooth, ridge):
        """Twice the log evidence, dense, noise maximized out; constants and ramps have a wide prior."""
        precision = np.zeros((design.shape[1], design.shape[1]))
        precision[: NODES**2, : NODES**2] = smooth * rough + 1e-9 * np.eye(NODES**2)
        precision[NODES**2 :, NODES**2 :] = ridge * np.eye(GRID**2)
        system = design.T @ design + precision
        right = design.T @ target
        quadratic = (target**2).sum() - (right * np.linalg.solve(system, right)).sum()
        count = (len(design) - 3) * 40
        prior = (NODES**2 - 3) * math.log(smooth) + GRID**2 * math.log(ridge)
        return 40 * (prior - np.linalg.slogdet(system)[1]) - count * math.log(quadratic)

    best = evidence(strengths.smoothness, strengths.artifacts)
    for factor in (0.6, 1.6):
        assert evidence(strengths.smoothness * factor, strengths.artifacts) < best
        assert evidence(strengths.smoothness, strengths.artifacts * factor) < best


@pytest.mark.parametrize("nodes", [4, 5, 8])
def test_the_banded_factor_is_a_cholesky_factor(nodes):
    diagonals = roughness_diagonals(nodes).clone()
    diagonals[:, 12] += 0.5
    dense = rough_rows(nodes).T @ rough_rows(nodes) + 0.5 * np.eye(nodes**2)
    right = torch.randn(nodes**2, 3, dtype=torch.float64)
    factor = BandedFactor(diagonals, nodes)
    np.testing.assert_allclose(dense_of(diagonals, nodes), dense, atol=1e-12)
    rough = np.linalg.norm(rough_rows(nodes) @ right.numpy()) ** 2
    assert roughness(right, nodes) == pytest.approx(rough, rel=1e-12)
    np.testing.assert_allclose(factor.forward(right), np.linalg.solve(np.linalg.cholesky(dense), right))
    np.testing.assert_allclose(factor.backward(factor.forward(right)), np.linalg.solve(dense, right))


def test_probes_have_the_roughness_as_their_covariance():
    probes = roughness_probes(5, 40_000).numpy()
    expected = rough_rows(5).T @ rough_rows(5)
    np.testing.assert_allclose(probes @ probes.T / 40_000, expected, atol=0.25)


def test_interpolation_reads_the_nodes():
    nodal = torch.randn(NODES, NODES, 2, dtype=torch.float64)
    xs, ys = torch.tensor([0.3, 0.01, 0.99]).double(), torch.tensor([0.5, 0.77]).double()
    for i, y in enumerate(ys.tolist()):
        for j, x in enumerate(xs.tolist()):
            expected = np.einsum("a,b,abc->c", weights_along(y, NODES), weights_along(x, NODES), nodal)
            np.testing.assert_allclose(interpolate(nodal, xs, ys)[i, j], expected, atol=1e-12)


def run(regime: Regime, count: int = 32, seed: int = 0, **settings):
    """(raw error, F error, G error or norm, fit) of the solver on a scene."""
    scene = Scene(regime, seed)
    views = scene.views(count)
    xs, ys = view_axes(views, scene.centers)
    solver = LinearSolver(regime.grid, regime.channels, LinearSettings(**settings))
    for v in range(count):
        solver.add(xs[v], ys[v], scene.view(views, v))
        assert len(solver._buffer) <= solver.settings.first_views
    assert count < 16 or not solver._buffer
    fit = solver.solve()
    truth = scene.semantics(scene.centers, scene.centers)
    semantics = fit.semantics(scene.centers, scene.centers)
    known = regime.artifacts != "none"
    artifacts = relative_error(fit.artifacts, scene.artifacts) if known else float(fit.artifacts.norm())
    raw = relative_error(scene.view(views, 0), truth)
    return raw, relative_error(semantics, truth), artifacts, fit


@pytest.mark.parametrize("semantics", ["smooth", "blobby"])
@pytest.mark.parametrize("artifacts", ["low", "high", "border"])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_f_is_five_times_better_than_raw(semantics, artifacts, noise):
    regime = Regime(semantics, artifacts, noise=noise, outliers=0.02, grid=10, channels=32)
    raw, error, artifact_error, fit = run(regime, 64)
    assert raw > 5 * error
    assert artifact_error < 0.25
    assert float(fit.artifacts.mean((0, 1)).abs().max()) < 1e-5


@pytest.mark.parametrize("count", [8, 16, 40])
@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0])
def test_without_artifacts_f_is_as_good_as_the_view_average(count, noise):
    regime = Regime("blobby", "none", noise=noise, residual=0.0, grid=8, channels=32)
    assert run(regime, count)[1] < 1.02 * run(regime, count, artifacts=False)[1] + 1e-3


def test_sums_of_a_sketch_are_those_of_the_sketched_features():
    views = sample_views(5, (400, 300), seed=5)
    xs, ys = view_axes(views, patch_centers(64, 16, 16))
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(CHANNELS, 2, generator=draw)
    whole, expected = NormalEquations(NODES, GRID, CHANNELS), NormalEquations(NODES, GRID, 2)
    for v in range(len(views)):
        features = torch.randn(GRID, GRID, CHANNELS, generator=draw)
        weights = torch.rand(GRID, GRID, generator=draw)
        whole.add(xs[v], ys[v], features, weights, features @ mixing)
        expected.add(xs[v], ys[v], features @ mixing, weights)
    sketched = whole.sketched(mixing)
    for name in ("ff", "fg", "gg", "fy", "gy"):
        torch.testing.assert_close(getattr(sketched, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert sketched.yy == pytest.approx(expected.yy, rel=1e-6) and sketched.weight == whole.weight
    assert sketched.channels == 2 and whole.channels == CHANNELS


@pytest.mark.parametrize("outlier_size", [6.0, 50.0])
def test_a_sketch_of_the_channels_costs_no_accuracy(monkeypatch, outlier_size):
    regime = Regime("blobby", "high", grid=8, channels=256, outliers=0.05, outlier_size=outlier_size)
    monkeypatch.setattr("training.stage1.linear.solver.SKETCH", 256)
    _, error, artifact_error, fit = run(regime, 40)
    monkeypatch.setattr("training.stage1.linear.solver.SKETCH", 96)
    _, sketched_error, sketched_artifact_error, sketched = run(regime, 40)
    assert not torch.equal(fit.nodal, sketched.nodal)
    assert sketched_error < 1.02 * error and sketched_artifact_error < 1.02 * artifact_error
    assert abs(sketched.diagnostics["outlier_share"] - fit.diagnostics["outlier_share"]) < 0.005


def test_large_outliers_cost_little():
    clean = Regime("blobby", "high", grid=8, channels=32)
    struck = Regime("blobby", "high", grid=8, channels=32, outliers=0.05, outlier_size=50.0)
    _, error, artifact_error, fit = run(struck, 64)
    _, clean_error, clean_artifact_error, _ = run(clean, 64)
    assert error < 1.2 * clean_error and artifact_error < 1.2 * clean_artifact_error
    assert abs(fit.diagnostics["outlier_share"] - 0.05) < 0.01
    assert run(struck, 64, outlier=math.inf)[1] > 3 * error


def test_more_views_are_better():
    regime = Regime("smooth", "low", noise=0.8, grid=8, channels=32)
    errors = [run(regime, count)[1] for count in (8, 32, 128)]
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def axes(boxes, flips=None):
    boxes = torch.tensor(boxes, dtype=torch.float64)
    flips = torch.zeros(len(boxes), dtype=torch.bool) if flips is None else torch.tensor(flips)
    return view_axes(Views(boxes, flips), patch_centers(64, 16, 16))


def test_equal_crops_are_refused_with_what_to_change():
    with pytest.raises(IllConditioned, match="1 different crop: .* use more views"):
        check_views(*axes([[0.1, 0.1, 0.6, 0.6]] * 20, [i % 2 == 0 for i in range(20)]))


def test_few_views_and_a_single_scale_warn():
    with pytest.warns(UserWarning, match="only 4 different crops"):
        check_views(*axes([[0, 0, 1, 1], [0, 0, 0.5, 0.4], [0.3, 0.3, 0.9, 0.7], [0.1, 0.2, 0.5, 0.6]]))
    one_size = sample_views(20, (500, 500), area=(0.25, 0.25), aspect=(1, 1))
    boxes = torch.cat([whole_view().boxes, one_size.boxes]).tolist()
    with pytest.warns(UserWarning, match="all crops have the same size"):
        check_views(*axes(boxes))


def test_views_that_hardly_separate_f_and_g_warn_at_the_solution():
    solver = LinearSolver(GRID, CHANNELS)
    box = [0.2, 0.2, 0.7, 0.7]
    xs, ys = axes([box] * 12)
    draw = torch.Generator().manual_seed(0)
    same = torch.randn(GRID, GRID, CHANNELS, generator=draw)
    for v in range(12):
        solver.add(xs[v], ys[v], same + 0.1 * torch.randn(same.shape, generator=draw))
    with pytest.warns(UserWarning) as caught:
        fit = solver.solve()
    assert any("hardly told apart" in str(w.message) for w in caught)
    assert any("of the image" in str(w.message) for w in caught)
    assert fit.diagnostics["separation"] < 0.05 and fit.diagnostics["unseen"] > 0.25


def test_solving_without_views_is_an_error():
    with pytest.raises(IllConditioned, match="no views"):
        LinearSolver(GRID, CHANNELS).solve()
