"""The folder that an extraction fills: what it was begun with, and which shards are finished.

    OUT/settings.json   what decides the maps, and how they lie
    OUT/index.jsonl     one line a finished shard: its number, and name, fingerprint, size and grid of each image, or
                        its error; of two lines of a shard the later one counts
    OUT/errors.jsonl    one line an image that gave no maps, with the reason
    OUT/basis.safetensors, OUT/pictures, OUT/pictures.mp4    with --pca and --pictures, and of a video
    the maps            see timm_dvt/extraction/formats.py

A shard's files are there, whole, before its line is, so a line never lies; a process killed between the two leaves
files that the next run writes again, equal. Who does what is settled by locks (timm_dvt/shared_folder.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from timm_dvt.errors import UserError
from timm_dvt.extraction.formats import Layout, Record
from timm_dvt.image_files import SETTINGS
from timm_dvt.shared_folder import read_lines

INDEX, ERRORS = "index.jsonl", "errors.jsonl"
SHARD_BYTES = 2**27


class Index:
    """The finished shards of a folder, as far as they were read.

    Attributes:
        shards: images of each, by its number.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._read_to = folder / INDEX, 0
        self.shards: dict[int, list[Record]] = {}
        self.refresh()

    def refresh(self) -> Index:
        """Read what others finished since."""
        for line, end in read_lines(self._path, self._read_to):
            self._read_to = end
            self.shards[line["shard"]] = line["images"]
        return self

    def forget(self, shards: Iterable[int]) -> int:
        """Take these for unfinished, until a later line says otherwise; returns how many there are."""
        return len([self.shards.pop(shard) for shard in list(shards)])

    def images(self) -> Iterator[tuple[int, int, Record]]:
        """Shard, place in it, and record of each image, in order."""
        for shard in sorted(self.shards):
            for place, record in enumerate(self.shards[shard]):
                yield shard, place, record

    def padded(self, length: int, count: int | None) -> list[Record]:
        """Records of all `count` images, or of all up to the last that is known; nameless where there is none yet."""
        last = max(self.shards, default=0)
        records: list[Record] = [{"name": ""}] * (count or last * length + len(self.shards.get(last, ())))
        for shard, place, record in self.images():
            records[shard * length + place] = record
        return records


def shard_length(image_bytes: int, count: int | None) -> int:
    """Images of a shard: a power of two, of some 100 MB of maps, from 16 to 256, and few enough to be shared."""
    most = min(SHARD_BYTES // image_bytes, (count or 2048) // 32)
    return 1 << max(4, min(8, most.bit_length() - 1))


def read_layout(folder: Path) -> tuple[dict[str, Any], Layout]:
    """The settings of a folder, and how its variables lie. Raises UserError for a folder that is none of extract's."""
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        return settings, Layout(settings["shard"], settings["variables"], settings["dtype"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is no folder of `timm-dvt extract`: it has no {SETTINGS} of one") from error


def check_images(out: Path, identity: Mapping[str, Any]) -> None:
    """Raise UserError where a folder was begun with other images. All else of its settings is `settle`'s to compare."""
    try:
        theirs = json.loads((out / SETTINGS).read_text())["images"]
        then, now = map(_images, (theirs, identity))
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or none of an extraction
        return
    if theirs != identity:
        other = "; names or their order differ" if then == now else ""
        raise UserError(
            f"the images are not those that {out} was begun with ({then} then, {now} now{other}); give the "
            "same images again, or another --out: for all of these, or for a .txt list of the new ones alone"
        )


def _images(identity: Mapping[str, Any]) -> str:
    if "count" in identity:
        return f"{identity['count']} image{'s' * (identity['count'] != 1)}"
    return identity["source"] + (f" of {identity['bytes']} bytes" if "bytes" in identity else "")


def check_room(out: Path, layout: Layout, count: int | None, done: int, say: Callable[[str], object]) -> None:
    """Say what the rest of `count` images needs. Raises UserError where the disk has no such room."""
    each, free = layout.image_bytes, shutil.disk_usage(out).free
    if count is None:
        say(f"disk: {_amount(each)} an image, {_amount(free)} free")
        return
    need = max(0, count - done) * each
    say(f"disk: {count} images of {_amount(each)}, {_amount(need)} to be written; {_amount(free)} free")
    if need > free:
        half = "" if layout.dtype == "float16" else "--dtype float16, "
        raise UserError(
            f"no room in {out}: {_amount(need)} are needed and {_amount(free)} are free; take fewer images, "
            f"{half}--pca K or a smaller --size"
        )


def _amount(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
