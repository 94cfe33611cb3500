"""Commands of training in processes of their own: started, killed while they train, and compared by their weights."""

import atexit
import contextlib
import importlib
import io
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest import mock

import torch
from safetensors.torch import load_file

from timm_dvt.bars import tqdm

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    [
        "training.make_denoiser",
        "training.distill",
        "training.evaluate.__main__",
        "training.reproduce",
        "timm_dvt.extraction.command",
    ]
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Python:
    """`python WORDS` in a process of its own, forked from one that has imported what our commands import.

    Those imports take most of the time of a short command. Who tests them, or what is read from the environment while
    they run, starts a new Python instead. As far as it is used this is a `subprocess.Popen` with text pipes.
    """

    def __init__(self, *words: str, **environment: str) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        with mock.patch.dict(os.environ, ONE_THREAD | environment):
            given = (words, dict(os.environ), os.getcwd(), _Handed(out_end), _Handed(err_end))
            self._process = WARM.Process(target=_python, args=given)
            self._process.start()
        os.close(out_end)
        os.close(err_end)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as readers:
            texts = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            self.wait(timeout)
            return texts[0].result(), texts[1].result()


class _Handed:
    """A file descriptor that is handed to the new process, where it is an int."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self):
        return _taken, (reduction.DupFd(self.descriptor),)


def _taken(handed) -> int:
    return handed.detach()


def _python(words: tuple[str, ...], environment: dict[str, str], folder: str, out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, what, *arguments = words
    sys.argv = [kind, *arguments]
    try:
        if kind == "-m":
            sys.modules.pop(what, None)  # as main it runs anew
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(what, "-c", "exec"), vars(sys.modules["__main__"]))
    finally:
        atexit._run_exitfuncs()


def run(*words: str) -> tuple[int, str, str]:
    """`python WORDS` to its end: exit code, what it printed, and on the standard error."""
    process = Python(*words)
    printed = process.communicate()
    return process.wait(), *printed


def start(*command: str) -> Python:
    """Start python -m COMMAND, with one thread."""
    return Python("-m", *command)


def in_this_process(command: list[str], stdout: int, stderr: BinaryIO, **more: Any) -> SimpleNamespace:
    """Instead of subprocess.run, for python -m COMMAND of training: saves the imports of each process."""
    module = command[2] + (".__main__" if command[2] == "training.evaluate" else "")
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = importlib.import_module(module).main(command[3:])
    stderr.write(errors.getvalue().encode())
    return SimpleNamespace(returncode=code, stdout=said.getvalue().encode())


def reproducing(words: list[str]) -> Any:
    """Start `training.reproduce WORDS`, whose commands run in its own process, with one thread; returns the process.

    It is no fork of this one: where a test before has compiled a model, autograd refuses to work in forks.
    """
    process = WARM.Process(target=_reproduce, args=(words,))
    with mock.patch.dict(os.environ, ONE_THREAD):
        process.start()
    return process


def _reproduce(words: list[str]) -> None:
    from training import reproduce
    from training.reproduction import jobs

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the usual one is shared: killed with it, a fork keeps it
    with mock.patch.object(jobs.subprocess, "run", in_this_process):
        sys.exit(reproduce.main(words))


def forked(work: Callable[[], object]) -> int:
    """Start a process that does this work at once, since what is imported here is so there too; returns its id."""
    child = os.fork()
    if not child:
        code = 1
        tqdm.set_lock(threading.RLock())  # as above
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def torchrun(port: int, *command: str) -> Python:
    """Start COMMAND on two processes that meet at a port of their own."""
    address = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    return start("torch.distributed.run", "--nproc-per-node", "2", *address, "-m", *command)


def in_two(port: int, *command: str) -> tuple[list[int], str]:
    """COMMAND to its end on two processes that find each other as torchrun's do; exit codes, and all that was said."""
    meeting = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    two = [Python("-m", *command, **meeting, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    with ThreadPoolExecutor(2) as readers:
        said = list(readers.map(lambda process: process.communicate(300), two))
    return [process.wait() for process in two], str(said)


def kill_at_random_moments(begin: Callable[[], Python], out: Path, times: int) -> int:
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
