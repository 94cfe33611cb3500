"""Images of a Hugging Face data set, streamed: the first of them are kept as files, and the rest is never fetched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from training.common.shared_folder import SharedFolder, write_atomically

SCHEME = "hf:"
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
            found = _images(name)
            first = next(found, None)  # what cannot be read is told before the folder is the data set's
            if first is None:
                raise UserError(f"{name} holds no images")
            missing = chain([first], found)
        shared.settle({"data_set": name, "images": most})
        for number, data in enumerate(tqdm(islice(missing, most), "images", most, leave=False, unit="image")):
            path = folder / f"{number:06d}{SUFFIXES.get(data[:2], '.png')}"
            if not path.exists():
                write_atomically(path, data)
        write_atomically(done, b"")
    return folder


def _images(name: str) -> Iterator[bytes]:
    """The files of the images of a data set, which are not decoded here."""
    try:
        import datasets
        import fsspec
    except ImportError:
        raise UserError(f"{name} needs the package datasets: pip install datasets") from None
    try:
        where, config, split = _parts(name, datasets)
        stream: Any = datasets.load_dataset(where, config, split=split, streaming=True)
        columns = [key for key, kind in (stream.features or {}).items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise UserError(f"there is no column of images among {', '.join(stream.features or ()) or 'none'}")
        for row in stream.cast_column(columns[0], datasets.Image(decode=False)):
            image = row[columns[0]] or {}
            if image.get("bytes") is not None:
                yield image["bytes"]
            elif image.get("path") is not None:  # of files on the Hub, also in a zip: hf://..., zip://...::hf://...
                with fsspec.open(image["path"], "rb") as file:
                    yield file.read()
    except Exception as error:  # the client, the network and the file formats each raise their own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{name} cannot be read as a data set: {reason}") from error


def _parts(name: str, datasets: Any) -> tuple[str, str | None, str]:
    """Data set, config if it has several, and split. Raises ValueError if a config has to be named, and which."""
    where, *rest = name.removeprefix(SCHEME).split(":")
    configs = datasets.get_dataset_config_names(where)
    named = rest.pop(0) if len(rest) > 1 or (rest and rest[0] in configs) else None
    if named not in (None, *configs) or len(rest) > 1:
        raise UserError(
            f"{named!r} is none of its configs {', '.join(configs)}: {SCHEME}{where}:CONFIG:SPLIT names one"
        )
    if named is None and len(configs) > 1 and datasets.get_dataset_default_config_name(where) is None:
        raise UserError(f"it has the configs {', '.join(configs)}: {SCHEME}{where}:CONFIG names one")
    return where, named, rest[0] if rest else "train"
