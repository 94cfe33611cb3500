"""Pairs of raw and clean feature maps on disk: one safetensors file an image, and one index.

    OUT/settings.json     what made the pairs: model, weights, layers, grid K, channels C, solver, ...
    OUT/index.jsonl       one line a finished image: which image, which file
    OUT/failures.jsonl    one line an image that gave no pair, with the reason
    OUT/3f/cat-3f09...safetensors    the maps of one image; in the header, where they come from
    OUT/.locks            see timm_dvt/shared_folder.py

A training run reads settings.json and index.jsonl, and opens a pair only to use it (`read_index`,
`read_pair`). A pair's file is there, whole, before its line is, so a line never lies. A process killed
between the two leaves a file without a line; the next run adds the line instead of doing the image again. A
pair is named after its image's name and content: equal names in two folders do not collide, and a changed
image is a new one. Its header has a checksum of each map, held against the map whenever one is read.

A pair may hold crops beside its whole image, each a raw map and F at the places of its patches: the views of stage 1
once more, for stage 2 to learn from.

A million images, for ViT-B at 518 px (K = 37, C = 768; a map has 2.1 MB in half precision, a pair three of them):

- Disk: 6.3 MB a pair, 6.3 TB in all; the paper's 10,000 images are 63 GB. Each crop adds 4.2 MB to a pair, so leave
  them out (`--crops 0`) where images are many: crops are for few. Full precision doubles it, ViT-S halves it.
- Folders: 256, named by two hexadecimal digits, of 3,900 files each, so no listing is ever long.
- Index: 243 bytes a line, 0.24 GB in all, read in 4 to 7 s (measured). A process keeps 0.4 GB to know its
  list and what is done; continuing costs one `stat` an image, and no image is read again.
- Time: a view is 0.30 TFLOP, 768 views 0.23 PFLOP: 2.3 s an image on a GPU that sustains 100 TFLOP/s, 27
  days in all (reckoned, not measured). Images are independent, so N GPUs need 1/N of that, on any number of
  machines that see the folder: the same command on each, no coordinator, one lock and one line an image.
- No shared file system: give each machine a part of the list (`split -n l/8 list.txt`) and an OUT of its own.
  The pairs can then be copied together and the indexes joined end to end: a pair's name depends on its image
  alone.
- Reading back: whole files of megabytes, in any order. A store that dislikes many small objects can hold each
  of the 256 folders as one tar.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timm_dvt.errors import UserError
from timm_dvt.image_files import Fingerprint, Source
from timm_dvt.shared_folder import SharedFolder, read_lines, write_atomically
from timm_dvt.version import __version__
from training.pairs.file import (
    PARTS,
    PRECISIONS,
    Maps,
    ValueTooLarge,
    encode_pair,
    pair_file,
    read_header,
    read_maps,
    read_pair,
    stored_part,
)

__all__ = ["PARTS", "ValueTooLarge", "read_maps", "read_pair", "stored_part"]  # of a pair, beside what is here

INDEX, FAILURES = "index.jsonl", "failures.jsonl"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the index.

    Attributes:
        image: the source image's name in its list.
        file: the pair, relative to the folder.
        sha256: of the source image's file.
        bytes, mtime_ns: size and time of the source image's file, by which a later run sees that it is still
            the same.
    """

    image: str
    file: str
    sha256: str
    bytes: int
    mtime_ns: int


