"""A split: images, each with one annotation; and how annotations are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_dvt.errors import ImageError, UserError
from timm_dvt.image_files import load_image

IGNORE = 255


class Boxes(NamedTuple):
    """Objects of one image.

    Attributes:
        boxes: (N, 4) float x0, y0, x1, y1 as fractions of the image's width and height, x1 and y1 exclusive.
        classes: (N,) int64 from 0, without a background class.
        difficult: (N,) bool: neither a hit nor a miss when found (VOC's "difficult", COCO's "iscrowd").
    """

    boxes: Tensor
    classes: Tensor
    difficult: Tensor


@dataclass(frozen=True)
class Split:
    """Images, each with one annotation.

    Attributes:
        name: as in messages.
        images: paths.
        classes: names; empty where there are none.
        annotation: i -> what belongs to image i: a mask (h, w) uint8 with 255 to ignore, `Boxes`, a class
            index, a depth map (h, w) float32 in meters with 0 for unknown, of videos the `Split` of the frames, a
            `PointPair`; None for images alone.
        digest: of classes and annotations, once they were checked.
    """

    name: str
    images: Sequence[Path]
    classes: Sequence[str]
    annotation: Callable[[int], Any]
    digest: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """(3, h, w) in [0, 1]. Raises ValueError with the file's name if it is no image."""
        try:
            return load_image(self.images[index])
        except ImageError as error:
            raise UserError(f"{self.images[index]}: {error}") from error

    def crops(
        self,
        indices: Sequence[int],
        draws: Sequence[np.random.Generator],
        crop: Callable[[Tensor, Any, np.random.Generator], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Random crops (B, 3, h, w) of images, and those of their annotations (B, h, w): `crop` of both, for each."""
        made = [crop(self.image(index), self.annotation(index), draw) for index, draw in zip(indices, draws)]
        return torch.stack([image for image, _ in made]), torch.stack([annotation for _, annotation in made])

    def limit(self, count: int | None) -> Split:
        """At most `count` images, evenly spread over the list (sorted lists keep classes together)."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise UserError(f"limit must be 1 or more, got {count}")
        return self.take([int(i) for i in np.linspace(0, len(self) - 1, count).round()])

    def take(self, chosen: Sequence[int]) -> Split:
        """The images of these numbers."""
        read = self.annotation
        return replace(self, images=[self.images[i] for i in chosen], annotation=lambda index: read(chosen[index]))


def join(name: str, first: Split, second: Split) -> Split:
    """Both splits in one."""

    def read(i: int) -> Any:
        return first.annotation(i) if i < len(first) else second.annotation(i - len(first))

    return Split(name, [*first.images, *second.images], first.classes, read)


def list_files(folder: Path, *suffixes: str) -> list[Path]:
    """The files of a folder with one of these suffixes, whose names start with no dot. Raises FileNotFoundError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
