"""What stage 2 learns to predict."""

from __future__ import annotations

from torch import Tensor

from training.pairs.mixtures import MIXTURES as TARGETS


def parts_for(target: str) -> tuple[str, ...]:
    """The maps of a pair that a target of `TARGETS` is made of, the raw one first."""
    return ("raw", "clean") if target == "F" else ("raw", "clean", "artifacts")


def raw_and_target(maps: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """Maps (parts, B, layers, K*K, C) of `parts_for(target)` to raw features and target, (B, layers, K*K, C) each."""
    raw, semantics = maps[0], maps[1]
    return raw, TARGETS[target](raw, semantics, maps[-1])
