"""Images of a Hugging Face data set, streamed: the first of them are kept as files, and the rest is never fetched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.extraction.hub import SCHEME, stream_images  # noqa: F401  the scheme is handed on
from timm_dvt.shared_folder import SharedFolder, write_atomically

SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp"}


def fetch_images(name: str, most: int, folder: Path) -> Path:
    """Put the first images of a data set into a folder, as the files that the data set holds.

    Several processes may ask for the same at once: one fetches, the others wait. Rows without an image are left out.

    Args:
        name: hf:OWNER/NAME, hf:OWNER/NAME:SPLIT, :CONFIG or :CONFIG:SPLIT, or hf: and a folder that `datasets` reads.
            The split is "train" if none is named, the column the first one of images.
        most: how many. folder: where they are kept; those that are there are not fetched again.

    Raises:
        ValueError: `datasets` is not installed, there is no such data set, config or split, there are no images in it,
            or the folder holds those of another one.
        OutputError: the folder cannot be written.
    """
    notes = folder.with_name(f".{folder.name}")  # whose images they are and whether they are all there
    done = notes / "complete"
    with SharedFolder(notes) as shared, shared.claim("images", wait=True):
        missing: Iterator[bytes] = iter(())
        if not (done.exists() and folder.is_dir()):
            stream = (data for data in stream_images(name) if data is not None)
            first = next(stream, None)  # what cannot be read is told before the folder is the data set's
            if first is None:
                raise UserError(f"{name} holds no images")
            missing = chain([first], stream)
        shared.settle({"data_set": name, "images": most})
        for number, data in enumerate(tqdm(islice(missing, most), "images", most, leave=False, unit="image")):
            path = folder / f"{number:06d}{SUFFIXES.get(data[:2], '.png')}"
            if not path.exists():
                write_atomically(path, data)
        write_atomically(done, b"")
    return folder
