"""What can be made of the maps of a pair: the targets of stage 2, the rows of Tab. 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _rescaled(raw: Tensor, semantics: Tensor, artifacts: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(raw - artifacts, dim=-1, keepdim=True)
    return semantics * (length / torch.linalg.vector_norm(semantics, dim=-1, keepdim=True).clamp_min(1e-6))


# What stage 2 can learn to predict, of a pair's raw = F + G + residual: functions of raw, F and G, each (..., C).
#
#     F         the paper's target (Eq. 11): what the views of an image agree on
#     rescaled  F |raw - G| / |F|: the direction that the views agree on, at the length that the whole image has
#     mean      (F + raw - G) / 2 = F + residual / 2
#     raw-G     F + residual: only what is tied to places is taken away
#
# F is an average over crops, and the average of vectors that disagree is shorter than they are: where crops see a thing
# differently, an object above all, F is short, and a token's length says no more what stands out in the image.
# `rescaled` gives the length back. The last two are mixtures: a regression learns the mean of its target given the raw
# map, and a block that knows F and G knows the residual, so trained on F + s * residual it comes to
# (1 - s) F + s (raw - G).
MIXTURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F": lambda raw, semantics, artifacts: semantics,
    "rescaled": _rescaled,
    "mean": lambda raw, semantics, artifacts: torch.lerp(semantics, raw - artifacts, 0.5),
    "raw-G": lambda raw, semantics, artifacts: raw - artifacts,
}
