"""The distance that stages 2 and 3 make small (Eq. 11), and where a run of it has gone wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distance(predicted: Tensor, target: Tensor) -> Tensor:
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


def loss_limit(target: Tensor) -> float:
    """The loss beyond which a run diverges: ten times that of predicting nothing, which is 1 + ||F||_2 (Eq. 11).

    Args:
        target: (..., C) what is to be predicted.
    """
    return 10 * (1 + torch.linalg.vector_norm(target.float(), dim=-1).mean().item())
