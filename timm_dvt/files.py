"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object], temporary: Path | None = None) -> None:
    """Have `write` fill a file beside the path, then put it in the path's place in one step.

    Args:
        temporary: that file; default one of a name that nobody else has. A name that is always the same leaves nothing
            behind for ever when a process is killed, but is for one writer at a time.
    """
    if temporary is None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())
    try:
        write(temporary)
        with open(temporary, "rb+") as file:  # Windows syncs what may be written alone
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
