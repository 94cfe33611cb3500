"""Denoisers that need no training: a map subtracted, or directions projected out."""

import torch
from timm.layers import to_2tuple

from timm_dvt.denoiser import Denoiser


def subtracting(artifacts: torch.Tensor) -> Denoiser:
    """F = y - G for a map G (H, W, C), at other grids resampled; float32, on the CPU."""
    denoiser = Denoiser(artifacts.shape[-1], (artifacts.shape[0], artifacts.shape[1]), arch="static")
    denoiser.load_state_dict({"pos_embed": -artifacts.flatten(0, 1)[None]})
    return denoiser


def projecting_out(basis: torch.Tensor, grid: int | tuple[int, int], mean: torch.Tensor | None = None) -> Denoiser:
    """F = (I - U U^T) y for orthonormal directions U (C, r), r may be 0; float32, on the CPU.

    Args:
        grid: rows and columns of the maps, or one number for both.
        mean: (C,), what is given back of it along U; default nothing.
    """
    denoiser = Denoiser(len(basis), to_2tuple(grid), arch="project")
    bias = torch.zeros(len(basis)) if mean is None else basis @ basis.T @ mean
    denoiser.load_state_dict({"blocks.0.weight": outside(basis), "blocks.0.bias": bias})
    return denoiser


def outside(basis: torch.Tensor) -> torch.Tensor:
    """I - U U^T, (C, C)."""
    return torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.T
