"""Feature maps on disk: one file a shard and variable, written once; and reading one image's back.

    zarr          OUT/features.zarr, a group: VARIABLE (image, y, x, channel), a chunk an image, a shard a file
    safetensors   OUT/VARIABLE/000012.safetensors, a tensor an image, by the image's name
    npy           OUT/VARIABLE/NAME.npy, a file an image (`file_of`)
    parquet       OUT/VARIABLE/000012.parquet, a row a patch (image, y, x, feature), a row group an image

Class tokens have no y and x. An array of zarr has one shape for all images: with maps of different grids
(--keep-aspect) an image's lies in the upper left corner, NaN around it, and `rows` and `columns` beside the image's
name say how much of it is the map: `ds.features.sel(image=NAME)[:rows, :columns]`. Images that cannot be read are NaN
there, 0 x 0, and are not in the other formats.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from timm_dvt.errors import UserError
from timm_dvt.shared_folder import write_atomically

ZARR = "features.zarr"
NAME_BYTES = 255  # of a file's or a folder's name, at the most
Record = dict[str, Any]  # of an image: name, height, width, rows, columns; or name, error


@dataclass(frozen=True)
class Layout:
    """How the variables of a folder lie: `length` images a shard; (H, W, C) or (C,) of each variable; their dtype."""

    length: int
    shapes: Mapping[str, Sequence[int]]
    dtype: str

    @property
    def image_bytes(self) -> int:
        """Of an image's variables, at the most."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize


Values = Mapping[int, np.ndarray]  # of a variable: (H, W, C) or (C,) by the image's place in its shard


def write_zarr(out: Path, layout: Layout, shard: int, key: str, records: Sequence[Record], values: Values) -> None:
    """Write a shard of a variable as the one file that zarr keeps for it."""
    whole = np.full((len(records), *layout.shapes[key]), np.nan, layout.dtype)
    for place, value in values.items():
        whole[place][tuple(map(slice, value.shape))] = value
    encoded: dict[str, Any] = {}
    _zarr_array(_memory(encoded), key, layout, len(records))[:] = whole
    ((name, data),) = ((name, data) for name, data in encoded.items() if not name.endswith("zarr.json"))
    write_atomically(out / ZARR / name.replace("/c/0", f"/c/{shard}", 1), data.to_bytes())


def _memory(encoded: dict[str, Any]) -> Any:
    import zarr

    return zarr.create_group(zarr.storage.MemoryStore(encoded), zarr_format=3)


def _zarr_array(group: Any, key: str, layout: Layout, count: int) -> Any:
    shape = tuple(layout.shapes[key])
    return group.create_array(
        key,
        shape=(count, *shape),
        chunks=(1, *shape),
        shards=(layout.length, *shape),
        dtype=layout.dtype,
        fill_value=float("nan"),
        compressors=None,  # floats hardly shrink, and it would take longer than all else
        dimension_names=("image", "y", "x", "channel") if len(shape) == 3 else ("image", "channel"),
        attributes={"coordinates": "height width rows columns"},
        config={"write_empty_chunks": True},  # to look for empty ones takes longer than to write
    )


def write_zarr_metadata(out: Path, layout: Layout, records: Sequence[Record], attributes: Mapping[str, Any]) -> None:
    """Write what makes the files of the shards a group that xarray opens, with names and sizes as coordinates."""
    import warnings

    encoded: dict[str, Any] = {}
    group = _memory(encoded)
    group.attrs.update(attributes)
    for key in layout.shapes:
        _zarr_array(group, key, layout, len(records))
    columns: dict[str, Any] = {"image": np.array([record["name"] for record in records], dtype=object)}
    columns |= {
        key: np.array([record.get(key, 0) for record in records], np.int32)
        for key in ("height", "width", "rows", "columns")
    }
    for key, column in columns.items():
        dtype = str if key == "image" else "int32"
        array = group.create_array(
            key, shape=column.shape, chunks=(max(1, len(column)),), dtype=dtype, dimension_names=("image",)
        )
        array[:] = column
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that consolidated metadata are no part of the specification yet
        import zarr

        zarr.consolidate_metadata(group.store)
    for name in sorted(encoded, key=lambda name: name == "zarr.json"):  # which knows the others, last
        write_atomically(out / ZARR / name, encoded[name].to_bytes())


def read_zarr(out: Path, layout: Layout, shard: int, key: str, record: Record, place: int) -> np.ndarray:
    """An image's values, straight from its place in the file: a hundredth of a millisecond, and safe in any process."""
    shape = layout.shapes[key]
    with open(out / ZARR / key / "c" / "/".join([str(shard), *"0" * len(shape)]), "rb") as file:
        file.seek(-(16 * layout.length + 4), 2)  # zarr's index of a shard: offset and length of each chunk, a checksum
        offset, length = np.frombuffer(file.read(16 * layout.length), "<u8").reshape(-1, 2)[place].tolist()
        file.seek(offset)
        values = np.frombuffer(file.read(length), layout.dtype).reshape(shape)
    return values[: record["rows"], : record["columns"]].copy() if len(shape) == 3 else values


