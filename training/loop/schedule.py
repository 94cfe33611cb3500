"""The learning rate of every step of a training: it rises straight, then decays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from timm_dvt.errors import UserError


def cosine(done: float) -> float:
    """A decay from 1 to 0 along half a wave, of the fraction done."""
    return 0.5 * (1 + math.cos(math.pi * done))


def straight(done: float) -> float:
    """A decay from 1 to 0 along a line, of the fraction done."""
    return 1 - done


def stepped(milestones: Sequence[float], factor: float = 0.1) -> Callable[[float], float]:
    """A decay by `factor` at each milestone, a fraction of all steps."""
    return lambda done: factor ** sum(done >= milestone for milestone in milestones)


@dataclass(frozen=True)
class Schedule:
    """How long a training is, and its learning rate.

    Attributes:
        steps: of the optimizer; 0 for what needs none.
        peak: the highest learning rate.
        warmup: steps of the straight rise that comes first.
        decay: fraction done -> factor of the peak.
        overlap: the decay counts from the first step, and the rise multiplies it, as in mmsegmentation and
            mmdetection, whose protocols the probes follow; else it counts from the end of the rise.
        floor: the learning rate at the end of the decay.

    Raises:
        ValueError: a value that cannot be.
    """

    steps: int
    peak: float
    warmup: int = 0
    decay: Callable[[float], float] = cosine
    overlap: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"steps must be 0 or more, got {self.steps}")
        if not 0 <= self.peak < math.inf:
            raise UserError(f"lr must be 0 or more and finite, got {self.peak}")
        if not 0 <= self.floor <= self.peak:
            raise UserError(f"min_lr must be from 0 to lr ({self.peak:g}), got {self.floor}")
        if self.warmup < 0:
            raise UserError(f"warmup must be 0 or more, got {self.warmup}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = (step + 1) / self.warmup if step < self.warmup else 1.0
        if self.overlap:
            return rise * self._decayed(step / self.steps)
        if step < self.warmup:
            return self.peak * rise
        return self._decayed((step - self.warmup) / max(1, self.steps - self.warmup))

    def _decayed(self, done: float) -> float:
        return self.floor + (self.peak - self.floor) * self.decay(done)
