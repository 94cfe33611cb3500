"""The neural-field solver against float64 formulas and a scene with a known answer."""

import sys
import types

import numpy as np
import pytest
import torch

import training.field as field_module
from training.field import FieldSettings, fit_field
from training.field_backends import TinyCudaTrainer, TorchTrainer, grid_trainer
from training.field_losses import distance_loss, reconstruction_loss, residual_loss, sparsity_loss
from training.hashgrid import HashGrid, HashGridSettings

SMALL_GRID = HashGridSettings(levels=6, features=4, log2_hashmap_size=12)
C, K = 24, 6


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numpy_distance(prediction, target):
    """Eq. 7 a patch at a time, mean over patches; its gradient by central differences is left to the caller."""
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


def test_distance_is_equation_7_with_its_gradient():
    prediction, target = normal(5, 7).requires_grad_(), normal(5, 7, seed=1)
    loss = distance_loss(prediction, target)
    loss.backward()
    y_hat, y = prediction.detach().numpy(), target.numpy()
    assert abs(loss.item() - numpy_distance(y_hat, y)) < 1e-12
    expected = numeric_gradient(lambda at: numpy_distance(at, y), y_hat)
    np.testing.assert_allclose(prediction.grad.numpy(), expected, atol=1e-8)


def test_distance_of_equal_or_zero_features_has_finite_gradients():
    prediction = torch.stack((torch.ones(4), torch.zeros(4), torch.ones(4))).requires_grad_()
    target = torch.stack((torch.ones(4), torch.ones(4), torch.zeros(4)))
    loss = distance_loss(prediction, target)
    loss.backward()
    # cos = 1, 0, 0 and distance = 0, 2, 2.
    assert abs(loss.item() - (0 + 3 + 3) / 3) < 1e-6
    assert torch.isfinite(prediction.grad).all()


def test_reconstruction_is_equation_6():
    partial, residual, y = normal(5, 7), normal(5, 7, seed=1), normal(5, 7, seed=2)
    a, d, t = partial.numpy(), residual.numpy(), y.numpy()
    unexplained = np.mean([np.sqrt(((t[i] - a[i] - d[i]) ** 2).sum()) for i in range(5)])
    sparsity = np.mean([sum(abs(value) for value in row) for row in d])
    assert abs(residual_loss(residual, y - partial).item() - unexplained) < 1e-12
    assert abs(sparsity_loss(residual).item() - sparsity) < 1e-12
    expected = numpy_distance(a + d, t) + 0.3 * unexplained + 0.7 * sparsity
    assert abs(reconstruction_loss(partial, residual, y, 0.3, 0.7).item() - expected) < 1e-12


def test_gradients_stop_where_the_paper_stops_them():
    partial, residual, y = (normal(5, 7, seed=seed).requires_grad_() for seed in range(3))
    reconstruction_loss(partial, residual, y, alpha=0.3, beta=0.7).backward()
    # y is a constant (Eq. 9).
    assert y.grad is None
    # F learns as if Delta were a constant, from the distance alone: alpha and beta do not matter (Eqs. 8, 9).
    target, delta = y.detach().numpy(), residual.detach().numpy()
    of_partial = numeric_gradient(lambda at: numpy_distance(at + delta, target), partial.detach().numpy())
    np.testing.assert_allclose(partial.grad.numpy(), of_partial, atol=1e-8)
    # h learns from L_residual and L_sparsity alone: the distance through y_hat does not reach it.
    left = target - partial.detach().numpy()

    def of_delta(at):
        return np.mean(0.3 * np.sqrt(((left - at) ** 2).sum(1)) + 0.7 * np.abs(at).sum(1))

    np.testing.assert_allclose(residual.grad.numpy(), numeric_gradient(of_delta, delta), atol=1e-8)
