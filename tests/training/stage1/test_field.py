"""The neural-field solver against float64 formulas and a scene with a known answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import training.stage1.field.fit as field_fit
from training.stage1.field.fit import FieldSettings, Networks, fit_field
from training.stage1.field.hashgrid import HashGridSettings
from training.stage1.field.losses import distance_loss, reconstruction_loss

GRID = HashGridSettings(levels=4, log2_hashmap_size=12)
# Three times the paper's learning rate: few steps have to do.
SETTINGS = FieldSettings(steps=300, batch=256, lr=0.03, grid=GRID)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy_distance(prediction, target):
    """Eq. 7 a patch at a time, averaged over patches."""
    total = 0.0
    for y_hat, y in zip(prediction, target):
        cosine = float(y_hat @ y) / (float(y_hat @ y_hat) ** 0.5 * float(y @ y) ** 0.5)
        total += 1 - cosine + float(((y - y_hat) ** 2).sum()) ** 0.5
    return total / len(prediction)


def numeric_gradient(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        there = at.copy()
        there[place] += step
        back = at.copy()
        back[place] -= step
        gradient[place] = (function(there) - function(back)) / (2 * step)
    return gradient


def numpy_reconstruction(prediction, delta, target, alpha, beta):
    """Eq. 6 averaged over patches, of F + G and Delta (B, C)."""
    left = target - prediction - delta
    terms = alpha * np.sqrt((left**2).sum(1)) + beta * np.abs(delta).sum(1)
    return numpy_distance(prediction + delta, target) + terms.mean()


def test_distance_is_equation_7_with_its_gradient():
    y_hat, y = normal(9, 7).requires_grad_(), normal(9, 7, seed=1)
    loss = distance_loss(y, y_hat)
    loss.backward()
    prediction, target = y_hat.detach().numpy(), y.numpy()
    assert abs(loss.item() - numpy_distance(prediction, target)) < 1e-12
    expected = numeric_gradient(lambda at: numpy_distance(at, target), prediction)
    np.testing.assert_allclose(y_hat.grad.numpy(), expected, atol=1e-8)


def test_reconstruction_is_equation_6_with_gradients_that_stop_where_the_paper_stops_them():
    y, y_hat_prime, delta = (normal(9, 7, seed=seed) for seed in range(3))
    y_hat_prime.requires_grad_()
    delta.requires_grad_()
    loss = reconstruction_loss(y, y_hat_prime, delta, 0.3, 0.7)
    loss.backward()
    target, prediction, residual = (x.detach().numpy() for x in (y, y_hat_prime, delta))
    assert abs(loss.item() - numpy_reconstruction(prediction, residual, target, 0.3, 0.7)) < 1e-12
    # F learns as if Delta were a constant, from the distance alone: alpha and beta do not matter (Eqs. 8, 9).
    of_f = numeric_gradient(lambda at: numpy_distance(at + residual, target), prediction)
    np.testing.assert_allclose(y_hat_prime.grad.numpy(), of_f, atol=1e-8)

    # h learns from L_residual and L_sparsity alone: the distance through y_hat does not reach it.
    def of_delta(at):
        return np.mean(0.3 * np.sqrt(((target - prediction - at) ** 2).sum(1)) + 0.7 * np.abs(at).sum(1))

    np.testing.assert_allclose(delta.grad.numpy(), numeric_gradient(of_delta, residual), atol=1e-8)


def test_equal_or_zero_features_have_finite_gradients():
    y_hat = torch.stack((torch.ones(4), torch.zeros(4), torch.ones(4))).requires_grad_()
    y = torch.stack((torch.ones(4), torch.ones(4), torch.zeros(4)))
    delta = torch.zeros(3, 4, requires_grad=True)
    distance = distance_loss(y, y_hat)
    # cos = 1, 0, 0 and distance = 0, 2, 2.
    assert abs(distance.item() - (0 + 3 + 3) / 3) < 1e-6
    (distance + reconstruction_loss(y, y_hat, delta, 0.1, 0.02)).backward()
    assert torch.isfinite(y_hat.grad).all() and torch.isfinite(delta.grad).all()
    assert not delta.grad[0].any()


class Scene:
    """Views of a smooth known F with a known random G (K, K, C) in each: y = F(coords) + G(patch)."""

    def __init__(self, views=64, k=8, channels=24):
        generator = torch.Generator().manual_seed(0)
        self.k = k
        self.mixing = torch.randn(8, channels, generator=generator) / 2
        artifacts = torch.randn(k, k, channels, generator=generator)
        self.artifacts = artifacts - artifacts.mean(dim=(0, 1))
        centers = (torch.arange(k) + 0.5) / k
        size = 0.3 + 0.4 * torch.rand(views, 1, generator=generator)
        corner = (1 - size) * torch.rand(views, 2, generator=generator)
        xs, ys = (corner[:, axis, None] + size * centers for axis in (0, 1))
        xs[::2] = xs[::2].flip(1)
        self.coords = self._mesh(xs, ys).reshape(-1, 2)
        self.image_coords = self._mesh(centers[None], centers[None])[0]
        self.patches = torch.arange(k * k).repeat(views)
        self.features = self.semantics(self.coords) + self.artifacts.view(k * k, channels)[self.patches]

    @staticmethod
    def _mesh(xs, ys):
        shape = (len(xs), ys.shape[1], xs.shape[1])
        return torch.stack((xs[:, None, :].expand(shape), ys[:, :, None].expand(shape)), dim=-1)

    def semantics(self, coords):
        waves = [torch.sin(2 * torch.pi * n * coords + phase) for n in (1, 2) for phase in (0.0, 1.5)]
        return torch.cat(waves, dim=-1) @ self.mixing

    def fit(self, settings=SETTINGS, **options):
        return fit_field(self.coords, self.patches, self.features, self.k, settings, **options)


@pytest.fixture(scope="module", name="scene")
def fixture_scene():
    return Scene()


def relative_error(found, truth):
    """Norm of the difference over that of the truth, both without their mean over places."""
    found, truth = (x - x.flatten(0, -2).mean(0) for x in (found, truth))
    return ((found - truth).norm() / truth.norm()).item()


def test_known_semantics_and_artifacts_are_recovered(scene):
    result = scene.fit()
    raw = scene.features.view(-1, scene.k, scene.k, scene.features.shape[-1])
    raw_error = relative_error(raw, scene.semantics(scene.coords).view_as(raw))
    truth = scene.semantics(scene.image_coords)
    assert raw_error > 0.9
    assert relative_error(result.semantics(scene.image_coords), truth) < raw_error / 6
    assert result.artifacts.shape == scene.artifacts.shape
    assert relative_error(result.artifacts, scene.artifacts) < 0.2
    assert result.losses[-50:].mean() < result.losses[:10].mean() / 10
    # G has zero mean, and the constant is in F.
    assert result.artifacts.mean(dim=(0, 1)).abs().max() < 1e-6
    fitted = result.semantics(scene.coords) + result.artifacts.flatten(0, 1)[scene.patches]
    assert (fitted - scene.features).norm() < 0.1 * scene.features.norm()


def test_residual_is_the_outliers_that_neither_place_explains_and_zero_elsewhere():
    scene = Scene(views=128, channels=64)
    outliers = torch.rand(len(scene.features), generator=torch.Generator().manual_seed(3)) < 0.1
    scene.features[outliers, 5] += 20
    # A grid too coarse to learn single outliers by heart.
    result = scene.fit(FieldSettings(steps=400, batch=256, grid=HashGridSettings(levels=3)))
    delta = result.residual(scene.features)
    assert delta.shape == scene.features.shape
    assert abs(delta[outliers, 5].mean().item() - 20) < 1
    assert delta[outliers].norm(dim=-1).mean() < 21
    assert delta[~outliers].norm(dim=-1).mean() < 0.1
    assert relative_error(result.semantics(scene.image_coords), scene.semantics(scene.image_coords)) < 0.2


def test_same_seed_same_result_and_another_seed_another(scene):
    short = FieldSettings(steps=10, batch=64, grid=GRID)
    state = torch.get_rng_state()
    one, two, other = (scene.fit(short, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.losses, two.losses)
    assert torch.equal(one.artifacts, two.artifacts)
    assert torch.equal(one.semantics(scene.image_coords), two.semantics(scene.image_coords))
    assert not torch.equal(one.losses, other.losses)


def test_each_phase_moves_what_the_paper_trains_while_the_learning_rate_falls_linearly(scene, monkeypatch):
    networks, rates, moved = [], [], []

    class Watched(Networks):
        def __init__(self, *given):
            super().__init__(*given)
            networks.append(self)

    def watched_step(optimizer, step=torch.optim.Adam.step):
        before = {name: value.detach().clone() for name, value in networks[0].named_parameters()}
        step(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
        after = networks[0].named_parameters()
        moved.append({name.split(".")[0] for name, value in after if not torch.equal(value, before[name])})

    monkeypatch.setattr(field_fit, "Networks", Watched)
    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    scene.fit(FieldSettings(steps=5, batch=64, grid=GRID))
    first, second = {"encoding", "mlp", "artifacts"}, {"encoding", "mlp", "residual"}
    assert moved == [first] * 2 + [second] * 3
    assert rates == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])


def test_alpha_and_beta_matter_in_the_second_phase_alone(scene):
    short = FieldSettings(steps=10, batch=64, grid=GRID)
    paper, without_h = scene.fit(short), scene.fit(replace(short, alpha=0, beta=0))
    assert torch.equal(paper.losses[:5], without_h.losses[:5])
    assert (paper.losses[5:] > without_h.losses[5:]).all()
    assert torch.equal(paper.artifacts, without_h.artifacts)
    assert paper.residual(scene.features).any() and not without_h.residual(scene.features).any()


def test_networks_have_the_papers_widths():
    networks = Networks(24, 64, FieldSettings(grid=HashGridSettings(log2_hashmap_size=8)), torch.device("cpu"))
    for mlp, widths in ((networks.mlp, (128, 12, 24)), (networks.residual, (24, 6, 6, 24))):
        assert [tuple(layer.weight.shape) for layer in mlp[::2]] == list(zip(widths[1:], widths))
    paper = FieldSettings()
    assert (paper.steps, paper.batch, paper.lr, paper.alpha, paper.beta) == (20_000, 2048, 0.01, 0.1, 0.02)


def test_half_precision_features_are_taken(scene):
    steps = []
    settings = FieldSettings(steps=60, batch=64, grid=GRID)
    coords, features = scene.coords.double(), scene.features.bfloat16()
    result = fit_field(coords, scene.patches, features, scene.k, settings, progress=steps.append)
    assert result.artifacts.shape == (8, 8, 24)
    assert result.semantics(scene.image_coords).dtype == torch.float32
    assert result.semantics(torch.tensor([0.5, 1.0])).shape == (24,)
    assert sum(steps) == len(result.losses) == 60


@pytest.mark.parametrize("name, value, least", [("steps", 1, 2), ("batch", 0, 1), ("lr", float("nan"), 0)])
def test_a_number_that_cannot_be_is_named(name, value, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
        FieldSettings(**{name: value})


@pytest.mark.parametrize("name", ["recipe", "backend"])
def test_a_choice_that_is_none_is_named(name, scene):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 'other'"):
        scene.fit(FieldSettings(**{name: "other"}))


def test_non_finite_features_stop_the_fit(scene):
    features = scene.features.clone()
    features[7] = float("nan")
    with pytest.raises(FloatingPointError, match="features"):
        fit_field(scene.coords, scene.patches, features, scene.k, SETTINGS)
