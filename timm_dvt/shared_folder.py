"""An output folder that several processes fill at once and that survives kill -9 and a full disk.

Who does what is settled by POSIX byte-range locks (`fcntl.lockf`) on one file, `.locks`: byte 0 guards the
folder's shared files, and each piece of work has a byte of its own, at an offset hashed from its name. Why
these locks and no others:

- The kernel drops them when their owner dies, by kill -9 too, so no claim is ever stale. Claim files made
  with O_EXCL would have to be judged by the process id in them or by their age: a guess, and on another
  machine a bad one.
- They hold between machines on NFS (with its lock service), Lustre (mounted with `flock`), GPFS and CephFS.
  On a file system without locks, taking one fails with an error that says so; nobody works unprotected by
  accident. (An NFS mount with `local_lock` does lie. Two machines may then do the same work twice.)
- One file of zero bytes serves a million claims.

Windows has none of them: there a folder is for one process at a time, which is said.

Their oddity is that they belong to the process: two `SharedFolder`s on one folder inside one process do not
exclude each other, and closing one drops the locks of both. So: one to a process.
"""

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from timm_dvt.errors import UserError
from timm_dvt.weights.files import folder_path, write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Self = TypeVar("Self", bound="SharedFolder")
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would write line feeds as two bytes
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class SettingsDiffer(UserError):
    """The folder was begun with other settings than this run's."""


class OutputError(OSError):
    """The output folder cannot be written: a full disk, above all. Nothing half-written is left."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, through a power cut too.

    Missing folders are made. The temporary file `.NAME.tmp`, or of a long name `.DIGEST.tmp`, lies beside the
    target and always has the same name, so the next try overwrites what a killed process left of it. The caller
    holds the lock that makes it the only writer.

    Raises:
        OutputError: no room, a quota, a file size limit, or any other failure to write. The file that was
            there before, if any, is untouched, and the temporary one is gone.
    """

    def fill(temporary: Path) -> None:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)

    name = os.fsencode(path.name)
    kept = path.name if len(name) <= 250 else hashlib.sha256(name).hexdigest()  # a name has 255 bytes at the most
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, fill, path.with_name(f".{kept}.tmp"))
        _sync_folder(path.parent)
    except OSError as error:
        raise explain(error, path, len(data)) from error


class SharedFolder:
    """An output folder, made if need be, and this process's locks in it. Use it as a context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = folder_path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._locks = os.open(self.path / ".locks", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise explain(error, self.path) from error

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up all locks."""
        os.close(self._locks)

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Be the only process at work on `name` while the block runs.

        Gives False, at once, if another process is at it; with `wait`, waits until that one is finished or
        dead.
        """
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        offset = 1 + (int.from_bytes(digest[:8], "big") >> 4)  # 60 bits: file offsets are signed 64-bit
        if not self._lock(offset, wait):
            yield False
            return
        try:
            yield True
        finally:
            self._unlock(offset)

    def check(self) -> None:
        """Raise OutputError if the folder was deleted or replaced since it was opened: nothing may be put there."""
        try:
            same = os.path.samestat(os.fstat(self._locks), os.stat(self.path / ".locks"))
        except FileNotFoundError:
            same = False
        if not same:
            raise OutputError(errno.ENOENT, f"{self.path} was deleted or replaced while it was written")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process to change the folder's shared files (index, settings) while the block runs."""
        self.check()
        self._lock(0, wait=True)
        try:
            yield
        finally:
            self._unlock(0)

    def settle(self, settings: Mapping[str, Any], undecided: Sequence[str] = (), begun: str = "") -> None:
        """Write settings.json if the folder has none; otherwise make sure that it says the same.

        Args:
            undecided: top-level settings that may differ; the file then says what they are now.
            begun: a file that is there only after settings.json.

        Raises:
            SettingsDiffer: it does not; the message names each setting that differs, and both values. Or it is lost.
        """
        path = self.path / "settings.json"
        wanted = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        with self.alone():
            if begun and (self.path / begun).exists() and not path.exists():
                raise SettingsDiffer(f"{path} is lost, which says what {begun} is of; put it back, or delete both")
            try:
                stored = json.loads(path.read_text()) if path.exists() else wanted
            except (OSError, ValueError) as error:
                raise SettingsDiffer(
                    f"{path} is damaged, or cannot be read ({error}); put it back, or use another folder"
                ) from error
            decided = ({k: v for k, v in values.items() if k not in undecided} for values in (wanted, stored))
            ours, theirs = map(_flatten, decided)
            differences = [
                f"  {name}: the folder has {_show(theirs, name)}, this run has {_show(ours, name)}"
                for name in dict.fromkeys([*theirs, *ours])
                if _show(theirs, name) != _show(ours, name)
            ]
            if differences:
                raise SettingsDiffer(
                    f"{self.path} was begun with other settings; use those, or another folder:\n"
                    + "\n".join(differences)
                )
            if not path.exists() or stored != wanted:
                write_atomically(path, (json.dumps(wanted, indent=2) + "\n").encode())

    def append(self, file_name: str, record: Mapping[str, Any]) -> None:
        """Add one line of JSON to a file of the folder.

        A line torn by a process that was killed while it wrote is cut off first. If there is no room, the
        file is left as it was. Raises OutputError.
        """
        path = self.path / file_name
        line = (json.dumps(record) + "\n").encode()
        with self.alone():
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _BINARY, 0o666)
                try:
                    end = _end_of_last_whole_line(descriptor)
                    os.ftruncate(descriptor, end)
                    try:
                        _write_all(descriptor, line)
                        os.fsync(descriptor)
                    except OSError:
                        os.ftruncate(descriptor, end)
                        raise
                finally:
                    os.close(descriptor)
            except OSError as error:
                raise explain(error, path, len(line)) from error

    def _lock(self, offset: int, wait: bool) -> bool:
        if fcntl is None:
            warnings.warn("this system has no POSIX locks: only one process may write to a folder", stacklevel=4)
            return True
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, offset)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN) and not wait:
                return False
            raise OutputError(
                error.errno,
                f"the file system of {self.path} gives no locks ({error.strerror}): start the lock service "
                "of NFS, mount Lustre with -o flock, or write to a local disk",
            ) from error
        return True

    def _unlock(self, offset: int) -> None:
        if fcntl is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, offset)


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Read a file of JSON lines from byte `start` on: each record, and the byte where the next one starts.

    A last line without its end is being written, or a killed process tore it: it is left for later. Any other
    line that is no JSON is left out, with a warning. A missing file has no lines.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                warnings.warn(f"left out a damaged line of {path}: {line[:80]!r}", stacklevel=2)
                continue
            yield record, start


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a write may be cut short: by a signal, by 2 GiB, by the last free block
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    if fcntl is None:  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _end_of_last_whole_line(descriptor: int) -> int:
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 4096)
        os.lseek(descriptor, start, os.SEEK_SET)
        newline = os.read(descriptor, end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def explain(error: OSError, path: Path, size: int = 0) -> OutputError:
    """The error for a file or folder that cannot be written, of `size` bytes if that is known."""
    if isinstance(error, OutputError):
        return error
    if error.errno in _NO_ROOM:
        much = f" ({size / 1e6:.2f} MB)" if size else ""
        return OutputError(error.errno, f"no room for {path}{much}: {error.strerror}. Nothing half-written was left")
    return OutputError(error.errno, f"cannot write {path}: {error.strerror or error}")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        whole = f"{prefix}{name}"
        flat.update(_flatten(value, f"{whole}.") if isinstance(value, dict) else {whole: value})
    return flat


def _show(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "nothing"
