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
    U(-1e-4, 1e-4). `forward` gives a dense gradient; see `touch` for one of the touched entries only.
    """

    _scale: Tensor
    _resolution: Tensor
    _entries: Tensor
    _offset: Tensor
    _steps: Tensor

    def __init__(self, settings: HashGridSettings | None = None, generator: torch.Generator | None = None):
        super().__init__()
        self.settings = settings or HashGridSettings()
        self.levels = grid_levels(self.settings)
        self.entries = self.levels[-1].offset + self.levels[-1].entries
        values = torch.empty(self.entries * self.settings.features)
        self.params = nn.Parameter(values.uniform_(-1e-4, 1e-4, generator=generator))
        # Hashed levels are always the finest: vertices grow with the level, the room for them does not.
        self.dense_levels = sum(not level.hashed for level in self.levels)
        for name in ("entries", "offset", "resolution"):
            column = torch.tensor([getattr(level, name) for level in self.levels], dtype=torch.int32)
            self.register_buffer(f"_{name}", column[:, None], persistent=False)
        scales = torch.tensor([level.scale for level in self.levels], dtype=torch.float64)
        self.register_buffer("_scale", scales[:, None], persistent=False)
        self.register_buffer("_steps", torch.arange(2, dtype=torch.int32), persistent=False)

    @property
    def table(self) -> Tensor:
        """The parameters as entries (E, features); shares memory with `params`."""
        return self.params.view(-1, self.settings.features)

    def lookups(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Table rows and weights of coords (B, dims) in [0, 1]: (B, levels, 2^dims) int32 and float32.

        Corners are numbered as in tiny-cuda-nn: bit i of the number is the step along dimension i.
        """
        # In float64 the weights are right to float32; x * 1024 + 0.5 in float32 would leave them 14 bits.
        position = coords.to(torch.float64)[:, None, :] * self._scale + 0.5
        cell = position.floor()
        far = (position - cell).float()
        near_far = torch.stack((1 - far, far), dim=-1)  # (B, levels, dims, 2)
        corners = cell.to(torch.int32)[..., None] + self._steps
        rows = self._dense_rows(corners[:, : self.dense_levels])
        if self.dense_levels < len(self.levels):
            rows = torch.cat((rows, self._hashed_rows(corners[:, self.dense_levels :])), dim=1)
        weights = near_far[:, :, 0]
        for dim in range(1, self.settings.dims):
            weights = (near_far[:, :, dim, :, None] * weights[:, :, None, :]).flatten(2)
        return rows, weights

    def _dense_rows(self, corners: Tensor) -> Tensor:
        """Rows x + y * resolution + ... of corners (B, levels, dims, 2): (B, levels, 2^dims)."""
        count = self.dense_levels
        rows = corners[:, :, 0]
        for dim in range(1, self.settings.dims):
            along = corners[:, :, dim] * self._resolution[:count] ** dim
            rows = (along[..., None] + rows[:, :, None, :]).flatten(2)
        # Corners beyond the far border wrap into other rows, modulo the entries; once is enough, for they lie
        # less than one resolution beyond.
        entries = self._entries[:count]
        rows = torch.where(rows < entries, rows, rows - entries)
        return rows + self._offset[:count]

    def _hashed_rows(self, corners: Tensor) -> Tensor:
        """As `_dense_rows`, for hashed levels: x ^ y * prime ^ ... in uint32, modulo the entries."""
        # In int64: a vertex below 2^31 times a prime below 2^32 does not overflow, and as the entries are a
        # power of two that divides 2^32, masking them out is also the wrap of uint32.
        corners = corners.long()
        rows = corners[:, :, 0]
        for dim in range(1, self.settings.dims):
            rows = ((corners[:, :, dim, :, None] * PRIMES[dim]) ^ rows[:, :, None, :]).flatten(2)
        wrapped = rows & (2**self.settings.log2_hashmap_size - 1)
        return wrapped.to(torch.int32) + self._offset[self.dense_levels :]

    def forward(self, coords: Tensor) -> Tensor:
        """Encodes coords (..., dims) in [0, 1] as (..., levels * features) float32."""
        rows, weights = self.lookups(coords.reshape(-1, self.settings.dims))
        rows, weights = rows.flatten(0, 1), weights.flatten(0, 1)
        encoded = F.embedding_bag(rows, self.table, per_sample_weights=weights, mode="sum")
        return encoded.view(*coords.shape[:-1], self.settings.width)

    def touch(self, coords: Tensor) -> "TouchedEntries":
        """The distinct entries that encoding coords (B, dims) reads, and how to read only those."""
        return TouchedEntries(*self.lookups(coords))


class TouchedEntries:
    """The distinct table entries of one batch: a compact table (U, features) stands in for the whole one.

    `rows` (U,) are their places in the whole table, ascending. One sort over all levels serves both
    directions: in the sorted order the uses of an entry are neighbours, so the backward pass is a segmented
    sum over them, without atomics, and gives the same bits every time.
    """

    def __init__(self, rows: Tensor, weights: Tensor) -> None:
        corners = rows.shape[-1]
        self.batch = rows.shape[0]
        self.weights = weights.reshape(-1, corners)
        ordered, order = rows.flatten().sort()
        first = torch.ones_like(ordered, dtype=torch.bool)
        torch.ne(ordered[1:], ordered[:-1], out=first[1:])
        self.starts = first.nonzero()[:, 0]
        self.rows = ordered.index_select(0, self.starts).long()
        compact = first.cumsum(0).sub_(1)
        self.lookups = torch.empty_like(compact).scatter_(0, order, compact).view(-1, corners)
        self.sources = order >> corners.bit_length() - 1  # // corners, a power of two
        self.source_weights = self.weights.flatten().index_select(0, order)

    def encode(self, entries: Tensor) -> Tensor:
        """Encodes the batch from its compact table (U, features): (B, levels * features), differentiable."""
        return _Interpolate.apply(entries, self).view(self.batch, -1)


class _Interpolate(torch.autograd.Function):
    """Weighted sums of entries; autograd's own backward is slower and has no fixed order on GPUs."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, touched: TouchedEntries) -> Tensor:
        ctx.touched = touched
        return F.embedding_bag(touched.lookups, entries, per_sample_weights=touched.weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        touched = ctx.touched
        summed = F.embedding_bag(
            touched.sources,
            gradient.contiguous(),
            offsets=touched.starts,
            per_sample_weights=touched.source_weights,
            mode="sum",
        )
        return summed, None
