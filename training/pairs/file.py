"""One pair on disk: the maps of an image and of crops of it as safetensors, each with its checksum, and a header."""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from timm_dvt.errors import UserError

PARTS = ("raw", "clean", "artifacts")
PRECISIONS = {"half": torch.float16, "full": torch.float32}
Maps = Mapping[int, Mapping[str, Tensor]]  # {layer: {part: (K, K, C)}}, of N crops {"crops." + part: (N, K, K, C)}


class ValueTooLarge(UserError):
    """A feature does not fit the precision on disk."""


def pair_file(name: str, digest: str) -> str:
    """The pair's file, within its folder, of an image called `name` whose file has the sha256 `digest`."""
    key = sha256(f"{digest} {name}".encode(errors="surrogateescape")).hexdigest()[:20]
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in Path(name).stem)[:40]
    return f"{key[:2]}/{readable}-{key}.safetensors"


def encode_pair(maps: Maps, header: Mapping[str, Any], precision: str) -> bytes:
    """A pair's file: tensors `LAYER.raw`, `LAYER.clean`, `LAYER.artifacts`, perhaps crops, and the header as JSON.

    Raises:
        ValueTooLarge: half precision cannot hold a value.
    """
    stored = in_precision(maps, precision)
    tensors = {f"{layer}.{part}": map_ for layer, parts in stored.items() for part, map_ in parts.items()}
    header = {**header, "checksums": {key: _checksums(map_.numpy()) for key, map_ in tensors.items()}}
    # One entry, not one a field: safetensors orders entries at random, and equal pairs must be equal files.
    return save(tensors, {"pair": json.dumps(header, sort_keys=True)})


def in_precision(maps: Maps, precision: str) -> dict[int, dict[str, Tensor]]:
    """The maps as a file keeps them, on the CPU. Raises ValueTooLarge if half precision cannot hold a value."""
    stored: dict[int, dict[str, Tensor]] = {layer: {} for layer in maps}
    for layer, parts in maps.items():
        for part, map_ in parts.items():
            stored[layer][part] = map_.to("cpu", PRECISIONS[precision]).contiguous()
            if not bool(stored[layer][part].isfinite().all()):
                largest = map_.abs().max().item()
                raise ValueTooLarge(
                    f"block {layer}: {part} holds {largest:.3g}, too large for {precision} precision; "
                    "training.denoise_images --precision full keeps it"
                )
    return stored


def read_pair(path: str | Path, layer: int | None = None, parts: Iterable[str] = ("raw", "clean")) -> dict[str, Tensor]:
    """Maps of one pair: {part: (K, K, C)} in the file's precision, for any of `PARTS`.

    Args:
        path: a pair's file.
        layer: the block, counted from 0; may be left out if the pair holds one layer.
        parts: which maps; the others are not read.

    Raises:
        ValueError: the pair does not hold that layer, or holds several and none was named.
        UserError: it cannot be read, or a map is not what was written.
    """
    with _opened(path) as file:
        layers = sorted({int(key.split(".")[0]) for key in file.keys()})
        if layer is None and len(layers) == 1:
            layer = layers[0]
        if layer not in layers:
            raise UserError(f"layer must be one of {layers}, which {path} holds, got {layer}")
        checksums = _header(file).get("checksums", {})
        return {part: _map(file, f"{layer}.{part}", 0, checksums, path) for part in parts}


def read_maps(path: str | Path, layers: Sequence[int], parts: Sequence[str], crop: int = 0) -> list[list[Tensor]]:
    """Maps (K, K, C) of one pair by part and layer, in the file's precision; SafetensorError if it lacks one.

    Args:
        crop: 0 is the whole image, k the k-th of its crops, whose artifacts are those of the whole image.

    Raises:
        UserError: a map is not what was written.
    """
    with safe_open(path, "np") as file:
        checksums = _header(file).get("checksums", {})
        keys = [[f"{layer}.{stored_part(part, crop)}" for layer in layers] for part in parts]
        return [[_map(file, key, crop, checksums, path) for key in of_layers] for of_layers in keys]


def _map(file: Any, key: str, crop: int, checksums: Mapping[str, Any], path: str | Path) -> Tensor:
    # As NumPy's, which are read; torch's are mapped, and to page in what is read once takes longer than to read it.
    of_crop = ".crops." in key
    stored = file.get_slice(key)[crop - 1] if of_crop else file.get_tensor(key)
    known = checksums.get(key)  # none in pairs of another origin
    if known is not None and _checksums(stored) != (known[crop - 1] if of_crop else known):
        raise damaged(path, f"the checksum of {key} is another")
    return torch.from_numpy(stored)


def _checksums(maps: np.ndarray) -> int | list[int]:
    """The CRC-32 of a map (K, K, C), or of each of some (N, K, K, C)."""
    return zlib.crc32(np.ascontiguousarray(maps).data) if maps.ndim == 3 else [zlib.crc32(crop.data) for crop in maps]


def damaged(path: str | Path, why: object) -> UserError:
    """The error for a pair that cannot be read, with the remedy."""
    if isinstance(why, UserError):
        return why
    return UserError(
        f"{path} cannot be read, it is damaged or incomplete ({why}); delete it and make it again, by "
        "training.denoise_images or whichever command did"
    )


def stored_part(part: str, crop: int) -> str:
    """Where a pair holds a part of its whole image (0) or of a crop; artifacts are those of either."""
    return f"crops.{part}" if crop and part != "artifacts" else part


def read_header(path: str | Path) -> dict[str, Any]:
    """What a pair says of itself: model, settings, seed, source image, hash, version. Reads no maps.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path) as file:
        return _header(file)


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A pair's file for the time of the block; what goes wrong in it is that the file is damaged."""
    try:
        with safe_open(path, "np") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error) from error


def _header(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get("pair", "{}"))
