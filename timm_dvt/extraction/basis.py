"""One basis for all images: principal components that maps keep, and those that are the colors of pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from timm_dvt.errors import UserError
from timm_dvt.shared_folder import write_atomically
from timm_dvt.viewer.colors import Projection, fit_projection, principal_axes

SAMPLE = 64  # images that the basis is fitted on
ROWS = 2**15  # patches of them, at the most
BASIS = "basis.safetensors"
COLORS = ("mean", "axes", "low", "high")


class Basis:
    """A basis of each variable that holds maps.

    Attributes:
        components: mean (C,) and components (K, C), orthonormal, by falling variance, by variable; none without --pca.
        colors: three components as red, green and blue, by variable; none without --pictures.
    """

    def __init__(
        self, components: Mapping[str, tuple[torch.Tensor, torch.Tensor]], colors: Mapping[str, Projection]
    ) -> None:
        self.components, self.colors = components, colors

    @classmethod
    def fit(cls, samples: Iterable[Mapping[str, torch.Tensor]], pca: int | None, colors: bool) -> Basis:
        """Fit to maps (B, H, W, C) of a sample of images, by variable. Raises ValueError for too few patches."""
        draw = np.random.default_rng(0)
        rows: dict[str, list[np.ndarray]] = {}
        for sample in samples:
            for key, maps in sample.items():
                flat = maps.flatten(0, -2).cpu().numpy()
                taken = draw.permutation(len(flat))[: len(maps) * ROWS // SAMPLE]
                rows.setdefault(key, []).append(flat[np.sort(taken)])
        whole = {key: np.concatenate(parts).astype(np.float64) for key, parts in rows.items()}
        components = {key: _components(tokens, pca) for key, tokens in whole.items()} if pca else {}
        for key, (mean, axes) in components.items():
            whole[key] = (whole[key] - mean.double().numpy()) @ axes.double().numpy().T
        return cls(components, {key: fit_projection(tokens) for key, tokens in whole.items()} if colors else {})

    def project(self, variables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Maps (B, H, W, C) as (B, H, W, K); other variables as they are."""
        projected = dict(variables)
        for key, (mean, axes) in self.components.items():
            maps = variables[key]
            projected[key] = (maps - mean.to(maps.device)) @ axes.to(maps.device).T
        return projected

    def save(self, path: Path) -> None:
        """Write the basis as safetensors: VARIABLE.mean and VARIABLE.components, VARIABLE.color.*."""
        tensors: dict[str, torch.Tensor] = {}
        for key, (mean, axes) in self.components.items():
            tensors |= {f"{key}.mean": mean, f"{key}.components": axes}
        for key, colors in self.colors.items():
            tensors |= {f"{key}.color.{name}": torch.from_numpy(getattr(colors, name).copy()) for name in COLORS}
        write_atomically(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> Basis:
        """As it was written; an empty one where there is no file."""
        tensors = load_file(path) if path.exists() else {}
        components, colors = {}, {}
        for key in dict.fromkeys(name.split(".")[0] for name in tensors):
            if f"{key}.components" in tensors:
                components[key] = (tensors[f"{key}.mean"], tensors[f"{key}.components"])
            if f"{key}.color.mean" in tensors:
                colors[key] = Projection(*(tensors[f"{key}.color.{name}"].numpy() for name in COLORS))
        return cls(components, colors)


def _components(rows: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (C,) and the first principal components (count, C) of (N, C) rows, float32."""
    if count > min(len(rows) - 1, rows.shape[1]):
        raise UserError(f"--pca {count}: {len(rows)} patches of {rows.shape[1]} channels have not so many components")
    mean, axes = principal_axes(rows, count)
    return torch.from_numpy(mean).float(), torch.from_numpy(axes.T).float().contiguous()
