"""Solves the summed normal equations of F and G, and chooses both regularisation strengths from the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.sums import Sums


@dataclass(frozen=True)
class Strengths:
    """Penalties, in units of the noise variance: smoothness * |second differences of F|^2 + artifacts * |G|^2."""

    smoothness: float = 1.0
    artifacts: float = 1.0


@dataclass
class Solution:
    """F (M * M, C) and G (K * K, C) in float64 for one pair of strengths, and the strengths the data ask for.

    `noise` is the noise variance a token and channel; `semantic_freedom` and `artifact_freedom` are the numbers
    of parameters of F and G that the data, not the penalties, determine.
    """

    semantics: Tensor
    artifacts: Tensor
    noise: float
    semantic_freedom: float
    artifact_freedom: float
    strengths: Strengths


def roughness(nodes: int, device: torch.device | str = "cpu") -> Tensor:
    """(M * M, M * M) float64: f'Rf is the sum of squared second differences (f_xx^2 + 2 f_xy^2 + f_yy^2)."""
    eye = torch.eye(nodes, dtype=torch.float64, device=device)
    first, second = eye.diff(dim=0), eye.diff(n=2, dim=0)
    first, second = first.T @ first, second.T @ second
    return torch.kron(second, eye) + torch.kron(eye, second) + 2 * torch.kron(first, first)


def solve(sums: Sums, rough: Tensor, strengths: Strengths, with_artifacts: bool = True) -> Solution:
    """Minimise sum w |y - F - G|^2 + smoothness f'Rf + artifacts |G|^2, and re-estimate the strengths.

    G is eliminated: S'wS is diagonal, so what is left is the Schur complement on F's nodes, one Cholesky
    factor for all channels. The strengths that come back are one step of MacKay's fixed point for the evidence
    of a Gaussian model (noise variance s^2, prior variances s^2 / strength): repeating it maximises the
    evidence without a grid search.
    """
    smooth, ridge = strengths.smoothness, strengths.artifacts
    diagonal = sums.gg + ridge
    system = sums.ff_dense() + smooth * rough
    right = sums.fy
    if with_artifacts:
        scaled = sums.fg / diagonal.sqrt()
        system -= scaled @ scaled.T
        right = right - sums.fg @ (sums.gy / diagonal[:, None])
    factor = torch.linalg.cholesky(system)
    semantics = torch.cholesky_solve(right, factor)
    channels = sums.channels
    kept = len(rough) - smooth * float((torch.cholesky_inverse(factor) * rough).sum())
    penalty = float((semantics * (rough @ semantics)).sum())
    explained = float((semantics * sums.fy).sum())
    new_ridge, freedom, size = ridge, 0.0, 0.0
    if with_artifacts:
        artifacts = (sums.gy - sums.fg.T @ semantics) / diagonal[:, None]
        explained += float((artifacts * sums.gy).sum())
        size = float(artifacts.square().sum())
        spread = torch.linalg.solve_triangular(factor, scaled / diagonal.sqrt(), upper=False)
        freedom = len(diagonal) - ridge * float(diagonal.reciprocal().sum() + spread.square().sum())
    else:
        artifacts = torch.zeros_like(sums.gy)
    misfit = max(sums.yy - explained - smooth * penalty - ridge * size, 1e-12 * sums.yy, 1e-30)
    noise = misfit / (channels * max(sums.weight - kept - freedom, 0.05 * sums.weight))
    new_smooth = noise * channels * max(kept - 3, 1e-3) / max(penalty, 1e-30)
    if with_artifacts:
        new_ridge = noise * channels * max(freedom, 1e-3) / max(size, 1e-30)
    typical = sums.weight / len(rough)
    ceiling = 1e6 * sums.weight / len(diagonal)
    wanted = Strengths(min(max(new_smooth, 1e-6 * typical), 1e6 * typical), min(max(new_ridge, 1e-6), ceiling))
    return Solution(semantics, artifacts, noise, kept, freedom, wanted)
