"""Solves the summed normal equations of F and G, and chooses both regularization strengths from the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.stage1.linear.banded import BandedFactor, roughness, roughness_diagonals, roughness_probes
from training.stage1.linear.normal_equations import NormalEquations

PROBES = 32


@dataclass(frozen=True)
class Strengths:
    """Penalties, in noise variances: smoothness * |F's second differences|^2 + artifacts * |G|^2."""

    smoothness: float = 1.0
    artifacts: float = 1.0


@dataclass
class Factors:
    """What a solve needs of the views' geometry and the strengths alone: it serves all channels.

    `coupling` is L^-1 W'wS with F's banded factor L, `patches` the lower Cholesky factor of the Schur complement
    on G; both None without G. `semantic_freedom` and `artifact_freedom` are the numbers of parameters of F and
    G that the data determine, rather than the penalties.
    """

    strengths: Strengths
    semantics: BandedFactor
    coupling: Tensor | None
    patches: Tensor | None
    semantic_freedom: float
    artifact_freedom: float


@dataclass
class Solution:
    """F (M * M, C) and G (K * K, C), float64, for one pair of strengths; `strengths` are those to try next.

    `noise` is the noise variance a token and channel.
    """

    semantics: Tensor
    artifacts: Tensor
    noise: float
    strengths: Strengths
    factors: Factors


def factorise(equations: NormalEquations, strengths: Strengths, with_artifacts: bool = True) -> Factors:
    """The factors of the system, and the freedoms they leave F and G.

    F's own matrix is banded, so it is F that is eliminated: a banded factor, then a Cholesky factor of the
    Schur complement on the K * K patches. Of G's parameters the data determine K * K - artifacts *
    tr(H^-1 on G), of F's M * M - smoothness * tr(H^-1 R), whose trace is estimated with fixed random probes.

    Raises:
        torch.linalg.LinAlgError: the system is not positive definite to working precision.
    """
    smooth, ridge = strengths.smoothness, strengths.artifacts
    device, patches = equations.ff.device, len(equations.gg)
    factor = BandedFactor(equations.ff + smooth * roughness_diagonals(equations.nodes).to(device), equations.nodes)
    probed = factor.forward(roughness_probes(equations.nodes, PROBES).to(device))
    energy = float(probed.square().sum())
    if not with_artifacts:
        return Factors(strengths, factor, None, None, len(equations.ff) - smooth * energy / PROBES, 0.0)
    coupling = factor.forward(equations.fg)
    schur_factor = torch.linalg.cholesky(torch.diag(equations.gg + ridge) - _lower_gram(coupling))
    through = torch.linalg.solve_triangular(schur_factor, coupling.T @ probed, upper=False)
    energy += float(through.square().sum())
    eye = torch.eye(patches, dtype=schur_factor.dtype, device=device)
    trace = float(torch.linalg.solve_triangular(schur_factor, eye, upper=False).square().sum())
    semantic_freedom = len(equations.ff) - smooth * energy / PROBES
    return Factors(strengths, factor, coupling, schur_factor, semantic_freedom, patches - ridge * trace)


def solve(equations: NormalEquations, factors: Factors) -> Solution:
    """Minimize sum w |y - F - G|^2 + smoothness * f'Rf + artifacts * |G|^2, and re-estimate the strengths.

    The strengths that come back are one step of MacKay's fixed point for the evidence of the Gaussian model
    in which noise has variance s^2 and the penalized quantities s^2 / strength; to repeat the step is to
    maximize the evidence.
    """
    smooth, ridge = factors.strengths.smoothness, factors.strengths.artifacts
    channels, patches = equations.channels, len(equations.gg)
    solved = factors.semantics.forward(equations.fy)
    artifacts = torch.zeros_like(equations.gy)
    if factors.coupling is not None and factors.patches is not None:
        artifacts = torch.cholesky_solve(equations.gy - factors.coupling.T @ solved, factors.patches)
        solved -= factors.coupling @ artifacts
    semantics = factors.semantics.backward(solved)

    # At the minimum, misfit + penalties = y'wy - f.W'wy - g.S'wy.
    explained = float(_inner(semantics, equations.fy) + _inner(artifacts, equations.gy))
    bending = roughness(semantics, equations.nodes)
    size = float(_inner(artifacts, artifacts))
    misfit = max(equations.yy - explained - smooth * bending - ridge * size, 1e-12 * equations.yy, 1e-30)
    freedom = factors.semantic_freedom + factors.artifact_freedom
    noise = misfit / (channels * max(equations.weight - freedom, 0.05 * equations.weight))
    # R does not see constants and ramps: three parameters that need no prior.
    semantic_variance = bending / max(factors.semantic_freedom - 3, 1.0)
    artifact_variance = size / max(factors.artifact_freedom, 1e-3)
    per_node, per_patch = equations.weight / len(semantics), equations.weight / patches
    wanted = Strengths(
        _clamp(noise * channels / max(semantic_variance, 1e-30), 1e-6 * per_node, 1e6 * per_node),
        _clamp(noise * channels / max(artifact_variance, 1e-30), 1e-7 * per_patch, 1e6 * per_patch),
    )
    if factors.coupling is None:
        wanted = Strengths(wanted.smoothness, ridge)
    return Solution(semantics, artifacts, noise, wanted, factors)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    return torch.dot(first.flatten(), second.flatten())


def _lower_gram(matrix: Tensor, parts: int = 4) -> Tensor:
    """The lower triangle of matrix' matrix, all that a Cholesky factor reads, at 5/8 of the cost."""
    gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    step = -(-matrix.shape[1] // parts)
    for start in range(0, matrix.shape[1], step):
        gram[start:, start : start + step] = matrix[:, start:].T @ matrix[:, start : start + step]
    return gram


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
