"""Uploads of the page: read into memory out of the files that Gradio wrote, which are deleted at once."""

import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path

from PIL import Image, features

from timm_dvt.errors import ImageError, UserError
from timm_dvt.images import HEIF, REMEDIES, decode, to_rgb

# Not EPS, say, for which Pillow starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []), *HEIF)
SUFFIXES = (".heic", ".heif", ".avif")  # which browsers do not all know for images
MEGABYTES = "100"  # of a file, at the most; what lies compressed in one is bounded by its pixels
MAX_PIXELS = 25e6
SIDE = 1536  # pixels of the longer side of what is kept of an image; models see about 518
ABANDONED = 600  # seconds since its last byte after which a part of an upload is one that nobody goes on sending
ROOM = 4 * 10**9  # bytes that uploads which nobody has looked at yet may take on the disk
FILES = 1000  # and how many there may be
KEPT = 3600  # seconds for which a whole one waits to be looked at
SWEEPING = 60  # seconds between two looks for those that are too old
TWINS = 4  # images kept for visitors who sent the same file at the same time


class Uploads:
    """Takes uploads out of the folder that Gradio writes to.

    A whole one is FOLDER/DIGEST OF ITS CONTENT/NAME, one that is still coming FOLDER/tmp*.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.taken: OrderedDict[str, Image.Image] = OrderedDict()
        self.incoming: dict[object, int] = {}  # bytes that requests which are coming in at the moment may bring

    def take(self, path: str) -> Image.Image:
        """The image of an upload, whose file is deleted before anything else is done.

        Raises:
            UserError: it is no image that can be taken, or no longer here.
        """
        self._sweep()
        if path in self.taken:  # the folder is named after the content: decoded already
            _delete(Path(path), self.folder)
            return self.taken[path]
        try:
            content = Path(path).read_bytes()
        except OSError as e:
            raise UserError("This upload is no longer here; choose it again") from e
        _delete(Path(path), self.folder)
        self.taken[path] = read_upload(content)
        while len(self.taken) > TWINS:
            self.taken.popitem(last=False)
        return self.taken[path]

    def are_too_many(self) -> bool:
        """Whether there is no room for all that is coming in."""
        self._sweep()
        size = sum([*self.incoming.values()])
        for count, (_, status) in enumerate(self._files()):
            size += status.st_size
            if count >= FILES or size > ROOM:  # so that to look costs little, however many there are
                return True
        return size > ROOM

    def keep_clean(self) -> None:
        """Sweep for as long as the process lives, also when nobody comes."""
        while True:
            time.sleep(SWEEPING)
            self._sweep()

    def _sweep(self) -> None:
        """Delete what is left of uploads that were given up half-way, and whole ones that nobody asked to see."""
        now = time.time()
        for path, status in islice(self._files(), 2 * FILES):
            if now - status.st_mtime > (ABANDONED if path.name.startswith("tmp") else KEPT):
                _delete(path, self.folder)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files, with their sizes and times; others come and go meanwhile."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                try:
                    yield (path := Path(folder, name)), path.stat()
                except OSError:  # taken meanwhile
                    pass


def _delete(path: Path, folder: Path) -> None:
    """Delete an upload, and the folder that it alone was in."""
    try:
        path.unlink(missing_ok=True)
        if path.parent.parent == folder:
            path.parent.rmdir()
    except OSError:  # the same content under another name is still waiting, or somebody else was quicker
        pass


def read_upload(content: bytes) -> Image.Image:
    """The image in a file's content, made smaller. Raises UserError."""
    remedy = REMEDIES.get(content[8:12]) if content[4:8] == b"ftyp" else None
    if remedy and ("AVIF" if content[8:12] == b"avif" else "HEIF") not in FORMATS:
        raise UserError(f"This file: this server cannot read its format; save it as JPEG, or there: {remedy}")
    try:
        image = decode(BytesIO(content), to_rgb, list(FORMATS), MAX_PIXELS)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    except ImageError as e:
        raise ImageError(f"This file: {e}") from e
    except MemoryError:
        raise
    except Exception as e:  # of a damaged file Pillow's readers raise whatever they stumble over
        raise UserError(f"This file: not an image that can be read ({type(e).__name__})") from e
    return image
