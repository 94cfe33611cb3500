"""The distances that stages 2 and 3 make small (Eq. 11), and where a run of one has gone wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """Eq. 11, 1 - cos(D(y), F) + ||D(y) - F||_2, of each token.

    The norm is not squared and runs over the channels, as the paper writes it. Always in float32.

    Args:
        predicted, target: (..., C).

    Returns:
        (...) float32.
    """
    predicted, target = predicted.float(), target.float()
    cosine = F.cosine_similarity(predicted, target, dim=-1)
    return 1 - cosine + torch.linalg.vector_norm(predicted - target, dim=-1)


def mse_distance(predicted: Tensor, target: Tensor) -> Tensor:
    """The same with the mean over the channels of the squared difference, as the paper's repository has it."""
    predicted, target = predicted.float(), target.float()
    cosine = F.cosine_similarity(predicted, target, dim=-1)
    return 1 - cosine + (predicted - target).square().mean(-1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"norm": norm_distance, "mse": mse_distance}


def loss_limit(distance: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> float:
    """The loss beyond which a run diverges: ten times that of predicting nothing.

    Args:
        distance: of `DISTANCES`. target: (..., C) what is to be predicted.
    """
    return 10 * distance(torch.zeros_like(target), target).mean().item()
