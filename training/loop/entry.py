"""How a training command begins and ends: one run to a folder, errors as exit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from timm_dvt.errors import UserError
from timm_dvt.shared_folder import SharedFolder, explain
from training.common.command import exit_code_of, flush_subnormals
from training.common.memory import keep_freed_memory
from training.loop.checkpoints import CHECKPOINT
from training.loop.distributed import Processes
from training.loop.log import LOG


def exit_code(train: Callable[[], None]) -> int:
    """Train, and return what the command exits with.

    0 done; 1 the loss diverged; 2 the command, the model or the data are wrong; 3 the folder cannot be written;
    130 stopped by Ctrl-C.
    """
    flush_subnormals()
    keep_freed_memory()
    return exit_code_of(train, os_error=3)  # of files that are read, errors of other kinds tell


@contextmanager
def only_run(
    out: str, processes: Processes, describe: Callable[[], dict[str, Any]], undecided: Sequence[str] = ()
) -> Iterator[Path]:
    """Have a folder for this run alone, begun with the same settings or new; all processes go in and out together.

    Args:
        out: the folder, made if need be.
        processes: this one and the others; the first one claims the folder for all.
        describe: makes what settings.json says; asked of the first process alone.
        undecided: settings that may still be others than the folder was begun with, as long as no step was taken.

    Raises:
        ValueError: another run is training into the folder, or it was begun with other settings.
        OutputError: the folder cannot be written.
    """
    with SharedFolder(out) as folder, folder.claim("training") if processes.first else nullcontext(True) as mine:
        if not mine:
            raise UserError(f"another process is training into {out}")
        if processes.first:
            folder.settle(describe(), () if (folder.path / LOG).exists() else undecided, begun=CHECKPOINT)
        processes.wait()
        try:
            yield folder.path
        except OSError as error:  # of files that are read, errors of other kinds tell
            raise explain(error, Path(error.filename or folder.path)) from error
        folder.check()
        processes.wait()
