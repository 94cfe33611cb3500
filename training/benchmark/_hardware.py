"""What a benchmark runs on, by name, and clocks that wait for it."""

import time
from collections.abc import Callable

import torch


def hardware(device: torch.device) -> str:
    """The GPU's name, or how many threads of the CPU PyTorch takes."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def waiting(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """A clock that first waits for what the device has been told to do."""
    if device.type != "cuda":
        return clock

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return synchronized
