"""Images from disk as (3, H, W) tensors in [0, 1], whatever their kind (see `timm_dvt.images`), and lists of images."""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.errors import ImageError, UserError
from timm_dvt.images import SUFFIXES, decode, image_names, open_file, to_array, to_rgb

PICTURES, SETTINGS = "pictures", "settings.json"  # of a folder that an extraction or a training fills


@dataclass(frozen=True, slots=True)
class Source:
    """One image of a list. Kept small: there may be millions.

    Attributes:
        name: by which it goes in an index: its path from `root`, with `/` between folders.
        root: the folder that the list's names start from.
    """

    name: str
    root: Path

    @property
    def path(self) -> Path:
        """Where the image is."""
        return self.root / self.name

    @property
    def shown(self) -> str:
        r"""The name as text that can be written: bytes of a file's name that are no UTF-8 as \xe9."""
        return self.name.encode(errors="surrogateescape").decode(errors="backslashreplace")


@dataclass(frozen=True)
class Fingerprint:
    """By what an image file is known again: sha256 of its bytes, their number, and the file's time."""

    sha256: str
    bytes: int
    mtime_ns: int


def list_images(where: str | Path, limit: int | None = None) -> list[Source]:
    """The images that `where` stands for, in an order that does not depend on the file system.

    - a folder: every image below it (`timm_dvt.images.image_names`), sorted by name
    - a `.txt` file: one path a line, relative to the text file's folder, in the order of the file; blank and
      repeated lines are left out, and blanks around a path unless a file's name has them; nothing else is checked
      here: a missing image is reported when it is read
    - any other file: that one image

    Raises:
        ValueError: there is no such file or folder, there is no image in it, or `limit` is below 1.
    """
    if not os.fspath(where):  # which Path takes for the current folder
        raise UserError('images must be a folder, an image or a .txt list, got ""')
    where = Path(where)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}")
    if where.is_dir():
        sources = [Source(name, where) for name in sorted(image_names(where))]
        if not sources:
            raise UserError(f"no images below the folder {where}: looked for {' '.join(sorted(SUFFIXES))}")
    elif where.suffix.lower() == ".txt" and where.is_file():
        # By line feeds alone: a name may hold what else Python takes for the end of a line.
        lines = where.read_bytes().decode("utf-8-sig", "surrogateescape").split("\n")
        names = dict.fromkeys(_name_of(line.removesuffix("\r"), where.parent) for line in lines if line.strip())
        sources = [Source(name, where.parent) for name in names]
        if not sources:
            raise UserError(f"the list {where} names no images: it should hold one path a line")
    elif where.is_file():
        sources = [Source(where.name, where.parent)]
    else:
        raise UserError(f"images must be a folder, an image or a .txt list; {where} does not exist")
    return sources[:limit]


def given_images(where: str | Path, out: str | Path) -> list[Source]:
    """As `list_images`, without what this package drew: all below `out`, and in a folder pictures of other runs.

    Raises:
        ValueError: as `list_images`, or there is nothing else.
    """
    sources, out = list_images(where), Path(out).resolve()
    given = [source for source in sources if not (Path(where).is_dir() and _is_drawn(source))]
    if out != (root := Path(where).resolve()) and out.is_relative_to(root):
        given = [source for source in given if not source.path.resolve().is_relative_to(out)]
    if not given:
        raise UserError(f"{where} holds no images but what was made here: those of a run, or below {out}")
    return given


def _is_drawn(source: Source) -> bool:
    """Whether it lies in a folder of pictures beside the settings of what drew it: an extraction, a training."""
    folders = Path(source.name).parents
    return any(folder.name == PICTURES and (source.root / folder.parent / SETTINGS).exists() for folder in folders)


def load_image(path: str | Path) -> Tensor:
    """Read one image file: (3, H, W) float32 in [0, 1]. Raises ImageError with the reason if it cannot."""
    return decode_image(read_file(path)[0])


def read_file(path: str | Path) -> tuple[bytes, Fingerprint]:
    """An image file's bytes, and by what to know it again.

    Raises:
        ImageError: there is no such file, it cannot be read, it is empty, or it is no plain file.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    if not data:
        raise ImageError("the file is empty (0 bytes)")
    return data, Fingerprint(hashlib.sha256(data).hexdigest(), status.st_size, status.st_mtime_ns)


def images_digest(sources: Sequence[Source]) -> str:
    """sha256 over names and content of images, in their order; of a file that cannot be read, over its name alone."""

    def content(source: Source) -> str:
        try:
            return read_file(source.path)[1].sha256
        except ImageError:
            return ""

    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:  # a disk answers several at once
        contents = pool.map(content, sources)
        for source, sha256 in zip(sources, tqdm(contents, "hashing images", len(sources), leave=False)):
            digest.update(f"{sha256} {source.name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def decode_image(data: bytes) -> Tensor:
    """Decode an image file's bytes: (3, H, W) float32 in [0, 1], by the rules of `timm_dvt.images`.

    Raises:
        ImageError: as `timm_dvt.images.decode`.
    """
    return torch.from_numpy(np.ascontiguousarray(decode(io.BytesIO(data), to_array).transpose(2, 0, 1)))


def decode_rgb(data: bytes) -> Image.Image:
    """As `decode_image`, as RGB of 8 bits."""
    return decode(io.BytesIO(data), to_rgb)


def _name_of(line: str, folder: Path) -> str:
    return line if line == line.strip() or (folder / line).exists() else line.strip()
