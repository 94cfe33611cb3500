"""One process or many: the same script runs alone or under torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process's number and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            distributed.barrier()

    def part(self, step: int, batch_size: int) -> range:
        """Of the `batch_size` samples of a step, numbered through the whole run, those that this process takes.

        With a seed they decide all that is random, so that a run that continues finds the same ones again.
        """
        size = batch_size // self.count
        first = step * batch_size + self.rank * size
        return range(first, first + size)

    def share(self, model: nn.Module) -> nn.Module:
        """A model whose gradients are averaged over all processes; all start with the first one's weights."""
        return DistributedDataParallel(model) if self.count > 1 else model


ALONE = Processes()


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that torchrun started, if it did.

    By NCCL on GPUs of their own; by gloo on CPUs, and where processes share a GPU, which NCCL refuses.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    alone = device.type == "cuda" and torch.cuda.device_count() >= here
    distributed.init_process_group("nccl" if alone else "gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
