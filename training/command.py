"""What long commands do alike: help from a module's docstring, errors as exit codes, one run to a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from timm_dvt import CheckpointError
from training.checkpoints import Diverged
from training.distributed import Processes, claim
from training.shared_folder import OutputError, SharedFolder


def help_from(doc: str | None) -> dict[str, Any]:
    """Arguments of an ArgumentParser: a docstring's first paragraph above the options, the rest as it is below."""
    head, rest = (doc or "").split("\n\n", 1)
    return {"description": head, "epilog": rest, "formatter_class": argparse.RawDescriptionHelpFormatter}


def flush_subnormals() -> None:
    """Let this process's CPU take numbers below 1e-38 for 0, which they are to any training.

    Second moments of AdamW get there (they are squares of gradients), and some processors are ten to twenty times
    slower on them. To be called before threads compute: they take the setting over from the one that starts them.
    """
    torch.set_flush_denormal(True)


def complain(code: int, error: Exception | str) -> int:
    """Say what is wrong on standard error; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code


def exit_code(train: Callable[[], object]) -> int:
    """Train, and return what the command exits with.

    0 done; 1 the loss diverged; 2 the command, the model or the data are wrong; 3 the folder cannot be written;
    130 stopped by Ctrl-C.
    """
    flush_subnormals()
    try:
        train()
    except OutputError as error:
        return complain(3, f"{error}\nOnce that is settled, run the same command again to continue.")
    except Diverged as error:
        return complain(1, error)
    except (ValueError, TypeError, CheckpointError) as error:
        return complain(2, error)
    except KeyboardInterrupt:
        return complain(130, "stopped; run the same command again to continue from the last checkpoint.")
    return 0


@contextmanager
def only_run(out: str, ranks: Processes, describe: Callable[[], dict[str, Any]]) -> Iterator[Path]:
    """Have a folder for this run alone, begun with the same settings or new; all processes go in and out together.

    Args:
        out: the folder, made if need be.
        ranks: this process and the others; the first one claims the folder for all.
        describe: makes what settings.json says; asked of the first process alone.

    Raises:
        ValueError: another run is training into the folder, or it was begun with other settings.
        OutputError: the folder cannot be written.
    """
    with SharedFolder(out) as folder, claim(folder, ranks) as mine:
        if not mine:
            raise ValueError(f"another process is training into {out}")
        if ranks.first:
            folder.settle(describe())
        ranks.wait()
        yield folder.path
        ranks.wait()
