"""What stages 2 and 3 share of the paper's recipe: Eq. 11, AdamW, and the cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
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
