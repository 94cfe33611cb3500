"""The one training loop: rate, step, check, log, validate, checkpoint. Stages 2 and 3 and all probes run in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.common.command import Diverged
from training.loop.checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from training.loop.distributed import ALONE, Processes
from training.loop.log import TrainingLog
from training.loop.optimization import autocast, make_adamw, set_learning_rate
from training.loop.reading_ahead import read_ahead, reading_threads
from training.loop.schedule import Schedule
from training.loop.settings import USUAL_PACE, Pace, TrainingSettings

LOG_EVERY = 10  # steps


def resume(checkpoint: Path | None, module: nn.Module, optimizer: Optimizer) -> int:
    """Put the state of a checkpoint into module and optimizer, if there is one; returns how many steps are done.

    Raises:
        BadCheckpoint: the file is damaged or belongs to another model.
    """
    return 0 if checkpoint is None else load_checkpoint(checkpoint, module, optimizer)


class Training:
    """What the loop trains and what it asks for: a module, its optimizer, a schedule, and a loss for each step.

    What is random in a step must follow from the step's number or from torch's random state, which checkpoints hold:
    then a run that is killed and started again ends, on the CPU, bit for bit as one that was not.
    """

    module: nn.Module  # in checkpoints
    optimizer: Optimizer
    schedule: Schedule

    def loss(self, step: int) -> Tensor:
        """A scalar, or one loss for each of several parts that share no weight; their sum is made small."""
        raise NotImplementedError

    def limit(self) -> float:
        """Asked for once, after a loss: a mean loss that is not below it is an error."""
        return math.inf

    def diverged(self, loss: float, limit: float, steps: range) -> Exception:
        """That error; it was one of these steps, the last if none were skipped."""
        return Diverged(f"the loss is {loss} at step {steps.stop}; use a smaller learning rate or a longer warm-up")

    def validate(self, step: int, log: TrainingLog) -> dict[str, float]:
        """Numbers for the log after so many steps; on the first process alone."""
        return {}


def run_steps(
    training: Training,
    log: TrainingLog,
    first: int,
    checkpoint: Path | None,
    pace: Pace = USUAL_PACE,
    processes: Processes = ALONE,
) -> None:
    """Train a module in place from step `first`, which `resume` told, to the end of the schedule.

    Args:
        checkpoint: the file; None keeps none.
        pace: how often there is a checkpoint and a validation; the last step has both.

    Raises:
        Diverged: the loss is no number, or (unless `diverged` knows better) beyond the limit; the last checkpoint is
            left as it is.
        OutputError: a checkpoint cannot be written.
    """
    module, optimizer, schedule = training.module, training.optimizer, training.schedule
    device = next(module.parameters()).device
    check_every = 1 if device.type == "cpu" else LOG_EVERY  # looking at the loss makes a GPU wait
    val_every = pace.val_every or max(1, schedule.steps // 10)
    highest: float | None = None
    looked = first
    for step in range(first, schedule.steps):
        rate = schedule.rate(step)
        set_learning_rate(optimizer, rate)
        losses = training.loss(step)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()

        done = step + 1
        last = done == schedule.steps
        if done % check_every == 0 or last:
            value = losses.mean().item()
            highest = training.limit() if highest is None else highest
            if not value < highest:
                raise training.diverged(value, highest, range(looked, done))
            log.steps_done(done - looked)
            looked = done
        if done % LOG_EVERY == 0 or last:
            log.training(done, value, rate)
        if (done % val_every == 0 or last) and processes.first:
            log.write(done, **training.validate(done, log))
            log.resume()
        if checkpoint is not None and (done % pace.checkpoint_every == 0 or last) and processes.first:
            save_checkpoint(checkpoint, module, optimizer, done)
            log.resume()


class FolderTraining(Training):
    """A training of stage 2 or 3, which a folder keeps: a subclass says what is read and what the loss of that is."""

    batches: Iterator[Tensor]

    def __init__(
        self, module: nn.Module, settings: TrainingSettings, samples: int, device: torch.device, processes: Processes
    ) -> None:
        """
        Args:
            module: on the device. samples: how many it learns from.
        """
        self.module, self.samples, self.device, self.processes = module, samples, device, processes
        self.steps, self.batch_size, self.schedule = settings.steps, settings.batch_size, settings.schedule
        self.optimizer = make_adamw(module, settings.lr, settings.weight_decay, settings.decay_all)
        self.autocasting = autocast(device, settings.dtype)

    def start(self, first: int) -> None:
        """Called before step `first`, where the run begins or goes on."""

    def read(self, step: int) -> Tensor:
        """This process's part of the batch of a step; in a thread, some steps ahead."""
        raise NotImplementedError

    def run(self, folder: Path, pace: Pace = USUAL_PACE) -> None:
        """Train, or continue to train; the folder gets log, pictures and checkpoint.

        Raises:
            UserError: what is read cannot be.
            Diverged, BadCheckpoint, OutputError: see `run_steps` and `resume`.
        """
        first = resume(folder / CHECKPOINT, self.module, self.optimizer)
        self.start(first)
        self.model = self.processes.share(self.module)
        workers = reading_threads(self.device) if pace.workers is None else pace.workers
        self.batches = read_ahead((partial(self.read, step) for step in range(first, self.steps)), workers)
        size, samples, speaks = self.batch_size, self.samples, self.processes.first
        with TrainingLog(folder, self.steps, first, batch_size=size, samples=samples, speaks=speaks) as log:
            run_steps(self, log, first, folder / CHECKPOINT, pace, self.processes)
            if self.steps == 0 and speaks:
                log.write(0, **self.validate(0, log))
