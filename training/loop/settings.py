"""What the trainings of stages 2 and 3 are told alike: each field is an option of their command lines."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from timm_dvt.errors import UserError
from timm_dvt.options import check, option
from training.common.backbone import DTYPES
from training.common.command import whole
from training.loop.distance import DISTANCES
from training.loop.distributed import Processes
from training.loop.order import split_places
from training.loop.schedule import Schedule

Settings = TypeVar("Settings", bound="TrainingSettings")


class Epochs(int):
    """A length in passes over the samples."""


class AtBatch256(float):
    """A learning rate for batches of 256, and times sqrt(batch / 256) for others."""


class OverAll(int):
    """A batch's size over all processes."""


def steps_or_share(text: str) -> int | float:
    """A number of steps, or with a percent sign a share of all steps below 1, for argparse."""
    if not text.endswith("%"):
        return whole(text)
    share = float(text[:-1]) / 100
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"must be from 0% to below 100%, got {text}")
    return share


@dataclass(frozen=True)
class Pace:
    """How a training is run, which decides nothing of its weights."""

    workers: int | None = option(
        None,
        "threads that read ahead; 0 reads between steps (default: 2; 0 on a CPU, all of which the training needs)",
        least=0,
        metavar="N",
    )
    checkpoint_every: int = option(200, "steps; changes no result (%(default)s)", least=1, metavar="N")
    val_every: int | None = option(None, "steps between validations (default: ten in a run)", least=1, metavar="N")


USUAL_PACE = Pace()


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What decides the weights that a training ends with, beside its data and its model.

    Until `settled`, as a command line says it: the length in `Epochs`, the batch of each process, the rate `AtBatch256`
    and the warm-up as a share of the steps below 1 may stand where afterwards there are steps, all samples of a step, a
    rate and steps. A subclass declares the option of val_fraction, the share of samples not trained on; that of seed
    comes with the model's.

    Raises:
        UserError: a value that cannot be.
    """

    steps: int = option(
        Epochs(10),
        "optimizer steps, instead of epochs",
        least=1,
        metavar="N",
        beside={"--epochs": {"help": "(default: the paper's 10)", "least": 1, "type": Epochs, "metavar": "EPOCHS"}},
    )
    batch_size: int = option(
        64,
        "of each process, so that 2 processes at 32 do what one does at 64 (default: the paper's %(default)s)",
        least=1,
    )
    loss: str = option("norm", "see training/loop/distance.py", choices=DISTANCES)
    lr: float = option(
        2e-4,
        "highest; a cosine from there (default: 0.0002, or as --base-lr has it)",
        least=0,
        beside={
            "--base-lr": {
                "help": "highest at a batch of 256, and times sqrt(batch / 256) at others",
                "least": 0,
                "type": AtBatch256,
                "metavar": "LR",
            }
        },
    )
    min_lr: float = option(0.0, "at the end (%(default)s)", least=0)
    warmup: float = option(0, "steps, or N%%, that lr rises first", type=steps_or_share, metavar="N")
    weight_decay: float = option(0.01, "of AdamW (%(default)s)", least=0)
    decay_all: bool = option(
        False, "decay position embeddings, norms and biases too (default: matrices alone, as timm)"
    )
    dtype: str = option("float32", "bfloat16: by autocast (%(default)s)", choices=list(DTYPES))
    val_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        if not isinstance(self.lr, AtBatch256):
            _ = self.schedule

    @property
    def schedule(self) -> Schedule:
        """Cosine (paper A.2) after the rise. Raises UserError for what cannot be."""
        return Schedule(self.steps, self.lr, int(self.warmup), floor=self.min_lr)

    def settled(self: Settings, count: int, source: str, processes: Processes) -> Settings:
        """These settings for so many samples, those held out among them; `source` says in errors where they are.

        Raises:
            UserError: no sample is left to train on, or a warm-up that cannot be.
        """
        training, _ = split_places(count, self.val_fraction, self.seed)
        if not training:
            raise UserError(f"{source}: too few for --val-fraction {self.val_fraction}")
        of_each = (
            max(1, self.batch_size // processes.count) if isinstance(self.batch_size, OverAll) else self.batch_size
        )
        batch_size = of_each * processes.count
        steps = -(-self.steps * len(training) // batch_size) if isinstance(self.steps, Epochs) else self.steps
        warmup = self.warmup if isinstance(self.warmup, int) else int(self.warmup * steps)
        if warmup >= steps:
            raise UserError(f"warmup must be from 0 to below the {steps} steps of the run, got {warmup}")
        lr = self.lr * (batch_size / 256) ** 0.5 if isinstance(self.lr, AtBatch256) else self.lr
        return replace(self, steps=steps, batch_size=batch_size, warmup=warmup, lr=lr)


# What the paper's repository has in stages 2 and 3.
REPOSITORY: dict[str, Any] = {
    "lr": AtBatch256(2e-4),
    "warmup": 0.15,
    "min_lr": 1e-6,
    "loss": "mse",
    "weight_decay": 1e-5,
    "decay_all": True,
}
