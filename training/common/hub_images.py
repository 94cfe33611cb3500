"""Images of a Hugging Face data set, streamed: the first of them are kept as files, and the rest is never fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm_dvt.bars import tqdm
from training.common.shared_folder import write_atomically

SCHEME = "hf:"
SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp", b"II": ".tif", b"MM": ".tif", b"BM": ".bmp"}


def fetch_images(name: str, most: int, folder: Path) -> Path:
    """Put the first images of a data set into a folder, as the files that the data set holds.

    Args:
        name: hf:OWNER/NAME, hf:OWNER/NAME:SPLIT, or hf: and a folder that `datasets` reads. The split is "train" if
            none is named, the column the first one of images.
        most: how many. folder: where they are kept; those that are there are not fetched again.

    Raises:
        ValueError: `datasets` is not installed, there is no such data set or split, or there are no images in it.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} needs the package datasets: pip install datasets") from None
    where, _, split = name.removeprefix(SCHEME).partition(":")
    try:
        stream: Any = datasets.load_dataset(where, split=split or "train", streaming=True)
        columns = [key for key, kind in (stream.features or {}).items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise ValueError(f"there is no column of images among {', '.join(stream.features or ()) or 'none'}")
        stream = stream.cast_column(columns[0], datasets.Image(decode=False))
        with tqdm(total=most, desc="images", unit="image", leave=False) as bar:
            for number, row in enumerate(stream.take(most)):
                _keep(row[columns[0]], folder / f"{number:06d}")
                bar.update()
    except Exception as error:  # the client, the network and the file formats each raise their own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name} cannot be read as a data set: {reason}") from error
    return folder


def _keep(image: dict[str, Any], stem: Path) -> None:
    """Write an image's own bytes, which are not decoded here, under a suffix that says what they are."""
    data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    path = stem.with_suffix(SUFFIXES.get(data[:2], ".png"))
    if not path.exists():
        write_atomically(path, data)
