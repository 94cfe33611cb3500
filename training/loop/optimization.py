"""The optimizer of every training, and the precision of its forward passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn

from training.common.backbone import DTYPES


def make_adamw(model: nn.Module, lr: float, weight_decay: float, decay_all: bool = False) -> torch.optim.AdamW:
    """AdamW over what is trainable; position embeddings, biases and norms are not decayed, as in timm, or all are."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "pos_embed_out", "_token"))
            groups[decay_all or matrix].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay if decayed else 0.0}
            for decayed, parameters in groups.items()
            if parameters
        ],
        lr=lr,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the optimizer's next step be of this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def autocast(device: torch.device, dtype: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts for forward passes in a dtype of `DTYPES`: autocast, or nothing for float32."""
    return nullcontext if dtype == "float32" else partial(torch.autocast, device.type, DTYPES[dtype])
