"""Training of small heads on frozen features: AdamW, warm-up, decay, checkpoints that a killed run goes on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from timm_dvt.saving import write_whole
from training.evaluate.runner import Run

CHECKPOINT_SECONDS = 60.0


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
    """Train `head` in place, in `steps` steps.

    The images and all randomness of a step follow from the run's seed and the step's number alone, so that a
    run that was killed and started again ends as an uninterrupted one.

    Args:
        head: what is trained.
        loss: of a batch of image indices.
        count: number of training images; each is used once before any is used again.
        run: seed and checkpoint file.
        recipe: the task's settings.
        steps: of AdamW.
        decay: fraction of the steps done -> factor of the learning rate, on top of the warm-up.
        label: of the progress bar.
    """
    schedule = warmup_then(decay, steps, recipe.warmup)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    first = _restore(run.checkpoint, head, optimizer)
    head.train()
    saved = time.monotonic()
    with tqdm(total=steps, initial=first, desc=f"{label} ({run.state})", unit="step", leave=False) as bar:
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule(step)
            with torch.random.fork_rng():
                torch.manual_seed((run.seed + 1) * 1_000_003 + step)
                value = loss(draw(count, recipe.batch_size, step, run.seed))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
            if run.checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(run.checkpoint, step + 1, head, optimizer)
                saved = time.monotonic()
    head.eval()


def draw(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The images of a step: a new order each epoch, decided by seed and epoch; the last short batch is left out."""
    batch_size = min(batch_size, count)
    epoch, place = divmod(step, count // batch_size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    return order[place * batch_size:(place + 1) * batch_size].tolist()


def warmup_then(decay: Callable[[float], float], steps: int, warmup: int) -> Callable[[int], float]:
    """A schedule: linear warm-up over `warmup` steps, times `decay` of the fraction of all steps done."""
    return lambda step: min(1.0, (step + 1) / max(1, warmup)) * decay(step / steps)


def stepped(milestones: Sequence[float], factor: float = 0.1) -> Callable[[float], float]:
    """A decay by `factor` at each milestone, a fraction of all steps."""
    return lambda done: factor ** sum(done >= milestone for milestone in milestones)


def cosine(done: float) -> float:
    """A decay from 1 to 0 along half a wave, of the fraction of all steps done."""
    return (1 + math.cos(math.pi * done)) / 2


def _restore(path: Path | None, head: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    if path is None or not path.exists():
        return 0
    state = torch.load(path, map_location=next(head.parameters()).device, weights_only=True)
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _save(path: Path, step: int, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "head": head.state_dict(), "optimizer": optimizer.state_dict()}
    write_whole(path, lambda temporary: torch.save(state, temporary))
