"""What rivals learn from: a backbone's patch tokens of photographs, summed up, and of an image without content."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.calibration.samples import Source, canvas
from training.common.backbone import FeatureReader


@dataclass(frozen=True)
class Moments:
    """Means over the patch tokens x of photographs, float64, on the CPU.

    Attributes:
        mean_map: (K, K, C) of x at each place.
        second: (C, C) of x x^T over all places.
    """

    mean_map: Tensor
    second: Tensor


class Sample:
    """Crops of photographs and a backbone that reads them, at most once each.

    Attributes:
        model: the backbone, without a denoiser.
        images: the photographs.
        reader: of its final patch tokens.
        views: forward passes over photographs.
        batch_size: of them.
    """

    def __init__(
        self, model: Any, images: list[Source], size: int, views: int, batch_size: int = 8, dtype: str = "float32"
    ) -> None:
        self.model, self.images, self.views, self.batch_size = model, images, views, batch_size
        self.reader = FeatureReader(model, input_size=size, dtype=dtype)

    def batches(self) -> Iterator[Tensor]:
        """Random crops (B, 3, S, S) in [0, 1], of the images by turns: the same ones each time."""
        size = (self.reader.input_size,) * 2
        for start in tqdm(range(0, self.views, self.batch_size), desc="rivals: photographs", leave=False):
            views = range(start, min(start + self.batch_size, self.views))
            yield torch.stack([canvas(self.images[i % len(self.images)], size, i) for i in views])

    def maps(self, images: Tensor) -> Tensor:
        """Patch tokens (B, K, K, C) of images (B, 3, S, S) in [0, 1], float64, on the CPU."""
        (maps,) = self.reader.patch_features(images).values()
        return maps.cpu().double()

    @cached_property
    def moments(self) -> Moments:
        """Of the photographs."""
        total, second = torch.zeros(()), torch.zeros(())
        for images in self.batches():
            maps = self.maps(images)
            total = total + maps.sum(0)
            tokens = maps.flatten(0, 2)
            second = second + tokens.T @ tokens
        return Moments(total / self.views, second / (self.views * self.reader.grid**2))

    @cached_property
    def black(self) -> Tensor:
        """(K, K, C) patch tokens of a black image."""
        return self.maps(torch.zeros(1, 3, self.reader.input_size, self.reader.input_size))[0]
