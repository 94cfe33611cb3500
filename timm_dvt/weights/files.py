"""Files that appear whole or not at all."""

import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from timm_dvt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Write = Callable[[Path], object]


def folder_path(name: str | os.PathLike) -> Path:
    """The path of a folder to write. Raises UserError for "", which Path takes for the current folder."""
    if not os.fspath(name):
        raise UserError('the folder to write must have a name, got ""')
    return Path(name)


def write_whole(path: Path, write: Write, temporary: Path | None = None) -> None:
    """Have `write` fill a file beside the path, then put it in the path's place in one step.

    Args:
        temporary: that file; default `.NAME.XXXXXXXX`, a name that nobody else has. What killed processes left of those
            is deleted first. A name that is always the same is for one writer at a time.
    """
    if temporary is None:
        write_together({path: write})
        return
    with _filled(temporary, write, path):
        temporary.replace(path)


def write_together(files: Mapping[Path, Write]) -> None:
    """As `write_whole`, for files of one folder of which the last says what the others are.

    The last goes before the first new one comes: a process killed in between leaves a folder that does not load,
    instead of one that mixes old and new.
    """
    with ExitStack() as stack:
        stack.enter_context(_sharing(list(files)))
        new = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in files}
        for path, write in files.items():
            stack.enter_context(_filled(new[path], write, path))
        if len(files) > 1:
            list(files)[-1].unlink(missing_ok=True)
        for path in files:
            new[path].replace(path)


@contextmanager
def _filled(file: Path, write: Write, path: Path) -> Iterator[None]:
    """For the time of the block, a file of the usual mode that is filled and on the disk; errors name its `path`."""
    try:
        try:
            file.touch()
            mode = file.stat().st_mode
            write(file)
            file.chmod(mode)  # safetensors puts another in its place, which only its owner can read
            with open(file, "r+b") as written:  # Windows flushes what can be written to, and nothing else
                os.fsync(written.fileno())
        except SafetensorError as e:  # which has the system's error in words, of a full disk say
            number = re.search(r"os error (\d+)", str(e))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from e
        except OSError as e:
            if e.errno and e.filename is None:  # that of a full disk does not say which file has no room
                e.filename = str(path)
            raise
        yield
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def _sharing(paths: list[Path]) -> Iterator[None]:
    """A lock on the paths' folder that all who fill a file in it share; who gets it alone deletes what others left.

    A process that is killed gives it up, so what it left is told from what another is filling at this moment.
    """
    if fcntl is None:
        yield
        return
    left = re.compile(rf"\.({'|'.join(re.escape(path.name) for path in paths)})\.[a-z0-9_]{{8}}")
    folder = os.open(paths[0].parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # others write, or the file system has no locks
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in paths[0].parent.iterdir():
                if left.fullmatch(path.name):
                    path.unlink()
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)
