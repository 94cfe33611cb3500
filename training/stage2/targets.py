"""What stage 2 learns to predict."""

from __future__ import annotations

from torch import Tensor

from training.pairs.mixtures import MIXTURES as TARGETS
from training.stage2.content import Content


class Target:
    """What is to be predicted of pairs.

    Attributes:
        parts: the maps of a pair that it is made of, the raw one first.
        content: what is put back into it, if anything.
    """

    def __init__(self, name: str) -> None:
        """
        Args:
            name: of `TARGETS`.
        """
        self.parts = ("raw", "clean") if name == "F" else ("raw", "clean", "artifacts")
        self.mixture = TARGETS[name]
        self.content: Content | None = None

    def __call__(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (parts, B, layers, K*K, C) to raw features and target, (B, layers, K*K, C) each."""
        raw = maps[0]
        target = self.mixture(raw, maps[1], maps[-1])
        return raw, target if self.content is None else self.content.put_back(raw, target)
