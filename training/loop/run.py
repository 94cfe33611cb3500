"""The one training loop: rate, step, check, log, validate, checkpoint. Stages 2 and 3 and all probes run in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from training.loop.checkpoints import Diverged, load_checkpoint, save_checkpoint
from training.loop.distributed import ALONE, Processes
from training.loop.log import TrainingLog
from training.loop.optimization import set_learning_rate
from training.loop.schedule import Schedule
from training.loop.settings import USUAL_PACE, Pace

LOG_EVERY = 10  # steps


def resume(checkpoint: Path | None, module: nn.Module, optimizer: Optimizer) -> int:
    """Put the state of a checkpoint into module and optimizer, if there is one; returns how many steps are done.

    Raises:
        BadCheckpoint: the file is damaged or belongs to another model.
    """
    facts = None if checkpoint is None else load_checkpoint(checkpoint, module, optimizer)
    return 0 if facts is None else facts["step"]


def run_steps(
    module: nn.Module,
    optimizer: Optimizer,
    schedule: Schedule,
    loss: Callable[[int], Tensor],
    log: TrainingLog,
    first: int,
    *,
    checkpoint: Path | None,
    pace: Pace = USUAL_PACE,
    limit: Callable[[], float] = lambda: math.inf,
    explain: Callable[[float, float, range], Exception] | None = None,
    validate: Callable[[int], dict[str, float]] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Train `module` in place from step `first` to the end of the schedule.

    What is random in a step must follow from the step's number or from torch's random state, which checkpoints hold:
    then a run that is killed and started again ends, on the CPU, bit for bit as one that was not.

    Args:
        module: whose weights are kept in checkpoints.
        optimizer: of what is trained.
        schedule: length and learning rates.
        loss: step -> a scalar, or one loss for each of several parts that share no weight; their sum is made small.
        log: told of everything.
        first: steps already done, from `resume`.
        checkpoint: the file; None keeps none.
        pace: how often there is a checkpoint and a validation; the last step has both.
        limit: asked for once, after a loss; a mean loss beyond it is an error.
        explain: loss, limit and the steps since the last look -> that error.
        validate: steps done -> numbers for the log. On the first process alone.
        processes: this one and the others.

    Raises:
        Diverged: the loss is no number, or (unless `explain` knows better) beyond the limit; the last checkpoint is
            left as it is.
        OutputError: a checkpoint cannot be written.
    """
    device = next(module.parameters()).device
    check_every = 1 if device.type == "cpu" else LOG_EVERY  # looking at the loss makes a GPU wait
    val_every = pace.val_every or max(1, schedule.steps // 10)
    highest: float | None = None
    looked = first
    for step in range(first, schedule.steps):
        rate = schedule.rate(step)
        set_learning_rate(optimizer, rate)
        losses = loss(step)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()

        done = step + 1
        last = done == schedule.steps
        if done % check_every == 0 or last:
            value = losses.mean().item()
            highest = limit() if highest is None else highest
            if not value < highest:
                raise (explain or _diverged)(value, highest, range(looked, done))
            log.steps_done(done - looked)
            looked = done
        if done % LOG_EVERY == 0 or last:
            log.training(done, value, rate)
        if validate is not None and (done % val_every == 0 or last) and processes.first:
            log.write(done, **validate(done))
            log.resume()
        if checkpoint is not None and (done % pace.checkpoint_every == 0 or last) and processes.first:
            save_checkpoint(checkpoint, module, optimizer, done, {})
            log.resume()


def _diverged(loss: float, limit: float, steps: range) -> Diverged:
    return Diverged(f"the loss is {loss} at step {steps.stop}; use a smaller learning rate or a longer warm-up")
