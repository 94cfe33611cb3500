"""What encodes the coordinates of the semantics field: the hash grid in PyTorch, or tinycudann's where it imports."""

import warnings
from types import ModuleType

import torch
from torch import nn

from timm_dvt.errors import UserError
from training.stage1.field.hashgrid import HashGrid, HashGridSettings

BACKENDS = ("auto", "torch", "tinycudann")


class OtherFormulas(RuntimeError):
    """A tinycudann that would give another field."""


def make_encoding(settings: HashGridSettings, backend: str, device: torch.device) -> nn.Module:
    """An encoding of coords (B, 2) as (B, levels * features), with the parameters of a new HashGrid.

    backend: "torch", "tinycudann", or "auto": tinycudann on a CUDA device if it imports and computes the same, else
    torch. Raises ValueError for another one, ImportError where tinycudann is asked for and does not import, and
    OtherFormulas where it does not compute the same.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    grid = HashGrid(settings).to(device)
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return grid
    try:
        return _tinycudann_encoding(grid, _tinycudann())
    except (ImportError, OtherFormulas) as error:
        if backend == "tinycudann":
            raise
        if isinstance(error, OtherFormulas):
            warnings.warn(f"{error}; the slower hash grid in PyTorch takes its place", stacklevel=2)
        return grid


def _tinycudann_encoding(grid: HashGrid, tinycudann: ModuleType) -> nn.Module:
    """tinycudann's encoding with the grid's parameters. Unproven: no CUDA machine has run it yet.

    That the two agree is checked on a few coordinates, so that a tinycudann with other formulas is an error and not
    a wrong field.
    """
    settings, device = grid.settings, grid.params.device
    config = {
        "otype": "HashGrid",
        "n_levels": settings.levels,
        "n_features_per_level": settings.features,
        "log2_hashmap_size": settings.log2_hashmap_size,
        "base_resolution": settings.base_resolution,
        "per_level_scale": settings.per_level_scale,
        "interpolation": "Linear",
    }
    encoding = tinycudann.Encoding(n_input_dims=2, encoding_config=config, dtype=torch.float32).to(device)
    if encoding.params.shape != grid.params.shape:
        laid_out, expected = encoding.params.numel(), grid.params.numel()
        raise OtherFormulas(f"this tinycudann lays the grid out in {laid_out} parameters, {expected} were expected")
    with torch.no_grad():
        encoding.params.copy_(grid.params)
        probe = torch.rand(256, 2, generator=torch.Generator().manual_seed(0)).to(device)
        apart = (encoding(probe) - grid(probe)).abs().max().item()
    # In float32 a coordinate's place is known to 1e-4 of a cell; entries are at most 2e-4 apart.
    if not apart < 1e-6:
        raise OtherFormulas(f"this tinycudann encodes otherwise, by {apart:.1e}")
    return encoding


def _tinycudann() -> ModuleType:
    try:
        import tinycudann
    except (ImportError, OSError) as error:  # without a usable GPU it raises OSError (EnvironmentError)
        raise ImportError(
            f'backend="tinycudann" needs tinycudann and a CUDA GPU, and it does not import: {error}. '
            "It installs from https://github.com/NVlabs/tiny-cuda-nn (bindings/torch); "
            'backend="torch" gives the same field without it.'
        ) from error
    return tinycudann
