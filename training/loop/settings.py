"""What the trainings of stages 2 and 3 are told alike."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from timm_dvt.errors import UserError
from training.common.backbone import DTYPES
from training.loop.distance import DISTANCES
from training.loop.schedule import Schedule


@dataclass(frozen=True)
class Pace:
    """How a training is run, which decides nothing of its weights.

    Attributes:
        workers: threads that read ahead; None is as many as suit the device.
        checkpoint_every, val_every: in steps; None is ten times a run.
    """

    workers: int | None = None
    checkpoint_every: int = 200
    val_every: int | None = None

    @classmethod
    def of(cls, args: Namespace) -> Pace:
        """That of a command line with the options of training/loop/options.py."""
        return cls(args.workers, args.checkpoint_every, args.val_every)


USUAL_PACE = Pace()


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What decides the weights that a training ends with, beside its data and its model.

    Attributes:
        steps: optimizer steps.
        batch_size: samples a step, over all processes.
        loss: of `training.loop.distance.DISTANCES`.
        lr, warmup, min_lr: the schedule's peak, steps to reach it, and where it ends.
        weight_decay: of AdamW, on matrices, or with decay_all on everything.
        dtype: "float32", or "bfloat16" for autocast.
        val_fraction: of the samples, not trained on.
        seed: of all that is random.

    Raises:
        ValueError: a value that cannot be.
    """

    steps: int = 1
    batch_size: int = 64
    loss: str = "norm"
    lr: float = 2e-4
    min_lr: float = 0.0
    warmup: int = 0
    weight_decay: float = 0.01
    decay_all: bool = False
    dtype: str = "float32"
    val_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.weight_decay < 0:
            raise UserError(f"weight_decay must be 0 or more, got {self.weight_decay}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        if self.loss not in DISTANCES:
            raise UserError(f"loss must be one of {', '.join(DISTANCES)}, got {self.loss!r}")
        _ = self.schedule

    @property
    def schedule(self) -> Schedule:
        """Cosine (paper A.2) after the rise. Raises ValueError for what cannot be."""
        return Schedule(self.steps, self.lr, self.warmup, floor=self.min_lr)
