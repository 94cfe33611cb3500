"""Uploads of the page: read into memory out of the files that Gradio wrote, which are deleted at once."""

import time
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

from PIL import Image

from timm_dvt.demo import DemoError, decode

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS, say, for which Pillow starts another program
MAX_PIXELS = 25e6
SIDE = 1536  # pixels of the longer side of what is kept of an image; models see about 518
ABANDONED = 600  # seconds since its last byte after which a part of an upload is one that nobody goes on sending
ROOM = 4 * 10**9  # bytes that uploads which nobody has looked at yet may take on the disk
TWINS = 4  # images kept for visitors who sent the same file at the same time


class Uploads:
    """Takes uploads out of the folder that Gradio writes to.

    A whole one is FOLDER/DIGEST OF ITS CONTENT/NAME, one that is still coming FOLDER/tmp*.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.taken: OrderedDict[str, Image.Image] = OrderedDict()

    def take(self, path: str) -> Image.Image:
        """The image of an upload, whose file is deleted before anything else is done.

        Raises:
            DemoError: it is no image that can be taken, or no longer here.
        """
        self._sweep()
        try:
            content = Path(path).read_bytes()
        except OSError as e:
            if path in self.taken:  # the same content under the same name is one file, taken for who came first
                return self.taken[path]
            raise DemoError("This upload is no longer here; choose it again") from e
        Path(path).unlink(missing_ok=True)
        if Path(path).parent.parent == self.folder:
            try:
                Path(path).parent.rmdir()
            except OSError:  # the same content under another name is still waiting
                pass
        self.taken[path] = read_upload(content)
        while len(self.taken) > TWINS:
            self.taken.popitem(last=False)
        return self.taken[path]

    def are_too_many(self) -> bool:
        """Whether no further one is to be let in for now."""
        self._sweep()
        size = 0
        for path in self.folder.rglob("*"):
            try:
                size += path.stat().st_size
            except OSError:  # taken meanwhile
                pass
        return size > ROOM

    def _sweep(self) -> None:
        """Delete what is left of uploads that were given up half-way; others may be on their way in."""
        for part in self.folder.glob("tmp*"):
            try:
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
            except OSError:  # whole by now, and moved
                pass


def read_upload(content: bytes) -> Image.Image:
    """The image in a file's content, made smaller. Raises DemoError."""
    try:
        image = decode(BytesIO(content), "This file", list(FORMATS), MAX_PIXELS)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    except (DemoError, MemoryError):
        raise
    except Exception as e:  # of a damaged file Pillow's readers raise whatever they stumble over
        raise DemoError(f"This file: not an image that can be read ({type(e).__name__})") from e
    return image
