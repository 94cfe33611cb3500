"""Commands of training in processes of their own: started, killed while they train, and compared by their weights."""

import contextlib
import importlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from training.evaluate.__main__ import main as evaluate
from training.evaluate.features import cached


def start(*command: str) -> subprocess.Popen:
    """Start python -m COMMAND, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", *command], env=environment, **pipes)


def in_this_process(command: list[str], stdout: int, stderr: BinaryIO, **more: Any) -> SimpleNamespace:
    """Instead of subprocess.run, for python -m COMMAND of training: saves the imports of each process."""
    main = importlib.import_module(command[2]).main if command[2] != "training.evaluate" else evaluate
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main(command[3:])
    stderr.write(errors.getvalue().encode())
    return SimpleNamespace(returncode=code, stdout=said.getvalue().encode())


def forked(work: Callable[[], object]) -> int:
    """Start a process that does this work at once, since what is imported here is so there too; returns its id."""
    child = os.fork()
    if not child:
        code = 1
        cached._READERS = ThreadPoolExecutor(1)  # threads do not come along
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


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
