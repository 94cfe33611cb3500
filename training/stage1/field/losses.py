"""The losses of stage 1 (paper Eqs. 6 to 9); `detach` is the paper's sg, the stop-gradient.

All are means over patches: y and its like are (B, C). Norms are the paper's, over a patch's channels; the published
code has means over them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def distance_loss(y: Tensor, y_hat: Tensor) -> Tensor:
    """L_distance (Eq. 7)."""
    return (1 - F.cosine_similarity(y, y_hat, dim=-1) + torch.linalg.vector_norm(y - y_hat, dim=-1)).mean()


def reconstruction_loss(y: Tensor, y_hat_prime: Tensor, delta: Tensor, alpha: float, beta: float) -> Tensor:
    """L_recon (Eq. 6) of y_hat' = F + G and Delta = h(y) (Eq. 10).

    F learns from L_distance alone, h from L_residual and L_sparsity alone. In value, though not in gradient,
    L_residual is the norm in L_distance.
    """
    y_hat = y_hat_prime + delta.detach()  # Eq. 9
    l_residual = torch.linalg.vector_norm((y - y_hat_prime).detach() - delta, dim=-1).mean()  # Eq. 8
    l_sparsity = torch.linalg.vector_norm(delta, ord=1, dim=-1).mean()
    return distance_loss(y, y_hat) + alpha * l_residual + beta * l_sparsity
