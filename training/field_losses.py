"""The losses of stage 1 (paper Eqs. 6 to 9), with stop-gradients where the paper has them."""

from typing import Any

import torch
from torch import Tensor


def distance_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """L_distance (Eq. 7): 1 - cos(y, y_hat) + ||y - y_hat||_2, averaged over patches. Scalar.

    prediction y_hat (B, C), target y (B, C). No gradient reaches the target: y is a constant (Eq. 9). The
    norm is the paper's 2-norm over a patch's channels; the published code has the mean squared error there.
    """
    return _Distance.apply(prediction, target)


def reconstruction_loss(
    semantics_and_artifacts: Tensor, residual: Tensor, target: Tensor, alpha: float = 0.1, beta: float = 0.02
) -> Tensor:
    """L_recon (Eq. 6) = L_distance + alpha L_residual + beta L_sparsity, averaged over patches. Scalar.

    semantics_and_artifacts: y_hat' = F + G (B, C); residual: Delta = h(y) (B, C); target: y (B, C).
    L_residual = ||sg(y - y_hat') - Delta||_2 and L_sparsity = ||Delta||_1 over a patch's channels (Eq. 8). F
    learns from L_distance alone, where y_hat = y_hat' + sg(Delta) (Eq. 9); h learns from the other two alone
    (Eq. 8). In value, though not in gradient, L_residual is the ||y - y_hat|| of L_distance.
    """
    return _Reconstruction.apply(semantics_and_artifacts, residual, target, alpha, beta)


class _Distance(torch.autograd.Function):
    """Eq. 7 with its gradient in closed form: autograd's takes longer than the rest of the step together."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.terms = _Terms(prediction, target)
        return ctx.terms.distance()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.terms.gradient(upstream), None


class _Reconstruction(torch.autograd.Function):
    """Eq. 6 with its two gradients in closed form: what the stop-gradients throw away is never computed.

    With d = y - y_hat, the gradient of Delta is, per patch, beta sign(Delta) - alpha d / ||d||.
    """

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor, residual: Tensor, target: Tensor, alpha: float, beta: float
    ) -> Tensor:
        ctx.terms = terms = _Terms(partial + residual, target)
        ctx.residual, ctx.alpha, ctx.beta = residual, alpha, beta
        sparsity = residual.abs().sum() / len(residual)  # of the 1-norm over channels, the mean over patches
        return terms.distance() + alpha * terms.apart.mean() + beta * sparsity

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        terms = ctx.terms
        scale = upstream / len(terms.apart)
        of_residual = torch.sign(ctx.residual).mul_(ctx.beta * scale)
        of_residual.addcmul_(terms.difference, terms.pull[:, None] * (ctx.alpha * scale), value=-1)
        return terms.gradient(upstream), of_residual, None, None, None


class _Terms:
    """What the distance of y_hat to y (both (B, C)) and its gradient share.

    Per patch, with d = ||y - y_hat|| and 0/0 = 0:
    gradient = (cos / ||y_hat||^2 + 1 / d) y_hat - (1 / (||y|| ||y_hat||) + 1 / d) y.
    """

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        tiny = torch.finfo(prediction.dtype).tiny ** 0.5
        self.prediction, self.target, self.difference = prediction, target, target - prediction
        self.length = torch.linalg.vector_norm(prediction, dim=-1).clamp_min(tiny)
        self.target_length = torch.linalg.vector_norm(target, dim=-1).clamp_min(tiny)
        self.apart = torch.linalg.vector_norm(self.difference, dim=-1)
        self.pull = torch.where(self.apart > 0, 1 / self.apart, 0)
        self.cosine = torch.linalg.vecdot(prediction, target) / self.length / self.target_length

    def distance(self) -> Tensor:
        """Eq. 7."""
        return (1 - self.cosine + self.apart).mean()

    def gradient(self, upstream: Tensor) -> Tensor:
        """Of `distance` by the prediction (B, C), times upstream."""
        scale = upstream / len(self.apart)
        of_prediction = (self.cosine / self.length**2 + self.pull) * scale
        of_target = (1 / self.length / self.target_length + self.pull) * scale
        return (self.prediction * of_prediction[:, None]).addcmul_(self.target, of_target[:, None], value=-1)
