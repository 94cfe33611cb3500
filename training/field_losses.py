"""The losses of stage 1 (paper Eqs. 6 to 9), with stop-gradients where the paper has them."""

from typing import Any

import torch
from torch import Tensor


def distance_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_distance (Eq. 7): 1 - cos(y, y_hat) + ||y - y_hat||_2, averaged over patches. Scalar.

    prediction y_hat (B, C), target y (B, C). No gradient reaches the target: y is a constant (Eq. 9). The
    norm is the paper's 2-norm over a patch's channels; the published code has the mean squared error there.
    """
    return _Distance.apply(prediction, target.detach())


def residual_loss(residual: Tensor, unexplained: Tensor) -> Tensor:
    """L_residual (Eq. 8): ||sg(y - y_hat') - Delta||_2, averaged over patches. Both (B, C); scalar.

    No gradient reaches `unexplained`, which is y - y_hat'.
    """
    return torch.linalg.vector_norm(unexplained.detach() - residual, dim=-1).mean()


def sparsity_loss(residual: Tensor) -> Tensor:
    """L_sparsity (Eq. 8): ||Delta||_1, summed over channels and averaged over patches. (B, C); scalar."""
    return torch.linalg.vector_norm(residual, ord=1, dim=-1).mean()


def reconstruction_loss(
    semantics_and_artifacts: Tensor, residual: Tensor, target: Tensor, alpha: float = 0.1, beta: float = 0.02
) -> Tensor:
    """L_recon (Eq. 6) = L_distance + alpha L_residual + beta L_sparsity. Scalar.

    semantics_and_artifacts: y_hat' = F + G (B, C); residual: Delta = h(y) (B, C); target: y (B, C). F learns
    from L_distance alone, where y_hat = y_hat' + sg(Delta) (Eq. 9); h learns from the other two alone (Eq.
    8).
    """
    distance = distance_loss(semantics_and_artifacts + residual.detach(), target)
    unexplained = target.detach() - semantics_and_artifacts.detach()
    return distance + alpha * residual_loss(residual, unexplained) + beta * sparsity_loss(residual)


class _Distance(torch.autograd.Function):
    """Eq. 7 with its gradient in closed form: autograd's takes longer than the rest of the step together.

    With d = ||y - y_hat||, per patch and with 0/0 = 0:
    gradient = (cos / ||y_hat||^2 + 1 / d) y_hat - (1 / (||y|| ||y_hat||) + 1 / d) y.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        tiny = torch.finfo(prediction.dtype).tiny ** 0.5
        length = torch.linalg.vector_norm(prediction, dim=-1).clamp_min(tiny)
        target_length = torch.linalg.vector_norm(target, dim=-1).clamp_min(tiny)
        distance = torch.linalg.vector_norm(prediction - target, dim=-1)
        cosine = torch.linalg.vecdot(prediction, target) / length / target_length
        ctx.save_for_backward(prediction, target, length, target_length, distance, cosine)
        return (1 - cosine + distance).mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        prediction, target, length, target_length, distance, cosine = ctx.saved_tensors
        scale = upstream / distance.numel()
        pull = torch.where(distance > 0, 1 / distance, 0)
        of_prediction = (cosine / length**2 + pull) * scale
        of_target = (1 / length / target_length + pull) * scale
        gradient = prediction * of_prediction[..., None]
        return gradient.addcmul_(target, of_target[..., None], value=-1), None
