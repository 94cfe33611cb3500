"""What features are taken of: images of a file, a folder, a list, a video or a streamed data set, in shards."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from timm_dvt.errors import ImageError, UserError
from timm_dvt.extraction import hub, video
from timm_dvt.extraction.formats import Record
from timm_dvt.image_files import Source, decode_rgb, given_images, read_file

AHEAD = 16  # images of a stream that wait to be decoded
Read = Callable[[], Image.Image]  # raises ImageError


@dataclass
class ImageSource:
    """Images in their order, each with a name.

    Attributes:
        identity: by which a folder that was begun knows them again.
        listed: the files; empty for a stream.
        stream: begins to read a stream.
        count: how many; None for a stream that was not yet read to its end.
        expected: how many a stream says that it has.
        video: the file, if it is one.
    """

    identity: dict[str, Any]
    listed: list[Source]
    stream: Callable[[], Iterator[Read]] | None = None
    count: int | None = None
    expected: int | None = None
    video: Path | None = None

    def walk(self, length: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record, Read]]:
        """Shard, record, reader of each image of the shards of `length` images that are wanted; a stream gets a count.

        Args:
            wanted: asked once for each shard, when it is come to.
        """
        if self.stream is None:
            for shard, first in enumerate(range(0, len(self.listed), length)):
                if wanted(shard):
                    for source in self.listed[first : first + length]:
                        record = {"name": source.shown}
                        yield shard, record, partial(_read, source.path, record)
            return
        number, taken = -1, False
        try:
            for number, read in enumerate(_ahead(self.stream())):
                if number % length == 0:
                    taken = wanted(number // length)
                if taken:
                    yield number // length, {"name": f"{number:06d}"}, read
        except UserError as error:  # a network that fails in the middle, say
            raise UserError(f"{error}; the same command continues") from error
        self.count = number + 1

    def changed(self, shards: Mapping[int, list[Record]], length: int) -> list[int]:
        """Those of which a file is another now, or gave an error and can be read now."""

        def differs(shard: int) -> bool:
            files = self.listed[shard * length : (shard + 1) * length]
            return any(_changed(source.path, record) for source, record in zip(files, shards[shard]))

        return list(filter(differs, shards))


def open_source(where: str, out: Path) -> ImageSource:
    """The images that SOURCE stands for, without those below `out`. Raises UserError where there are none."""
    path = Path(where)
    if where.startswith(hub.SCHEME):
        source = _stream(
            {"source": where, "names": "rows"},
            lambda: (partial(_row, *row) for row in enumerate(hub.stream_images(where))),
        )
        source.expected = hub.stream_length(where)
        return source
    if path.is_file() and path.suffix.lower() in video.SUFFIXES:
        identity = {"source": path.name, "bytes": path.stat().st_size}
        return _stream(identity, lambda: map(_frame, video.video_frames(path)), path)
    listed = given_images(where, out)
    names = hashlib.sha256("\n".join(source.name for source in listed).encode(errors="surrogateescape")).hexdigest()
    return ImageSource({"count": len(listed), "names": names}, listed, count=len(listed))


def _changed(path: Path, record: Record) -> bool:
    try:
        if "height" not in record:  # it was not decoded
            return _read(path, {}) is not None
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) == (record.get("bytes"), record.get("mtime_ns")):
            return False
        found = read_file(path)[1].sha256  # a copy of the images has times of its own
        return record.get("sha256", found) != found
    except (ImageError, OSError):
        return "height" in record


def _stream(identity: dict[str, Any], begin: Callable[[], Iterator[Read]], video: Path | None = None) -> ImageSource:
    if next(begin(), None) is None:  # before anything slow
        raise UserError(f"{identity['source']} holds no images")
    return ImageSource(identity, [], begin, video=video)


def _ahead(items: Iterator[Read]) -> Iterator[Read]:
    """The same, read by a thread a few ahead: a network is slow, and so is the decoding of a video."""
    pool = ThreadPoolExecutor(1, "stream")
    try:
        waiting = deque(pool.submit(next, items, None) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, record: Record) -> Image.Image:
    """Decode a file, and note in its record by what to know it again."""
    data, content = read_file(path)
    record |= asdict(content)
    return decode_rgb(data)


def _row(number: int, data: bytes | None) -> Image.Image:
    if data is None:  # it keeps its place, so that an image's name is the number of its row
        raise ImageError(f"row {number} has no image")
    return decode_rgb(data)


def _frame(pixels: Any) -> Read:
    return partial(Image.fromarray, pixels)
