"""Ctrl-C ends a command from its first instant, by a line and exit code 130; what cannot be printed ends none."""

import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType


def is_command(modules: str = r"(timm_dvt|training)[.\s]") -> bool:
    """Whether this process is one of our commands, and not somebody's program that imports the package.

    While a package is imported on behalf of `python -m`, sys.argv begins with "-m" and names no module.

    Args:
        modules: a pattern of what may stand behind `python -m`.
    """
    if Path(sys.argv[0]).stem == "timm-dvt":
        return True
    return sys.argv[0] == "-m" and bool(re.search(rf"\s-\w*m\s?{modules}", " ".join([*sys.orig_argv, ""])))


def guard() -> None:
    """Let Ctrl-C end this process at once before its `main`, and without a traceback where `main` handles it not.

    Libraries that are interrupted in the middle of an import make other errors of it, or swallow it.
    """
    signal.signal(signal.SIGINT, _stop)
    sys.excepthook = _hook


def _stop(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_name == "main":
            raise KeyboardInterrupt
        frame = frame.f_back
    _leave()


def _hook(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, traceback)


def _leave() -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)  # Python itself would end by the signal, which is no exit code


def let_print() -> None:
    """Let a command go on where stdout is closed (`>&-`), or a character cannot be printed, and becomes a ?."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if name == "stdout" else "backslashreplace")


if is_command():
    let_print()
if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup's is another
    guard()
