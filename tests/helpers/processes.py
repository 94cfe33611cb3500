"""Commands of training in processes of their own: started, killed while they train, and compared by their weights."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file


def start(*command: str) -> subprocess.Popen:
    """Start python -m COMMAND, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, **pipes)


def torchrun(port: int, *command: str) -> subprocess.Popen:
    """Start COMMAND on two processes that meet at a port of their own."""
    address = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return start("torch.distributed.run", "--nproc-per-node", "2", *address, "-m", *command)


def kill_at_random_moments(begin: Callable[[], subprocess.Popen], out: Path, times: int) -> int:
    """Start a training into `out` and kill it, again and again; returns how often it died before it was done."""
    moments, killed = random.Random(times), 0
    for _ in range(times):
        process = begin()
        began = (out / "log.jsonl").stat().st_mtime_ns if (out / "log.jsonl").exists() else 0
        while process.poll() is None:  # until training, not importing, is what it does
            if (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_mtime_ns != began:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    return killed


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