class PairFolder:
    """A folder of pairs that this process, and others at the same time, fill. Use it as a context manager."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], precision: str = "half") -> None:
        """
        Args:
            path: made if it does not exist.
            settings: everything that decides what a pair holds; kept in settings.json.
            precision: "half" or "full", of the maps on disk.

        Raises:
            ValueError: no such precision.
            SettingsDiffer: the folder was begun with other settings.
            OutputError: the folder cannot be made or written.
        """
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
        self.path, self.precision = Path(path), precision
        self.settings = {**settings, "precision": precision}
        self._shared = SharedFolder(path)
        try:
            self._settle()
        except BaseException:
            self._shared.close()
            raise
        self._done: set[tuple[str, int, int]] = set()
        self._read_to = 0
        self._refresh(present=set(_pair_files(self.path)))

    def _settle(self) -> None:
        """Make sure that the folder was begun with these settings; where its settings.json is lost, a pair tells."""
        if not (self.path / "settings.json").exists():
            headers = (read_header(self.path / file) for file in _pair_files(self.path))
            of_pair = next((header["settings"] for header in headers if "settings" in header), None)
            if of_pair is not None:
                self._shared.settle(of_pair)
        self._shared.settle(self.settings)

    def __enter__(self) -> "PairFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self._shared.close()

    def check(self) -> None:
        """Raise OutputError if the folder was deleted while this process worked in it."""
        self._shared.check()

    def claim(self, source: Source, wait: bool = False) -> AbstractContextManager[bool]:
        """Be the only process at work on an image: see SharedFolder.claim."""
        return self._shared.claim(source.name, wait)

    def is_done(self, source: Source) -> bool:
        """Whether the image has its pair, as far as this process knows, and has not changed since."""
        return (source.name, *self._status(source)) in self._done

    @staticmethod
    def _status(source: Source) -> tuple[int, int]:
        """Bytes and time of an image's file, by which it is known again without a look into it."""
        try:
            status = source.path.stat()
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns

    def is_done_by_now(self, source: Source) -> bool:
        """As `is_done`, after a look at what others finished meanwhile. Ask when it is claimed."""
        self._refresh()
        return self.is_done(source)

    def adopt(self, source: Source, content: Fingerprint) -> bool:
        """Enter an existing pair of exactly this image in the index; False if there is none.

        A pair has no line if its process was killed right after writing it, if the index was lost, or if the
        image's time, and only that, has changed.
        """
        file = pair_file(source.name, content.sha256)
        if not (self.path / file).exists():
            return False
        self._enter(source, content, file)
        return True

    def save(self, source: Source, content: Fingerprint, maps: Maps, facts: Mapping[str, Any]) -> None:
        """Write an image's pair, then its line in the index. The image must be claimed.

        Args:
            source: the image.
            content: of its file.
            maps: for each layer the `PARTS`, (K, K, C) each; "crops.raw" and "crops.clean", (N, K, K, C), if there
                are crops.
            facts: what else the header should tell of this image; anything JSON can hold.

        Raises:
            ValueTooLarge: half precision cannot hold a value (its largest is 65504).
            OutputError: no room, say; no half file is left.
        """
        file = pair_file(source.name, content.sha256)
        header = {
            "format": 1,
            "version": __version__,
            "image": source.name,
            "sha256": content.sha256,
            "bytes": content.bytes,
            "settings": self.settings,
            **facts,
        }
        data = encode_pair(maps, header, self.precision)
        self.check()
        target = self.path / file
        write_atomically(target, data)
        self._enter(source, content, file)

    def failure(self, source: Source, content: Fingerprint) -> str | None:
        """Why this very file failed before, with this version of the package; None if it did not."""
        record = self._failures().get(source.name)
        if record is None or (record["sha256"], record["version"]) != (content.sha256, __version__):
            return None
        return record["reason"]

    def fail(self, source: Source, content: Fingerprint | None, reason: str) -> None:
        """Note in failures.jsonl why an image gives no pair, in place of what was noted of it before.

        An image whose `content` is known is not tried again until its file or the package's version changes;
        delete failures.jsonl to have all tried again.
        """
        known = None if content is None else content.sha256
        self._note(source, {"image": source.name, "sha256": known, "reason": reason, "version": __version__})

    def others(self, sources: Sequence[Source]) -> int:
        """How many finished pairs are of no image of these, or of what one of them was before."""
        named = {source.name: source for source in sources}
        ours, every = set(), set()
        for record, _ in read_lines(self.path / INDEX):
            every.add(record["file"])
            source = named.get(record["image"])
            if source is not None and self._status(source) == (record["bytes"], record["mtime_ns"]):
                ours.add(record["file"])
        return len(every - ours)

    def _note(self, source: Source, failure: dict[str, Any] | None) -> None:
        # The file is small. Rewritten whole and sorted, it never holds what is no longer true, and it does
        # not depend on which process came first.
        with self._shared.alone():
            failures = self._failures()
            failures.pop(source.name, None)
            if failure is not None:
                failures[source.name] = failure
            lines = [json.dumps(failures[name]) + "\n" for name in sorted(failures)]
            write_atomically(self.path / FAILURES, "".join(lines).encode())

    def _failures(self) -> dict[str, dict[str, Any]]:
        return {record["image"]: record for record, _ in read_lines(self.path / FAILURES)}

    def _enter(self, source: Source, content: Fingerprint, file: str) -> None:
        entry = IndexEntry(source.name, file, content.sha256, content.bytes, content.mtime_ns)
        self._shared.append(INDEX, asdict(entry))
        self._refresh()
        if source.name in self._failures():
            self._note(source, None)

    def _refresh(self, present: set[str] | None = None) -> None:
        for record, end in read_lines(self.path / INDEX, self._read_to):
            self._read_to = end
            if present is None or record["file"] in present:
                self._done.add((record["image"], record["bytes"], record["mtime_ns"]))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings that all pairs of a folder were made with."""
    return json.loads((Path(folder) / "settings.json").read_text())


def read_index(folder: str | Path) -> list[IndexEntry]:
    """The finished pairs of a folder, each once, in order of finishing; also while it is being filled."""
    lines = read_lines(Path(folder) / INDEX)
    return list({record["file"]: IndexEntry(**record) for record, _ in lines}.values())


def _pair_files(folder: Path) -> Iterator[str]:
    for shard in os.scandir(folder):
        if shard.is_dir() and len(shard.name) == 2:
            for file in os.scandir(shard):
                if file.name.endswith(".safetensors"):
                    yield f"{shard.name}/{file.name}"
