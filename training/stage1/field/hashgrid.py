"""Multi-resolution hash encoding in pure PyTorch: tiny-cuda-nn's numbers from the same parameters."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMES = (1, 2654435761, 805459861)


@dataclass(frozen=True)
class HashGridSettings:
    """Shape of a hash grid, in tiny-cuda-nn's terms. The defaults are the paper's (A.1): 2^4 to 2^10.

    The scale of a level is computed in float32, as tiny-cuda-nn does, or the parameter layouts would differ:
    with the paper's settings log2(per_level_scale) rounds to 0.40000007, the finest level gets 1025 vertices
    a side instead of 1024, more than 2^20 in all, and so is the one level that is hashed.
    """

    dims: int = 2
    levels: int = 16
    features: int = 8
    log2_hashmap_size: int = 20
    base_resolution: int = 16
    per_level_scale: float = 2.0 ** (6 / 15)

    @property
    def width(self) -> int:
        """Length of an encoded coordinate: levels * features."""
        return self.levels * self.features


class Level(NamedTuple):
    """One level of the grid: where its entries lie in the table and how a cell finds them."""

    scale: float
    resolution: int
    entries: int
    offset: int
    hashed: bool


def grid_levels(settings: HashGridSettings) -> list[Level]:
    """The levels of a grid, coarse to fine. Raises ValueError where the settings describe none."""
    for name in ("levels", "features", "log2_hashmap_size", "base_resolution"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if not 1 <= settings.dims <= len(PRIMES):
        raise ValueError(f"dims must be 1 to {len(PRIMES)}, got {settings.dims}")
    if settings.per_level_scale < 1:
        raise ValueError(f"per_level_scale must be at least 1, got {settings.per_level_scale}")
    log2_scale = np.log2(np.float32(settings.per_level_scale))
    levels, offset = [], 0
    for index in range(settings.levels):
        growth = np.exp2(np.float32(index) * log2_scale)
        scale = float(growth * np.float32(settings.base_resolution) - np.float32(1))
        resolution = math.ceil(scale) + 1
        vertices = resolution**settings.dims
        entries = min(math.ceil(vertices / 8) * 8, 2**settings.log2_hashmap_size)
        levels.append(Level(scale, resolution, entries, offset, hashed=entries < vertices))
        offset += entries
    return levels


class HashGrid(nn.Module):
    """Encodes coordinates in [0, 1]^dims as interpolated table entries, one group of features a level.

    `params` is tiny-cuda-nn's flat vector: level by level, an entry's features adjacent, drawn from
    U(-1e-4, 1e-4). `forward` gives a dense gradient; `TouchedEntries` one of the touched entries only.
    """

    _scale: Tensor
    _entries: Tensor
    _offset: Tensor
    _end: Tensor
    _stride: Tensor
    _ahead: Tensor

    def __init__(self, settings: HashGridSettings | None = None, generator: torch.Generator | None = None):
        super().__init__()
        self.settings = settings or HashGridSettings()
        self.levels = grid_levels(self.settings)
        self.entries = self.levels[-1].offset + self.levels[-1].entries
        values = torch.empty(self.entries * self.settings.features)
        self.params = nn.Parameter(values.uniform_(-1e-4, 1e-4, generator=generator))
        # Hashed levels are always the finest: vertices grow with the level, the room for them does not.
        self.dense_levels = sum(not level.hashed for level in self.levels)
        columns = {name: torch.tensor([getattr(x, name) for x in self.levels]) for name in Level._fields}
        self.register_buffer("_scale", columns["scale"].double(), persistent=False)
        # How many rows apart neighbours along a dimension are, and the rows of a cell's corners from those of the
        # cell, the level's offset included. Not used for hashed levels.
        strides = torch.stack([columns["resolution"] ** dim for dim in range(self.settings.dims)])
        corners = torch.arange(2**self.settings.dims)[:, None] >> torch.arange(self.settings.dims) & 1
        rows = {
            "entries": columns["entries"],
            "offset": columns["offset"],
            "end": columns["offset"] + columns["entries"],
            "stride": strides,
            "ahead": (corners[:, :, None] * strides).sum(1) + columns["offset"],
        }
        for name, value in rows.items():
            self.register_buffer(f"_{name}", value.to(torch.int32), persistent=False)

    @property
    def table(self) -> Tensor:
        """The parameters as entries (E, features); shares memory with `params`."""
        return self.params.view(-1, self.settings.features)

    def lookups(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows and weights of coords (B, dims) in [0, 1]: (B, levels, 2^dims) int32 and float32.

        Corners are numbered as in tiny-cuda-nn: bit i of the number is the step along dimension i.
        """
        # Corners and dimensions come first while there is arithmetic to do: long runs of numbers are fast.
        # In float64 the weights are right to float32; x * 1024 + 0.5 in float32 would leave them 14 bits.
        position = torch.mul(coords.to(torch.float64).t()[:, :, None], self._scale).add_(0.5)
        cells = position.floor()  # (dims, B, levels)
        far = position.sub_(cells).float()
        near_far = torch.stack((1 - far, far))
        cells = cells.to(torch.int32)
        weights = near_far[:, 0]
        for dim in range(1, self.settings.dims):
            weights = (near_far[:, dim, None] * weights).flatten(0, 1)
        rows = self._dense_rows(cells)
        if self.dense_levels < len(self.levels):
            rows[:, :, self.dense_levels :] = self._hashed_rows(cells[:, :, self.dense_levels :])
        return rows.permute(1, 2, 0).contiguous(), weights.permute(1, 2, 0).contiguous()

    def _dense_rows(self, cells: Tensor) -> Tensor:
        """Rows x + y * resolution + ... of the corners of cells (dims, B, levels): (2^dims, B, levels)."""
        origin = sum(cell * stride for cell, stride in zip(cells, self._stride, strict=True))
        rows = origin + self._ahead[:, None]
        # Corners beyond the far border wrap into other rows, modulo the entries; once is enough, for they lie
        # less than one resolution beyond.
        return rows.sub_((rows >= self._end) * self._entries)

    def _hashed_rows(self, cells: Tensor) -> Tensor:
        """As `_dense_rows`, for hashed levels: x ^ y * prime ^ ... in uint32, modulo the entries."""
        # In int64: a vertex below 2^31 times a prime below 2^32 does not overflow, and as the entries are a
        # power of two that divides 2^32, masking them out is also the wrap of uint32.
        corners = torch.stack((cells, cells + 1)).long()
        rows = corners[:, 0]
        for dim in range(1, self.settings.dims):
            rows = ((corners[:, dim, None] * PRIMES[dim]) ^ rows).flatten(0, 1)
        return (rows & 2**self.settings.log2_hashmap_size - 1) + self._offset[self.dense_levels :]

    def forward(self, coords: Tensor) -> Tensor:
        """Encodes coords (..., dims) in [0, 1] as (..., levels * features) float32."""
        rows, weights = self.lookups(coords.reshape(-1, self.settings.dims))
        rows, weights = rows.flatten(0, 1), weights.flatten(0, 1)
        encoded = F.embedding_bag(rows, self.table, per_sample_weights=weights, mode="sum")
        return encoded.view(*coords.shape[:-1], self.settings.width)


