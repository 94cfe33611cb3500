"""Solves the summed normal equations of F and G, and chooses both regularisation strengths from the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.banded import BandedFactor, roughness_diagonals, roughness_probes
from training.sums import Sums

PROBES = 32


@dataclass(frozen=True)
class Strengths:
    """Penalties, in noise variances: smoothness * |F's second differences|^2 + artifacts * |G|^2."""

    smoothness: float = 1.0
    artifacts: float = 1.0


@dataclass
class Solution:
    """F (M * M, C) and G (K * K, C), float64, for one pair of strengths; `strengths` are those to try next.

    `noise` is the noise variance a token and channel; `semantic_freedom` and `artifact_freedom` are the
    numbers of parameters of F and G that the data determine, rather than the penalties. `patch_factor` is the
    Cholesky factor of the Schur complement on G, None without G.
    """

    semantics: Tensor
    artifacts: Tensor
    noise: float
    semantic_freedom: float
    artifact_freedom: float
    strengths: Strengths
    patch_factor: Tensor | None = None


def solve(sums: Sums, strengths: Strengths, with_artifacts: bool = True) -> Solution:
    """Minimise sum w |y - F - G|^2 + smoothness * f'Rf + artifacts * |G|^2, and re-estimate the strengths.

    F's own matrix is banded, so it is F that is eliminated: a banded factor, then a Cholesky factor of the
    Schur complement on the K * K patches, serve all channels.

    The strengths that come back are one step of MacKay's fixed point for the evidence of the Gaussian model
    in which noise has variance s^2 and the penalised quantities s^2 / strength; to repeat the step is to
    maximise the evidence. Of G's parameters the data determine K * K - artifacts * tr(H^-1 on G), of F's
    M * M - smoothness * tr(H^-1 R), whose trace is estimated with fixed random probes.

    Raises:
        torch.linalg.LinAlgError: the system is not positive definite to working precision.
    """
    smooth, ridge = strengths.smoothness, strengths.artifacts
    device, channels, patches = sums.ff.device, sums.channels, len(sums.gg)
    rough = roughness_diagonals(sums.nodes).to(device)
    factor = BandedFactor(sums.ff + smooth * rough, sums.nodes)
    right = torch.cat([sums.fy, roughness_probes(sums.nodes, PROBES).to(device)], 1)
    solved, probed = factor.forward(right).split([channels, PROBES], 1)
    probe_energy = float(probed.square().sum())
    artifacts = torch.zeros_like(sums.gy)
    artifact_freedom = 0.0
    schur_factor = None
    if with_artifacts:
        coupling = factor.forward(sums.fg)
        schur_factor = torch.linalg.cholesky(torch.diag(sums.gg + ridge) - _lower_gram(coupling))
        artifacts = torch.cholesky_solve(sums.gy - coupling.T @ solved, schur_factor)
        solved = solved - coupling @ artifacts
        through = torch.linalg.solve_triangular(schur_factor, coupling.T @ probed, upper=False)
        probe_energy += float(through.square().sum())
        eye = torch.eye(patches, dtype=schur_factor.dtype, device=device)
        trace = float(torch.linalg.solve_triangular(schur_factor, eye, upper=False).square().sum())
        artifact_freedom = patches - ridge * trace
    semantics = factor.backward(solved)
    semantic_freedom = len(semantics) - smooth * probe_energy / PROBES

    # At the minimum, misfit + penalties = y'wy - f.W'wy - g.S'wy.
    explained = float((semantics * sums.fy).sum() + (artifacts * sums.gy).sum())
    bending = float((semantics * factor.multiply(rough, semantics)).sum())
    size = float(artifacts.square().sum())
    misfit = max(sums.yy - explained - smooth * bending - ridge * size, 1e-12 * sums.yy, 1e-30)
    left = max(sums.weight - semantic_freedom - artifact_freedom, 0.05 * sums.weight)
    noise = misfit / (channels * left)
    # R does not see constants and ramps: three parameters that need no prior.
    semantic_variance = bending / max(semantic_freedom - 3, 1.0)
    artifact_variance = size / max(artifact_freedom, 1e-3)
    per_node, per_patch = sums.weight / len(semantics), sums.weight / patches
    wanted = Strengths(
        _clamp(noise * channels / max(semantic_variance, 1e-30), 1e-6 * per_node, 1e6 * per_node),
        _clamp(noise * channels / max(artifact_variance, 1e-30), 1e-7 * per_patch, 1e6 * per_patch),
    )
    if not with_artifacts:
        wanted = Strengths(wanted.smoothness, ridge)
    return Solution(semantics, artifacts, noise, semantic_freedom, artifact_freedom, wanted, schur_factor)


def _lower_gram(matrix: Tensor, parts: int = 4) -> Tensor:
    """The lower triangle of matrix' matrix, all that a Cholesky factor reads, at 5/8 of the cost."""
    gram = matrix.new_zeros(matrix.shape[1], matrix.shape[1])
    step = -(-matrix.shape[1] // parts)
    for start in range(0, matrix.shape[1], step):
        gram[start:, start:start + step] = matrix[:, start:].T @ matrix[:, start:start + step]
    return gram


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
