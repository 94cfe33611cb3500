"""Training of small heads on frozen features: what a task's settings say, in the one training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from training.evaluate.runner import Run
from training.loop.log import TrainingLog
from training.loop.order import positions
from training.loop.run import resume, run_steps
from training.loop.schedule import Schedule

CHECKPOINT_EVERY = 100  # steps


class Recipe(Protocol):
    """What of a task's settings decides how its head is trained: AdamW with betas 0.9 and 0.999."""

    @property
    def batch_size(self) -> int: ...

    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def warmup(self) -> int: ...


def train(
    head: nn.Module,
    loss: Callable[[list[int]], Tensor],
    count: int,
    run: Run,
    recipe: Recipe,
    *,
    steps: int,
    decay: Callable[[float], float],
    label: str,
) -> None:
    """Train `head` in place, in `steps` steps; a run that was killed goes on from its checkpoint.

    Args:
        head: what is trained.
        loss: of a batch of image indices.
        count: number of training images; each is used once before any is used again.
        run: seed and checkpoint file.
        recipe: the task's settings.
        steps: of AdamW.
        decay: fraction of the steps done -> factor of the learning rate, on top of the warm-up.
        label: of the progress bar.

    Raises:
        Diverged: the loss is no number.
    """
    schedule = Schedule(steps, recipe.lr, recipe.warmup, decay, overlap=True)
    size = min(recipe.batch_size, count)
    # Every parameter decays, norms and biases among them, as in the published protocols.
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    first = resume(run.checkpoint, head, optimizer)
    head.train()
    name = f"{label} ({run.state})"
    with TrainingLog(None, steps, first, batch_size=size, samples=count, label=name) as log:
        run_steps(
            head,
            optimizer,
            schedule,
            lambda step: loss(positions(count, step * size, (step + 1) * size, run.seed)),
            log,
            first,
            checkpoint=run.checkpoint,
            checkpoint_every=CHECKPOINT_EVERY,
        )
    head.eval()
