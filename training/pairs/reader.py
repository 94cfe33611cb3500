"""Pairs as training reads them: all checked before the first step, then read in an order fixed by the seed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from timm_dvt.errors import UserError
from training.loop.order import split_places
from training.pairs.file import damaged, read_maps
from training.pairs.folder import INDEX, read_index, read_settings


@dataclass(frozen=True)
class PairSet:
    """The finished pairs of a folder, or some of them.

    Attributes:
        folder: where they lie.
        files: relative to the folder, sorted: the index is in the order of finishing, which is chance.
        layers: blocks to train for, counted from 0.
        grid: rows and columns of every map.
        channels: C.
        crops: how many crops of its image each pair holds beside the whole.
        settings: settings.json, what stage 1 made the pairs with.
    """

    folder: Path
    files: tuple[str, ...]
    layers: tuple[int, ...]
    grid: tuple[int, int]
    channels: int
    settings: dict[str, Any]
    crops: int = 0

    def digest(self) -> str:
        """By what to know these pairs again: their names (which hash the images' content), layers and crops."""
        crops = [f"{self.crops} crops"] if self.crops else []
        return hashlib.sha256("\n".join([*self.files, repr(self.layers), *crops]).encode()).hexdigest()

    def split(self, fraction: float, seed: int) -> tuple[PairSet, PairSet]:
        """Training and validation pairs, drawn at random: see `split_places`."""
        parts = split_places(len(self.files), fraction, seed)
        training, validation = (tuple(self.files[place] for place in places) for places in parts)
        return replace(self, files=training), replace(self, files=validation)


def open_pairs(folder: str | Path, layers: Sequence[int] | None = None, only: Collection[str] | None = None) -> PairSet:
    """Find the pairs of a folder and check every file's header: it is whole, and of one shape with the others.

    Args:
        folder: what training.denoise_images wrote.
        layers: blocks counted from 0, or from the end of those held with a minus; None is all that the pairs hold.
        only: files to take of all that lie there, as far as they do.

    Raises:
        UserError: no pairs, a missing or damaged file, a layer the pairs do not hold, maps of several shapes.
    """
    folder = Path(folder)
    try:
        settings = read_settings(folder)
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no pairs: there is no settings.json; python -m training.denoise_images makes them"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'settings.json'} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'settings.json'} holds no settings")
    try:
        files = tuple(sorted(e.file for e in read_index(folder) if only is None or e.file in only))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / INDEX} is damaged ({error!r}); delete it and run the same python -m training.denoise_images "
            "again, which enters the pairs that are there without making them anew"
        ) from error
    if not files:
        raise UserError(
            f"{folder} holds no finished pairs: {INDEX} is missing or empty; "
            "python -m training.denoise_images makes them"
        )
    crops = settings.get("crops", 0)
    held, shape = _shape(folder / files[0], None, crops)
    chosen = held if layers is None else _choose(layers, held, folder)
    for file in files:
        _, other = _shape(folder / file, chosen, crops)
        if other != shape:
            raise UserError(
                f"mixed grids: {folder / file} holds maps of {_show(other)}, {folder / files[0]} of {_show(shape)}; "
                "pairs of one folder must be alike"
            )
    return PairSet(folder, files, chosen, shape[:2], shape[2], settings, crops)


def _choose(layers: Sequence[int], held: tuple[int, ...], folder: Path) -> tuple[int, ...]:
    unknown = [layer for layer in layers if layer not in held and not -len(held) <= layer < 0]
    if unknown or not layers:
        raise UserError(
            f"layers {list(layers)}: the pairs in {folder} hold {_blocks(held)}; "
            "run training.denoise_images with the --layers that you want"
        )
    return tuple(sorted({layer if layer >= 0 else held[layer] for layer in layers}))


