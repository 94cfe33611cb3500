"""Multi-resolution hash encoding in pure PyTorch: tiny-cuda-nn's numbers from the same parameters."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_dvt.errors import UserError

PRIME = 2654435761


@dataclass(frozen=True)
class HashGridSettings:
    """Shape of a hash grid, in tiny-cuda-nn's terms. The defaults are the paper's (A.1): 2^4 to 2^10.

    The scale of a level is computed in float32, as tiny-cuda-nn does, or the parameter layouts would differ:
    with the paper's settings log2(per_level_scale) rounds to 0.40000007, the finest level gets 1025 vertices
    a side instead of 1024, more than 2^20 in all, and so is the one level that is hashed.
    """

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
    for name in ("levels", "features", "log2_hashmap_size", "base_resolution", "per_level_scale"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(settings, name)}")
    log2_scale = np.log2(np.float32(settings.per_level_scale))
    levels, offset = [], 0
    for index in range(settings.levels):
        growth = np.exp2(np.float32(index) * log2_scale)
        scale = float(growth * np.float32(settings.base_resolution) - np.float32(1))
        resolution = math.ceil(scale) + 1
        vertices = resolution**2
        entries = min(math.ceil(vertices / 8) * 8, 2**settings.log2_hashmap_size)
        levels.append(Level(scale, resolution, entries, offset, hashed=entries < vertices))
        offset += entries
    return levels


class HashGrid(nn.Module):
    """Encodes coordinates in [0, 1]^2 as interpolated table entries, one group of features a level.

    `params` is tiny-cuda-nn's flat vector: level by level, an entry's features adjacent, drawn from
    U(-1e-4, 1e-4).
    """

    scale: Tensor
    resolution: Tensor
    entries: Tensor
    offset: Tensor
    hashed: Tensor
    corners: Tensor

    def __init__(self, settings: HashGridSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or HashGridSettings()
        levels = grid_levels(self.settings)
        for name, of_levels in zip(Level._fields, zip(*levels)):
            self.register_buffer(name, torch.tensor(of_levels)[:, None], persistent=False)
        self.register_buffer("corners", torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]]), persistent=False)
        count = levels[-1].offset + levels[-1].entries
        self.params = nn.Parameter(torch.empty(count * self.settings.features).uniform_(-1e-4, 1e-4))

    def lookups(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table and their weights for coords (B, 2) as x and y: two of (B, levels, 4)."""
        position = coords[:, None] * self.scale + 0.5  # (B, levels, 2)
        cell = position.floor()
        fraction = (position - cell)[:, :, None]
        weights = torch.where(self.corners == 1, fraction, 1 - fraction).prod(-1)
        x, y = (cell.long()[:, :, None] + self.corners).unbind(-1)
        rows = torch.where(self.hashed, x ^ (y * PRIME), x + y * self.resolution)
        # tiny-cuda-nn hashes in uint32: the entries of a hashed level, a power of two, divide what wraps there.
        return rows % self.entries + self.offset, weights

    def forward(self, coords: Tensor) -> Tensor:
        """Encodes coords (B, 2) in [0, 1] as (B, levels * features)."""
        rows, weights = (lookup.flatten(0, 1) for lookup in self.lookups(coords))
        table = self.params.view(-1, self.settings.features)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum").view(len(coords), -1)