class _Entries:
    """Entries that a batch reads: a table (U, features) to encode it from, backward without atomics.

    One sort serves the backward pass: in the sorted order the uses of an entry are neighbours, so the gradient is a
    segmented sum over them and has the same bits every time.
    """

    starts: Tensor
    lookups: Tensor

    def __init__(self, rows: Tensor, weights: Tensor) -> None:
        corners = rows.shape[-1]
        self.batch = rows.shape[0]
        self.weights = weights.reshape(-1, corners)
        self.ordered, self.order = rows.flatten().sort()
        self.sources = (self.order >> corners.bit_length() - 1).to(torch.int32)  # // corners, a power of two
        self.source_weights = self.weights.flatten().index_select(0, self.order)

    def encode(self, entries: Tensor) -> Tensor:
        """Encodes the batch from its table (U, features): (B, levels * features), differentiable."""
        return _Interpolate.apply(entries, self).view(self.batch, -1)


class AllEntries(_Entries):
    """The first `count` entries, whether the batch's rows and weights (B, levels, 2^dims) touch them or not."""

    def __init__(self, rows: Tensor, weights: Tensor, count: int) -> None:
        super().__init__(rows, weights)
        self.lookups = rows.reshape(self.weights.shape)
        uses = torch.bincount(self.lookups.flatten(), minlength=count)
        self.starts = (uses.cumsum(0) - uses).to(torch.int32)


class TouchedEntries(_Entries):
    """The distinct entries that a batch touches: a compact table stands in for the whole one.

    `rows` (U,) are their places in the whole table, ascending.
    """

    def __init__(self, rows: Tensor, weights: Tensor) -> None:
        super().__init__(rows, weights)
        first = torch.ones_like(self.ordered, dtype=torch.bool)
        torch.ne(self.ordered[1:], self.ordered[:-1], out=first[1:])
        starts = first.nonzero()[:, 0]
        self.rows = self.ordered.index_select(0, starts).long()
        self.starts = starts.to(torch.int32)
        compact = first.cumsum(0, dtype=torch.int32).sub_(1)
        self.lookups = torch.empty_like(compact).scatter_(0, self.order, compact).view(self.weights.shape)


class _Interpolate(torch.autograd.Function):
    """Weighted sums of entries; autograd's own backward is slower and has no fixed order on GPUs."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, used: _Entries) -> Tensor:
        ctx.used = used
        return F.embedding_bag(used.lookups, entries, per_sample_weights=used.weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        used = ctx.used
        summed = F.embedding_bag(
            used.sources,
            gradient.contiguous(),
            offsets=used.starts,
            per_sample_weights=used.source_weights,
            mode="sum",
        )
        return summed, None
