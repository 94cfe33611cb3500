"""The neural-field solver against float64 formulas and a scene with a known answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import training.stage1.field.field as field_module
import training.stage1.field.losses as field_losses
from training.stage1.field.field import FieldSettings, fit_field
from training.stage1.field.hashgrid import HashGridSettings
from training.stage1.field.losses import distance_loss, reconstruction_loss

GRID = HashGridSettings(levels=4, log2_hashmap_size=12)
SETTINGS = FieldSettings(steps=600, batch=512, grid=GRID)


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


def parts_of_a_batch(count=9, positions=4, channels=7):
    """F, G, Delta (float64), the patches' places and y: some places several times, one not at all."""
    semantics, residual, y = (normal(count, channels, seed=seed) for seed in range(3))
    patches = torch.randint(positions - 1, (count,), generator=torch.Generator().manual_seed(4))
    return semantics, normal(positions, channels, seed=3), residual, patches, y


@pytest.fixture(name="block", params=[512, 4])
def fixture_block(request, monkeypatch):
    """The losses take a batch whole, and in blocks of which the last is not full."""
    monkeypatch.setattr(field_losses, "BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_distance_is_equation_7_with_its_gradients():
    semantics, artifacts, _, patches, y = parts_of_a_batch()
    loss = distance_loss(semantics, artifacts, patches, y)
    f, g, target = semantics.numpy(), artifacts.numpy(), y.numpy()
    assert abs(loss.value.item() - numpy_distance(f + g[patches], target)) < 1e-12
    of_f = numeric_gradient(lambda at: numpy_distance(at + g[patches], target), f)
    np.testing.assert_allclose(loss.semantics.numpy(), of_f, atol=1e-8)
    of_g = numeric_gradient(lambda at: numpy_distance(f + at[patches], target), g)
    np.testing.assert_allclose(loss.artifacts.numpy(), of_g, atol=1e-8)
    assert loss.artifacts[:3].any() and not loss.artifacts[3].any()
    assert loss.residual is None


def test_distance_of_equal_or_zero_features_has_finite_gradients():
    prediction = torch.stack((torch.ones(4), torch.zeros(4), torch.ones(4)))
    target = torch.stack((torch.ones(4), torch.ones(4), torch.zeros(4)))
    loss = distance_loss(prediction, torch.zeros(1, 4), torch.zeros(3, dtype=torch.int64), target)
    # cos = 1, 0, 0 and distance = 0, 2, 2.
    assert abs(loss.value.item() - (0 + 3 + 3) / 3) < 1e-6
    assert torch.isfinite(loss.semantics).all() and torch.isfinite(loss.artifacts).all()


@pytest.mark.usefixtures("block")
def test_reconstruction_is_equation_6_with_gradients_that_stop_where_the_paper_stops_them():
    semantics, artifacts, residual, patches, y = parts_of_a_batch()
    loss = reconstruction_loss(semantics, artifacts, residual, patches, y, 0.3, 0.7)
    f, g, delta, target = semantics.numpy(), artifacts.numpy()[patches], residual.numpy(), y.numpy()
    assert abs(loss.value.item() - numpy_reconstruction(f + g, delta, target, 0.3, 0.7)) < 1e-12
    # F learns as if Delta were a constant, from the distance alone: alpha and beta do not matter (Eqs. 8, 9).
    of_f = numeric_gradient(lambda at: numpy_distance(at + g + delta, target), f)
    np.testing.assert_allclose(loss.semantics.numpy(), of_f, atol=1e-8)
    # h learns from L_residual and L_sparsity alone: the distance through y_hat does not reach it.
    left = target - f - g

    def of_delta(at):
        return np.mean(0.3 * np.sqrt(((left - at) ** 2).sum(1)) + 0.7 * np.abs(at).sum(1))

    np.testing.assert_allclose(loss.residual.numpy(), numeric_gradient(of_delta, delta), atol=1e-8)
    assert loss.artifacts is None


def test_reconstruction_where_delta_explains_all_has_finite_gradients():
    ones, zeros, patches = torch.ones(2, 4), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    loss = reconstruction_loss(ones, torch.zeros(1, 4), zeros, patches, ones)
    assert abs(loss.value.item()) < 1e-6
    assert torch.isfinite(loss.semantics).all() and not loss.residual.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_have_the_type_of_what_they_are_of(dtype):
    """The MLPs' outputs are bfloat16 under autocast; G and y are not."""
    semantics, artifacts, residual, patches, y = (
        x.float() if x.is_floating_point() else x for x in parts_of_a_batch()
    )
    semantics, residual = semantics.to(dtype), residual.to(dtype)
    loss = reconstruction_loss(semantics, artifacts, residual, patches, y)
    assert loss.semantics.dtype == loss.residual.dtype == dtype and loss.value.dtype == torch.float32
    doubles = (x.double() if x.is_floating_point() else x for x in (semantics, artifacts, residual, patches, y))
    exact = reconstruction_loss(*doubles)
    for found, expected in ((loss.semantics, exact.semantics), (loss.residual, exact.residual)):
        torch.testing.assert_close(found, expected.to(dtype))


class Scene:
    """Views of a smooth known F with a known random G (K, K, C) in each: y = F(coords) + G(patch)."""

    def __init__(self, views=64, k=8, channels=24):
        generator = torch.Generator().manual_seed(0)
        self.k = k
        self.mixing = torch.randn(8, channels, generator=generator) / 2
        artifacts = torch.randn(k, k, channels, generator=generator)
        self.artifacts = artifacts - artifacts.mean(dim=(0, 1))
        centres = (torch.arange(k) + 0.5) / k
        size = 0.3 + 0.4 * torch.rand(views, 1, generator=generator)
        corner = (1 - size) * torch.rand(views, 2, generator=generator)
        xs, ys = (corner[:, axis, None] + size * centres for axis in (0, 1))
        xs[::2] = xs[::2].flip(1)
        self.coords = self._mesh(xs, ys).reshape(-1, 2)
        self.image_coords = self._mesh(centres[None], centres[None])[0]
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
    assert relative_error(result.artifacts, scene.artifacts) < 0.2
    together = torch.stack((result.artifacts.flatten(), scene.artifacts.flatten()))
    assert torch.corrcoef(together)[0, 1] > 0.98
    assert result.losses[-50:].mean() < result.losses[:10].mean() / 10


def test_artifacts_have_zero_mean_and_the_constant_is_in_the_semantics(scene):
    result = scene.fit()
    assert result.artifacts.shape == scene.artifacts.shape
    assert result.artifacts.mean(dim=(0, 1)).abs().max() < 1e-6
    fitted = result.semantics(scene.coords) + result.artifacts.flatten(0, 1)[scene.patches]
    assert (fitted - scene.features).norm() < 0.1 * scene.features.norm()


def test_residual_is_the_outliers_that_neither_place_explains_and_zero_elsewhere():
    scene = Scene(views=128, channels=64)
    outliers = torch.rand(len(scene.features), generator=torch.Generator().manual_seed(3)) < 0.1
    scene.features[outliers, 5] += 20
    # A grid too coarse to learn single outliers by heart.
    result = scene.fit(FieldSettings(steps=600, batch=512, grid=HashGridSettings(levels=3)))
    delta = result.residual(scene.features)
    assert delta.shape == scene.features.shape
    assert abs(delta[outliers, 5].mean().item() - 20) < 0.5
    assert delta[outliers].norm(dim=-1).mean() < 20.5
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


def test_second_phase_trains_f_and_h_and_leaves_g(scene, monkeypatch):
    short = FieldSettings(steps=10, batch=64, grid=GRID)
    paper = scene.fit(short)

    def patched(of_semantics, of_residual):
        def loss(semantics, artifacts, residual, *_):
            ones = torch.ones_like(semantics)
            return field_losses.Loss(semantics.sum(), of_semantics * ones, None, of_residual * ones)

        monkeypatch.setattr(field_module, "reconstruction_loss", loss)
        return scene.fit(short)

    without_h, without_f = patched(1, 0), patched(0, 1)
    at = scene.image_coords
    assert torch.equal(paper.losses[:5], without_h.losses[:5])
    assert torch.equal(paper.artifacts, without_h.artifacts)
    assert torch.equal(paper.artifacts, without_f.artifacts)
    assert not torch.allclose(paper.semantics(at), without_h.semantics(at))
    assert not without_h.residual(scene.features).any()
    assert paper.residual(scene.features).any()


def test_first_phase_uses_the_distance_alone_and_half_of_the_steps(scene, monkeypatch):
    calls = []
    for name in ("distance_loss", "reconstruction_loss"):
        loss = getattr(field_module, name)

        def spy(*given, loss=loss, name=name):
            calls.append(name)
            return loss(*given)

        monkeypatch.setattr(field_module, name, spy)
    scene.fit(FieldSettings(steps=7, batch=64, grid=GRID))
    assert calls == ["distance_loss"] * 3 + ["reconstruction_loss"] * 4


def test_bfloat16_products_end_at_the_error_of_float32(scene):
    """Over three seeds: a seed alone moves the error of F by a tenth."""
    errors = {"float32": [], "bfloat16": []}
    for precision, found in errors.items():
        for seed in range(3):
            result = scene.fit(replace(SETTINGS, precision=precision), seed=seed)
            semantics = result.semantics(scene.image_coords)
            assert semantics.dtype == result.artifacts.dtype == torch.float32
            of_f = relative_error(semantics, scene.semantics(scene.image_coords))
            found.append((of_f, relative_error(result.artifacts, scene.artifacts)))
    assert errors["bfloat16"] != errors["float32"]
    np.testing.assert_allclose(*(np.mean(found, axis=0) for found in errors.values()), rtol=0.1)


def test_networks_have_the_papers_widths(scene):
    result = scene.fit(FieldSettings(steps=2, batch=8))
    shapes = {name: tuple(value.shape) for name, value in result.mlp.named_parameters()}
    assert shapes == {"0.weight": (12, 128), "0.bias": (12,), "2.weight": (24, 12), "2.bias": (24,)}
    weights = [tuple(value.shape) for value in result.residual_mlp.parameters() if value.ndim == 2]
    assert weights == [(6, 24), (6, 6), (24, 6)]
    paper = FieldSettings()
    assert (paper.steps, paper.batch, paper.lr, paper.alpha, paper.beta) == (20_000, 2048, 0.01, 0.1, 0.02)


def test_learning_rate_falls_linearly_to_zero(scene, monkeypatch):
    """Of both: the networks' optimiser and that of the grid's coarse levels, one after the other."""
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)
    )
    scene.fit(FieldSettings(steps=4, batch=8, grid=GRID))
    assert rates[::2] == rates[1::2] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_half_precision_features_and_uneven_grids_are_taken(scene):
    steps = []
    settings = FieldSettings(steps=120, batch=64, grid=GRID)
    coords, features = scene.coords.double(), scene.features.bfloat16()
    result = fit_field(coords, scene.patches, features, (4, 16), settings, progress=steps.append)
    assert result.artifacts.shape == (4, 16, 24)
    assert result.semantics(scene.image_coords).dtype == torch.float32
    assert result.semantics(torch.tensor([0.5, 1.0])).shape == (24,)
    assert sum(steps) == 120 and len(result.losses) == 120


def test_arguments_that_do_not_fit_are_named(scene):
    coords, patches, features = scene.coords, scene.patches, scene.features
    for given, message in (
        ((coords[:-1], patches, features, 8), "coords"),
        ((coords * 1.5, patches, features, 8), "coords must lie in"),
        ((coords, patches.int(), features, 8), "patches"),
        ((coords, patches, features, 7), "patches must lie in 0 to 48"),
        ((coords, patches, features[None], 8), "features"),
        ((coords, patches, features, 8, FieldSettings(steps=1)), "steps must be at least 2, got 1"),
        ((coords, patches, features, 8, FieldSettings(precision="half")), "precision must be one of auto, float32"),
        ((coords, patches, features, 8, FieldSettings(backend="cuda")), "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_field(*given)


def test_non_finite_features_stop_the_fit(scene):
    features = scene.features.clone()
    features[7] = float("nan")
    with pytest.raises(FloatingPointError, match="features"):
        fit_field(scene.coords, scene.patches, features, scene.k, SETTINGS)
