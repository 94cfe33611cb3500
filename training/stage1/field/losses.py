"""The losses of stage 1 (paper Eqs. 6 to 9); `detach` is the paper's sg, the stop-gradient.

All are means over patches: y and its like are (B, C). Norms are the paper's, over a patch's channels; `mean` has means
over the channels instead, of squares for the 2-norm and of absolute values for the 1-norm, as the paper's repository.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distance_loss(y: Tensor, y_hat: Tensor, mean: bool = False) -> Tensor:
    """L_distance (Eq. 7)."""
    return (1 - F.cosine_similarity(y, y_hat, dim=-1) + _size(y - y_hat, 2, mean)).mean()


def reconstruction_loss(
    y: Tensor, y_hat_prime: Tensor, delta: Tensor, alpha: float, beta: float, mean: bool = False
) -> Tensor:
    """L_recon (Eq. 6) of y_hat' = F + G and Delta = h(y) (Eq. 10).

    F learns from L_distance alone, h from L_residual and L_sparsity alone. In value, though not in gradient,
    L_residual is the norm in L_distance.
    """
    y_hat = y_hat_prime + delta.detach()  # Eq. 9
    l_residual = _size((y - y_hat_prime).detach() - delta, 2, mean).mean()  # Eq. 8
    l_sparsity = _size(delta, 1, mean).mean()
    return distance_loss(y, y_hat, mean) + alpha * l_residual + beta * l_sparsity


def _size(values: Tensor, order: int, mean: bool) -> Tensor:
    """The norm of (B, C) over the channels, or the mean over them of the absolute values to that power: (B,)."""
    if mean:
        return values.abs().pow(order).mean(-1)
    return torch.linalg.vector_norm(values, ord=order, dim=-1)