def _blocks(layers: Sequence[int]) -> str:
    return f"block{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _shape(path: Path, layers: tuple[int, ...] | None, crops: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """The layers of a pair and the one shape of its maps, read from the header alone."""
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            held = tuple(sorted({int(key.split(".")[0]) for key in keys}))
            wanted = [f"{layer}.{part}" for layer in layers or held for part in ("raw", "clean")]
            wanted_crops = [key.replace(".", ".crops.") for key in wanted] if crops else []
            missing = [key for key in (*wanted, *wanted_crops) if key not in keys]
            if missing:
                raise UserError(f"{path} has no map {', '.join(missing)}: it holds {_blocks(held)}")
            shapes = {tuple(file.get_slice(key).get_shape()) for key in wanted}
            stacks = {tuple(file.get_slice(key).get_shape()) for key in wanted_crops}
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(path, error) from error
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 3:
        raise UserError(f"{path}: maps must be (K, K, C), all of one shape, got {sorted(shapes)}")
    if stacks - {(crops, *shape)}:
        raise UserError(f"{path}: crops must be {_show((crops, *shape))}, as settings.json says, got {sorted(stacks)}")
    return held, shape


class PairReader:
    """Reads maps of a set of pairs into batches, and keeps in memory what it has read as long as there is room."""

    def __init__(self, pairs: PairSet, parts: Sequence[str] = ("raw", "clean"), cache_bytes: int | None = None) -> None:
        """
        Args:
            pairs: at least one.
            parts: the maps to read, of `training.pairs.folder.PARTS`.
            cache_bytes: of memory to keep pairs in; None is a quarter of what is free, shared with this machine's
                other processes of torchrun.
        """
        self.pairs, self.parts = pairs, tuple(parts)
        self._folder, self._shape = str(pairs.folder), (*pairs.grid, pairs.channels)
        self._free = _free_memory() // 4 if cache_bytes is None else cache_bytes
        self._kept: dict[int, list[list[Tensor]]] = {}

    def read(self, positions: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Maps (parts, B, layers, K*K, C) of the pairs at these places of `pairs.files`, in the files' precision.

        Counted on beyond the last file, place + k * len(files) is the k-th crop of the pair at that place. With `dtype`
        in that one. Safe in several threads at once.

        Raises:
            UserError: a pair is damaged; names the file.
        """
        out: Tensor | None = None
        for i, position in enumerate(positions):
            maps = self._maps(position)
            if out is None:
                out = maps[0][0].new_empty(self._batch_shape(len(positions)), dtype=dtype)
            grids = out[:, i].unflatten(2, self.pairs.grid)
            for part, layers in enumerate(maps):
                for layer, tokens in enumerate(layers):
                    grids[part, layer].copy_(tokens)
        assert out is not None
        return out

    def _batch_shape(self, count: int) -> tuple[int, ...]:
        """(parts, B, layers, K*K, C) for B = count pairs."""
        rows, columns = self.pairs.grid
        return len(self.parts), count, len(self.pairs.layers), rows * columns, self.pairs.channels

    def _maps(self, position: int) -> list[list[Tensor]]:
        """By part and layer: (K, K, C)."""
        kept = self._kept.get(position)
        if kept is not None:
            return kept
        maps = self._load(position)
        self._keep(position, maps)
        return maps

    def _keep(self, position: int, maps: list[list[Tensor]]) -> None:
        """Keep these maps in memory, if there is room."""
        size = sum(tensor.nbytes for tensor in chain.from_iterable(maps))
        if self._free >= size and position not in self._kept:
            self._free -= size
            self._kept[position] = maps

    def _load(self, position: int) -> list[list[Tensor]]:
        """Maps (K, K, C) by part and layer, from where they lie."""
        path = self._path(position)
        try:
            maps = read_maps(path, self.pairs.layers, self.parts, position // len(self.pairs.files))
            for tensor in chain.from_iterable(maps):
                if tensor.shape != self._shape:
                    raise UserError(f"maps of {_show(tensor.shape)} where there were {_show(self._shape)} before")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:  # TypeError: NumPy has no bfloat16
            raise damaged(path, error) from error
        return maps

    def _path(self, position: int) -> str:
        file = self.pairs.files[position % len(self.pairs.files)]
        return os.path.join(self._folder, file)  # a Path takes ten times as long to make

    def not_finite(self, positions: Iterable[int]) -> list[Path]:
        """Which of these pairs hold NaN or infinity."""
        files = {position: Path(self._path(position)) for position in positions}
        return [file for position, file in files.items() if not bool(self.read([position]).isfinite().all())]


def _free_memory() -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES")
    except ValueError:  # macOS does not tell what is free
        pages = os.sysconf("SC_PHYS_PAGES") // 2
    return pages * os.sysconf("SC_PAGE_SIZE") // processes
