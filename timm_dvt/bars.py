"""tqdm, whose bars are lines where they cannot be drawn over: in a file, a log of a cluster's, a pipe."""

import sys
from typing import Any

from tqdm import tqdm as _tqdm

LINE_EVERY = 10  # seconds


class tqdm(_tqdm):  # noqa: N801  its own name
    """A bar on a terminal; elsewhere a line now and then, and at its end if it stays: none of what is soon done."""

    def __init__(self, *args: Any, **options: Any) -> None:
        if not sys.stderr.isatty():
            seldom = dict.fromkeys(("delay", "mininterval", "maxinterval"), LINE_EVERY)
            options |= {"file": _Lines(sys.stderr), **seldom}
        super().__init__(*args, **options)


class _Lines:
    """A stream that makes a line of each state of a bar, whatever moves a terminal's cursor left out."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line:
            self._stream.write(f"{line}\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
