"""Reading what `timm-dvt extract` wrote: a map by its image's name, without loading the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from timm_dvt.errors import UserError
from timm_dvt.extraction.folder import Index, read_layout
from timm_dvt.extraction.formats import READERS, Record


def open_features(folder: str | Path, variable: str | None = None) -> Features:
    """The features of images in a folder that `timm-dvt extract` wrote, or is writing.

    Args:
        variable: one of `.variables`; default the last block's maps, denoised where they were.

    Raises:
        UserError: it is no such folder, or has no such variable.
    """
    return Features(Path(folder), variable)


class Features(Mapping[str, np.ndarray]):
    """Arrays by image name, each read when it is asked for: (H, W, C), or (C,) of class tokens.

    Attributes:
        settings: what made them: model, digest of its weights, size, normalization, ...
        variables: shapes of what there is for each image, by name.
        variable: which of them this gives.
        errors: reasons by name of images that gave no features.
    """

    def __init__(self, folder: Path, variable: str | None = None) -> None:
        self.folder = folder
        self.settings, self._layout = read_layout(folder)
        self.variables = {name: tuple(shape) for name, shape in self._layout.shapes.items()}
        self.variable = variable or self.settings["default"]
        if self.variable not in self.variables:
            raise UserError(f"variable must be one of {', '.join(self.variables)}; got {variable!r}")
        self._places: dict[str, tuple[int, int, Record]] = {}
        self.errors: dict[str, str] = {}
        for shard, place, record in Index(folder).images():
            if "error" in record:
                self.errors[record["name"]] = record["error"]
            else:
                self._places[record["name"]] = shard, place, record

    def __getitem__(self, name: str) -> np.ndarray:
        shard, place, record = self._places[name]
        return READERS[self.settings["format"]](self.folder, self._layout, shard, self.variable, record, place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def image_size(self, name: str) -> tuple[int, int]:
        """Height and width of the image itself, in pixels."""
        record = self._places[name][2]
        return record["height"], record["width"]

    def dataset(self, transform: Callable[[torch.Tensor], Any] | None = None) -> FeatureDataset:
        """The same as a PyTorch data set, in the images' order."""
        return FeatureDataset(self, transform)


class FeatureDataset(Dataset):
    """Features of images by number: {"name": str, "features": tensor (H, W, C)}."""

    def __init__(self, features: Features, transform: Callable[[torch.Tensor], Any] | None = None) -> None:
        self.features, self.transform, self.names = features, transform, list(features)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> dict[str, Any]:
        name = self.names[number]
        values: Any = torch.from_numpy(np.array(self.features[name]))
        return {"name": name, "features": values if self.transform is None else self.transform(values)}