def write_safetensors(
    out: Path, layout: Layout, shard: int, key: str, records: Sequence[Record], values: Values
) -> None:
    """Write a shard of a variable as a tensor an image."""
    from safetensors.numpy import save

    named = {records[place]["name"]: np.ascontiguousarray(value) for place, value in values.items()}
    write_atomically(out / key / f"{shard:06d}.safetensors", save(named))


def read_safetensors(out: Path, layout: Layout, shard: int, key: str, record: Record, place: int) -> np.ndarray:
    """An image's values."""
    from safetensors import safe_open

    with safe_open(out / key / f"{shard:06d}.safetensors", "np") as file:
        return file.get_tensor(record["name"])


def write_npy(out: Path, layout: Layout, shard: int, key: str, records: Sequence[Record], values: Values) -> None:
    """Write a shard of a variable as a file an image."""
    for place, record in enumerate(records):
        path = out / key / file_of(record["name"], ".npy")
        if place not in values:
            path.unlink(missing_ok=True)  # of what the image was before
            continue
        buffer = io.BytesIO()
        np.save(buffer, values[place])
        write_atomically(path, buffer.getvalue())


def read_npy(out: Path, layout: Layout, shard: int, key: str, record: Record, place: int) -> np.ndarray:
    """An image's values."""
    return np.load(out / key / file_of(record["name"], ".npy"))


def write_parquet(out: Path, layout: Layout, shard: int, key: str, records: Sequence[Record], values: Values) -> None:
    """Write a shard of a variable as a table, a row a patch or class token, a row group an image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(layout, key)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, compression="none") as writer:  # there is nothing to be gained in floats
        for place, value in values.items():
            patches = value.reshape(-1, value.shape[-1])
            feature = pa.FixedSizeListArray.from_arrays(pa.array(patches.ravel()), value.shape[-1])
            columns = [pa.array([records[place]["name"]] * len(patches), pa.string())]
            if value.ndim == 3:
                columns += [pa.array(index.ravel(), pa.int32()) for index in np.indices(value.shape[:2], np.int32)]
            writer.write_table(pa.Table.from_arrays([*columns, feature], schema=schema), row_group_size=len(patches))
    write_atomically(out / key / f"{shard:06d}.parquet", buffer.getvalue())


def read_parquet(out: Path, layout: Layout, shard: int, key: str, record: Record, place: int) -> np.ndarray:
    """An image's values."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(out / key / f"{shard:06d}.parquet") as file:
        of_groups = (file.metadata.row_group(i).column(0).statistics.min for i in range(file.metadata.num_row_groups))
        group = list(of_groups).index(record["name"])
        column = file.read_row_group(group, ["feature"])["feature"].combine_chunks()
    grid = [record["rows"], record["columns"]] if len(layout.shapes[key]) == 3 else []
    return column.flatten().to_numpy().reshape(*grid, layout.shapes[key][-1])


def _schema(layout: Layout, key: str) -> Any:
    import pyarrow as pa

    feature = pa.list_(pa.from_numpy_dtype(np.dtype(layout.dtype)), layout.shapes[key][-1])
    places = [("y", pa.int32()), ("x", pa.int32())] if len(layout.shapes[key]) == 3 else []
    return pa.schema([("image", pa.string()), *places, ("feature", feature)])


def file_of(name: str, suffix: str) -> str:
    """A file for an image of this name, below whatever folder: a path from elsewhere stays within it.

    Of a part of the name that is longer than file systems take, the end is a digest.
    """
    parts = ("%2E%2E" if part == ".." else part for part in name.split("/"))
    *folders, last = (("%2F" if name.startswith("/") else "") + "/".join(parts).lstrip("/")).split("/")
    return "/".join([*(_shortened(folder) for folder in folders), _shortened(last, suffix)])


def _shortened(part: str, suffix: str = "") -> str:
    """The part and its suffix, in no more bytes than file systems take; no letter is cut in two."""
    whole = part.encode()
    if len(whole) + len(suffix) <= NAME_BYTES:
        return part + suffix
    end = f"~{hashlib.sha256(whole).hexdigest()[:16]}{suffix}"
    return whole[: NAME_BYTES - len(end)].decode(errors="ignore") + end


WRITERS: dict[str, Callable[..., None]] = {
    "zarr": write_zarr,
    "safetensors": write_safetensors,
    "npy": write_npy,
    "parquet": write_parquet,
}
READERS: dict[str, Callable[..., np.ndarray]] = {
    "zarr": read_zarr,
    "safetensors": read_safetensors,
    "npy": read_npy,
    "parquet": read_parquet,
}
_NEEDS = {"zarr": "zarr", "parquet": "pyarrow"}  # packages of the extra extract, to write


def check_package(name: str) -> None:
    """Raise UserError where the package is not installed by which a format is written."""
    package = _NEEDS.get(name)
    if package and find_spec(package) is None:
        otherwise = "; on Python 3.10, which zarr does not support: --format npy, safetensors or parquet"
        raise UserError(
            f"--format {name} needs the package {package}: pip install 'timm-dvt[extract]'"
            + otherwise * (name == "zarr")
        )
