"""What stages 2 and 3 share of the paper's recipe: Eq. 11 and its limit, AdamW, the cosine schedule, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbone import DTYPES
from training.checkpoints import Diverged


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


def diverged(loss: float, limit: float, step: int, lr: float, otherwise: str = "") -> Diverged:
    """The error for a loss beyond `loss_limit` after `step` steps; `otherwise` is what else it may come from."""
    return Diverged(
        f"the loss diverged: {loss:.4g} at step {step}, ten times what predicting nothing would give "
        f"({limit / 10:.4g}), at a learning rate of {lr:.3g}; use a smaller --lr or a longer --warmup, "
        f"and another --out{otherwise}"
    )


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0) -> float:
    """Cosine from `peak` to 0 over `steps` steps (paper A.2), after a straight rise over the first `warmup`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trainable; position embeddings, biases and norms are not decayed, as in timm."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(("pos_embed", "_token"))].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay if decayed else 0.0}
            for decayed, parameters in groups.items()
            if parameters
        ],
        lr=lr,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the optimiser's next step be of this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def lower_precision(device: torch.device, dtype: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts for forward passes in a dtype of `DTYPES`: autocast, or nothing for float32."""
    return nullcontext if dtype == "float32" else partial(torch.autocast, device.type, DTYPES[dtype])
