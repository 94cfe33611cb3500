"""RASA, removal of absolute spatial attributes (Franca, CVPR 2026; valeoai/Franca): linear directions of position.

A round learns a linear map w (C, 2) that predicts the row and the column of a patch from its token, takes the plane of
its two vectors off all tokens, and the next round learns from what is left:

    w = argmin sum |link(x^T w) - (row, column)|^2,   x <- x - U U^T x,  U = orth(w)

Theirs: rows and columns from 0 to 1, no bias, the sigmoid as link, five epochs of AdamW a round, nine rounds (the
configuration of their code), photographs of VOC.

Ours: about its middle the sigmoid is a line, (row - 1/2) ~ x^T w / 4, and a line's w has a closed form,

    w = (E[x x^T] + ridge)^-1 E[x (row - 1/2, column - 1/2)]

so that all rounds follow of two moments, which one pass over the photographs gives. Theirs comes to the same plane
where its loss is minimized; where it stops before, w keeps some of its random start. With no bias w is nearly
orthogonal to the mean token, as theirs. A vector that explains less than `LEAST` of the variance of rows or columns is
not taken out, and where there is none the rounds end; theirs takes out all 18. Gram-Schmidt within a plane and one
round behind the other make one projection, F = (I - U U^T) y.
"""

from typing import Any

import torch
from torch import Tensor

from timm_dvt.attach import attach_denoiser
from timm_dvt.calibration.linear import projecting_out
from training.rivals.sample import Moments, Sample

ROUNDS = 9
LEAST = 1e-3
RIDGE = 1e-6  # of the mean square of a channel


def directions(moments: Moments, rounds: int = ROUNDS) -> Tensor:
    """Orthonormal directions (C, r <= 2 rounds) from which row and column can be predicted."""
    places = positions(*moments.mean_map.shape[:2])
    channels = len(moments.second)
    identity = torch.eye(channels, dtype=torch.float64)
    cross = moments.mean_map.flatten(0, 1).T @ places / len(places)
    ridge = RIDGE * float(moments.second.trace()) / channels
    basis = identity[:, :0]
    for _ in range(rounds):
        left = identity - basis @ basis.T
        target = left @ cross
        weights = torch.linalg.solve(left @ moments.second @ left + ridge * identity, target)
        explained = (target * weights).sum(0) / places.square().mean(0).clamp(min=1e-30)
        if not (explained >= LEAST).any():
            break
        basis = torch.linalg.qr(torch.cat([basis, left @ weights[:, explained >= LEAST]], dim=1)).Q
    return basis


def positions(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2) row and column of each place, from -1/2 to 1/2."""
    sides = [torch.linspace(-0.5, 0.5, side, dtype=torch.float64) for side in (rows, columns)]
    return torch.cartesian_prod(*sides)


def fit(model: Any, sample: Sample) -> str:
    """Give the model the denoiser, in place; returns what was learned, in words."""
    basis = directions(sample.moments)
    attach_denoiser(model, projecting_out(basis, sample.reader.grid))
    return f"{basis.shape[1]} of {basis.shape[0]} directions, of {sample.views} crops"
