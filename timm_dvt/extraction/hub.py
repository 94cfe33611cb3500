"""Images of a Hugging Face data set, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm_dvt.errors import UserError

SCHEME = "hf:"


def stream_images(name: str) -> Iterator[bytes | None]:
    """The files of the images of a data set, one a row, which are not decoded here; None of a row without an image.

    Args:
        name: hf:OWNER/NAME, hf:OWNER/NAME:SPLIT, :CONFIG or :CONFIG:SPLIT, or hf: and a folder that `datasets` reads.
            The split is "train" if none is named, the column the first one of images.

    Raises:
        UserError: `datasets` is not installed, there is no such data set, config or split, or no images in it.
    """
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
            else:
                yield None
    except Exception as error:  # the client, the network and the file formats each raise their own kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{name} cannot be read as a data set: {reason}") from error


def stream_length(name: str) -> int | None:
    """How many rows a data set says that it has; None where it does not say. Raises as `stream_images`."""
    import datasets

    try:
        where, config, split = _parts(name, datasets)
        splits = datasets.load_dataset_builder(where, config).info.splits or {}
        return splits[split].num_examples or None if split in splits else None
    except Exception as error:
        raise UserError(f"{name} cannot be read as a data set: {error}") from error


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
