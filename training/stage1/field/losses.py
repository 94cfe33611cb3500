"""The losses of stage 1 (paper Eqs. 6 to 9), with stop-gradients where the paper has them."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 512  # patches


class Loss(NamedTuple):
    """A loss and its gradients: of semantics F (B, C), artifacts G (P, C) and residual Delta (B, C)."""

    value: Tensor
    semantics: Tensor
    artifacts: Tensor | None
    residual: Tensor | None


def distance_loss(semantics: Tensor, artifacts: Tensor, patches: Tensor, target: Tensor) -> Loss:
    """L_distance (Eq. 7): 1 - cos(y, y_hat) + ||y - y_hat||_2, averaged over patches; F and G learn from it.

    y_hat = F + G (Eq. 10) of semantics F (B, C), artifacts G (P, C) and patches (B,) int64, the rows of G. target
    y (B, C), a constant (Eq. 9). The norm is the paper's 2-norm over a patch's channels; the published code has
    the mean squared error there.
    """
    return _loss(semantics, artifacts, None, patches, target, 0.0, 0.0)


def reconstruction_loss(
    semantics: Tensor,
    artifacts: Tensor,
    residual: Tensor,
    patches: Tensor,
    target: Tensor,
    alpha: float = 0.1,
    beta: float = 0.02,
) -> Loss:
    """L_recon (Eq. 6) = L_distance + alpha L_residual + beta L_sparsity, averaged over patches; F and h learn from it.

    residual: Delta = h(y) (B, C); the rest as in `distance_loss`. With y_hat' = F + G, L_residual =
    ||sg(y - y_hat') - Delta||_2 and L_sparsity = ||Delta||_1 over a patch's channels (Eq. 8). F learns from
    L_distance alone, where y_hat = y_hat' + sg(Delta) (Eq. 9); h learns from the other two alone (Eq. 8); G is
    frozen. In value, though not in gradient, L_residual is the ||y - y_hat|| of L_distance.
    """
    return _loss(semantics, artifacts, residual, patches, target, alpha, beta)


@torch.no_grad()
def _loss(
    semantics: Tensor,
    artifacts: Tensor,
    residual: Tensor | None,
    patches: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
) -> Loss:
    """Eq. 6, or without a residual Eq. 7, and its gradients in closed form: autograd's take several times as long.

    Per patch, with d = y - y_hat and 0/0 = 0, the gradient of y_hat is
    (cos / ||y_hat||^2 + 1 / ||d||) y_hat - (1 / (||y|| ||y_hat||) + 1 / ||d||) y,
    and that of Delta is beta sign(Delta) - alpha d / ||d||.

    It takes some patches after the others, gradients and all, so that what passes from one operation to the next
    stays in a processor's cache: these twenty are limited by memory, not by arithmetic.
    """
    mean = 1 / len(target)
    tiny = torch.finfo(target.dtype).tiny ** 0.5
    total = target.new_zeros(())
    of_semantics = torch.empty_like(semantics)
    of_artifacts = torch.zeros_like(artifacts) if residual is None else None
    of_residual = None if residual is None else torch.empty_like(residual)
    size = BLOCK if target.device.type == "cpu" else len(target)
    room = target.new_empty(4, min(size, len(target)), target.shape[1])
    for start in range(0, len(target), size):
        block = slice(start, start + size)
        y = target[block]
        prediction, difference, delta, scratch = room[:, : len(y)]
        torch.index_select(artifacts, 0, patches[block], out=prediction)
        prediction += scratch.copy_(semantics[block])
        if residual is not None:
            prediction += delta.copy_(residual[block])
        torch.sub(y, prediction, out=difference)
        apart = torch.linalg.vector_norm(difference, dim=-1)
        length = torch.linalg.vector_norm(prediction, dim=-1).clamp_min_(tiny)
        target_length = torch.linalg.vector_norm(y, dim=-1).clamp_min_(tiny)
        pull = torch.where(apart > 0, 1 / apart, 0)
        cosine = torch.mul(prediction, y, out=scratch).sum(-1) / length / target_length
        total += (1 - cosine + (1 + alpha) * apart).sum()
        if of_residual is not None:
            total += beta * torch.abs(delta, out=scratch).sum()
            delta.sign_().mul_(beta * mean).addcmul_(difference, (pull * (-alpha * mean))[:, None])
            of_residual[block] = delta
        gradient = prediction.mul_(((cosine / length**2 + pull) * mean)[:, None])
        gradient.addcmul_(y, ((1 / length / target_length + pull) * -mean)[:, None])
        of_semantics[block] = gradient
        if of_artifacts is not None:
            of_artifacts.index_add_(0, patches[block], gradient)
    return Loss(total * mean, of_semantics, of_artifacts, of_residual)
