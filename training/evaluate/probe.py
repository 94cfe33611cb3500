"""Training of small heads on frozen features: what a task's settings say, in the one training loop."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.evaluate.run import Run
from training.evaluate.tables import write_json
from training.loop.log import TrainingLog
from training.loop.order import positions
from training.loop.reading_ahead import read_ahead
from training.loop.run import Training, resume, run_steps
from training.loop.schedule import Schedule
from training.loop.settings import Pace

CHECKPOINT_EVERY = 100  # steps
Read = Callable[[Sequence[int], Sequence[np.random.Generator], int], Any]


def train(
    head: nn.Module,
    loss: Callable[[Any], Tensor],
    count: int,
    run: Run,
    recipe: Any,
    steps: int,
    decay: Callable[[float], float],
    label: str,
    read: Read | None = None,
    adjust: Callable[[Optimizer, int], None] | None = None,
    validations: Validations | None = None,
) -> None:
    """Train `head` in place, in `steps` steps; a run that was killed goes on from its checkpoint.

    Args:
        head: what is trained.
        loss: of a batch of image indices, or of what `read` makes of it.
        count: number of training images; each is used once before any is used again.
        run: seed and checkpoint file.
        recipe: the task's settings, of which batch_size, lr, weight_decay and warmup count: AdamW, betas 0.9 and 0.999.
        steps: of AdamW.
        decay: fraction of the steps done -> factor of the learning rate, on top of the warm-up.
        label: of the progress bar.
        read: image indices, a random generator for each that follows from seed and place, and the step -> a batch. Run
            ahead in threads where a GPU would wait for it.
        adjust: optimizer and step, called when the gradients are there and the step is about to be taken.
        validations: numbers of the head after some of the steps.

    Raises:
        Diverged: the loss is no number.
    """
    schedule = Schedule(steps, recipe.lr, recipe.warmup, decay, overlap=True)
    size = min(recipe.batch_size, count)
    # Every parameter decays, norms and biases among them, as in the published protocols.
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    probe = Probe(head, optimizer, schedule, loss, validations)
    first = resume(run.checkpoint, head, optimizer)

    def batch(step: int) -> Any:
        places = range(step * size, (step + 1) * size)
        indices = positions(count, places.start, places.stop, run.seed)
        if read is None:
            return indices
        return read(indices, [np.random.default_rng([run.seed, place]) for place in places], step)

    workers = min(8, os.cpu_count() or 1) if read is not None and run.device.type == "cuda" else 0
    probe.batches = read_ahead((partial(batch, step) for step in range(first, steps)), workers)
    if adjust is not None:
        optimizer.register_step_pre_hook(lambda which, *_: adjust(which, probe.step))
    head.train()
    name = f"{label} ({run.state})"
    with TrainingLog(None, steps, first, batch_size=size, samples=count, label=name) as log:
        pace = Pace(None, CHECKPOINT_EVERY, None if validations is None else validations.every)
        run_steps(probe, log, first, run.checkpoint, pace)
    head.eval()


@dataclass
class Probe(Training):
    """A head on its way: the loss of a batch, and numbers after some of the steps."""

    module: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    batch_loss: Callable[[Any], Tensor]
    validations: Validations | None
    batches: Iterator[Any] = iter(())
    step: int = 0

    def loss(self, step: int) -> Tensor:
        self.step = step
        return self.batch_loss(next(self.batches))

    def validate(self, step: int, log: TrainingLog) -> dict[str, float]:
        return {} if self.validations is None else self.validations(step)


class Validations:
    """Numbers of a head after some of its steps, kept beside its checkpoint; of which the best count.

    That is how the authors' repository reports (dvt/utils/collect_results.py), and what is best is known from the
    very images that the numbers are of: they flatter, most of all where the head is validated often.

    Attributes:
        every: steps between two; the last step has one too.
    """

    def __init__(self, head: nn.Module, run: Run, every: int, measure: Callable[[], dict[str, float]]) -> None:
        self.head, self.every, self._measure = head, every, measure
        self._file = None if run.checkpoint is None else run.checkpoint.with_suffix(".validations")
        self._validations: dict[str, dict[str, float]] = {}
        if self._file is not None and self._file.exists():
            self._validations = json.loads(self._file.read_text())

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        """Measure after so many steps; nothing comes back for the log."""
        self.head.eval()
        self._validations[str(step)] = self._measure()
        self.head.train()
        if self._file is not None:
            write_json(self._file, self._validations)
        return {}

    def best(self, key: str) -> dict[str, float]:
        """The numbers with the largest `key`; with KEY/last, that after the last step, and best_step."""
        last = self._validations[max(self._validations, key=int)]
        step = max(sorted(self._validations, key=int), key=lambda step: self._validations[step][key])
        return {**self._validations[step], f"{key}/last": last[key], "best_step": float(step)}
