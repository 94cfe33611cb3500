"""Who trains the hash grid of the semantics field: pure PyTorch, or tinycudann where it imports."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.stage1.field.hashgrid import AllEntries, HashGrid, HashGridSettings, TouchedEntries
from training.stage1.field.touched_adam import TouchedAdam

BACKENDS = ("auto", "torch", "tinycudann")
COARSE = 40_000  # entries of a level; a batch of 2,048 coordinates has 8,192 lookups in each


class GridTrainer(Protocol):
    """Trains a HashGrid: encode a batch, backward through what depends on it, step; finish at the end."""

    def encode(self, coords: Tensor) -> Tensor:
        """Encodes the batch's coords (B, dims) as (B, levels * features), differentiable in the grid."""

    def step(self, learning_rate: float) -> None:
        """One Adam step of the grid, with the gradient that backward left."""

    def finish(self) -> HashGrid:
        """The trained grid, as the pure PyTorch module."""


class TorchTrainer:
    """Pure PyTorch on any device; a step pays for the table entries that its batch touches, no others.

    But for the coarse levels: a batch touches most of their entries, and it costs least to move them all.
    """

    def __init__(self, grid: HashGrid, max_steps: int) -> None:
        self.grid = grid
        coarse = [level.entries for level in grid.levels if level.entries <= COARSE]
        self.coarse_levels, count = len(coarse), sum(coarse)
        table = grid.table.detach()
        self.coarse = nn.Parameter(table[:count].clone())
        self.coarse_adam = torch.optim.Adam([self.coarse], fused=table.device.type in ("cpu", "cuda"))
        self.fine_adam = TouchedAdam(table[count:], max_steps)

    def encode(self, coords: Tensor) -> Tensor:
        rows, weights = self.grid.lookups(coords)
        levels = self.coarse_levels
        encoded = []
        if levels:
            coarse = AllEntries(rows[:, :levels], weights[:, :levels], len(self.coarse))
            encoded.append(coarse.encode(self.coarse))
        if levels < len(self.grid.levels):
            fine = TouchedEntries(rows[:, levels:] - len(self.coarse), weights[:, levels:])
            self.entries = self.fine_adam.gather(fine.rows).detach().requires_grad_()
            encoded.append(fine.encode(self.entries))
        return torch.cat(encoded, dim=1)

    def step(self, learning_rate: float) -> None:
        if self.coarse_levels:
            _gradient(self.coarse)
            self.coarse_adam.param_groups[0]["lr"] = learning_rate
            self.coarse_adam.step()
            self.coarse_adam.zero_grad()
        if self.coarse_levels < len(self.grid.levels):
            self.fine_adam.step(_gradient(self.entries), learning_rate)

    def finish(self) -> HashGrid:
        self.fine_adam.settle()
        with torch.no_grad():
            self.grid.table[: len(self.coarse)] = self.coarse
        return self.grid


class TinyCudaTrainer:
    """tinycudann's HashGrid, torch's Adam over all of its table. Unproven: no CUDA machine has run it yet.

    It starts from the PyTorch grid's parameters and hands the trained ones back to it: the layout is the
    same. That the two agree is checked on a few coordinates before training, so that a tinycudann with other
    formulas is an error and not a wrong field.
    """

    def __init__(self, grid: HashGrid, max_steps: int) -> None:
        settings, device = grid.settings, grid.params.device
        self.grid = grid
        self.encoding = _tinycudann().Encoding(
            n_input_dims=settings.dims, encoding_config=tinycudann_config(settings), dtype=torch.float32
        ).to(device)
        if self.encoding.params.shape != grid.params.shape:
            raise RuntimeError(
                f"this tinycudann lays the grid out in {self.encoding.params.numel()} parameters, "
                f'{grid.params.numel()} were expected; use backend="torch"'
            )
        with torch.no_grad():
            self.encoding.params.copy_(grid.params)
            probe = torch.rand(256, settings.dims, generator=torch.Generator().manual_seed(0)).to(device)
            apart = (self.encoding(probe).float() - grid(probe)).abs().max().item()
            # tinycudann places a coordinate in float32, to 1e-4 of a cell; entries are at most 2e-4 apart.
            if not apart < 1e-6:
                raise RuntimeError(f'this tinycudann encodes otherwise, by {apart:.1e}; use backend="torch"')
        on_cuda = device.type == "cuda"
        self.adam = torch.optim.Adam(self.encoding.parameters(), fused=on_cuda)

    def encode(self, coords: Tensor) -> Tensor:
        return self.encoding(coords.float()).float()

    def step(self, learning_rate: float) -> None:
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        self.adam.zero_grad()

    def finish(self) -> HashGrid:
        with torch.no_grad():
            self.grid.params.copy_(self.encoding.params)
        return self.grid


def tinycudann_config(settings: HashGridSettings) -> dict[str, Any]:
    """The `encoding_config` under which tinycudann.Encoding is the grid of these settings."""
    return {
        "otype": "HashGrid",
        "n_levels": settings.levels,
        "n_features_per_level": settings.features,
        "log2_hashmap_size": settings.log2_hashmap_size,
        "base_resolution": settings.base_resolution,
        "per_level_scale": settings.per_level_scale,
        "interpolation": "Linear",
    }


def grid_trainer(backend: str, grid: HashGrid, max_steps: int) -> GridTrainer:
    """The trainer of that name; "auto" is tinycudann for a grid on a CUDA device if it imports, else torch.

    Raises ValueError for another name, ImportError where tinycudann is asked for and does not import.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "tinycudann" or (backend == "auto" and grid.params.is_cuda and tinycudann_imports()):
        return TinyCudaTrainer(grid, max_steps)
    return TorchTrainer(grid, max_steps)


def tinycudann_imports() -> bool:
    """Whether tinycudann is there and usable."""
    try:
        _tinycudann()
    except ImportError:
        return False
    return True


def _gradient(read: Tensor) -> Tensor:
    if read.grad is None:
        raise RuntimeError("step() needs a backward pass through what encode() returned")
    return read.grad


def _tinycudann() -> Any:
    try:
        import tinycudann
    except (ImportError, OSError) as error:  # without a usable GPU it raises OSError (EnvironmentError)
        raise ImportError(
            f'backend="tinycudann" needs tinycudann and a CUDA GPU, and it does not import: {error}. '
            "It installs from https://github.com/NVlabs/tiny-cuda-nn (bindings/torch); "
            'backend="torch" gives the same field without it.'
        ) from error
    return tinycudann
