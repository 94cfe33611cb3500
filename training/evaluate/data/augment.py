"""What the repository's trainings do to images at random. All of it follows from a NumPy generator that is handed in.

Images are (3, h, w) float in [0, 1], masks (h, w) uint8, depths (h, w) meters. The configs are those of
evaluation/configs of the authors' repository, their transforms mmsegmentation's and evaluation/depth's; those compute
in 8 bits between the steps, these do not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, adjust_hue, rotate

from training.evaluate.data.splits import IGNORE

# ImageNet's, for every model, whatever it was trained with.
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1) / 255
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) / 255


def normalize(image: Tensor) -> Tensor:
    """An image (..., 3, h, w) less ImageNet's mean, by its standard deviation."""
    return (image - MEAN.to(image)) / STD.to(image)


def flip(draw: np.random.Generator, *maps: Tensor) -> tuple[Tensor, ...]:
    """All of them mirrored left to right, or none, equally likely."""
    return tuple(x.flip(-1) for x in maps) if draw.random() < 0.5 else maps


def random_place(size: tuple[int, int], crop: tuple[int, int], draw: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a crop of an image of `size`, each place equally likely; all of a side that is shorter."""
    starts = [int(draw.integers(max(side - part, 0) + 1)) for side, part in zip(size, crop)]
    rows, columns = (slice(start, start + part) for start, part in zip(starts, crop))
    return rows, columns


def crop_with_many_classes(
    mask: Tensor, crop: tuple[int, int], most: float, draw: np.random.Generator
) -> tuple[slice, slice]:
    """A crop in which no class has `most` of the labeled pixels or more; after ten that have, one as it comes."""
    for _ in range(10):
        rows, columns = random_place((mask.shape[0], mask.shape[1]), crop, draw)
        counts = torch.bincount(mask[rows, columns].flatten().int(), minlength=IGNORE + 1)[:IGNORE]
        if int((counts > 0).sum()) > 1 and counts.max() / counts.sum() < most:
            return rows, columns
    return random_place((mask.shape[0], mask.shape[1]), crop, draw)


def photometric_distortion(image: Tensor, draw: np.random.Generator) -> Tensor:
    """mmsegmentation's PhotoMetricDistortion: each of four changes with probability one half.

    Brightness by up to 32 of 255; contrast by a factor of 0.5 to 1.5, before or after the colors; saturation (of
    HSV) by a factor of 0.5 to 1.5; hue by -18 to 17 of 180.
    """

    def chosen() -> bool:
        return bool(draw.integers(2))

    if chosen():
        image = (image + draw.uniform(-32, 32) / 255).clamp(0, 1)
    contrast_first = chosen()
    if contrast_first and chosen():
        image = (image * draw.uniform(0.5, 1.5)).clamp(0, 1)
    if chosen():
        image = saturate(image, draw.uniform(0.5, 1.5))
    if chosen():
        image = adjust_hue(image, int(draw.integers(-18, 18)) / 180)
    if not contrast_first and chosen():
        image = (image * draw.uniform(0.5, 1.5)).clamp(0, 1)
    return image


def saturate(image: Tensor, factor: float) -> Tensor:
    """HSV's saturation times `factor`, at most 1, at the same hue and value.

    With value V the largest channel, S = (V - min) / V, and V - c is proportional to S for every channel c.
    """
    value = image.amax(0)
    saturation = (value - image.amin(0)) / value.clamp(min=1e-12)
    return (value - (value - image) * torch.clamp(1 / saturation.clamp(min=1e-12), max=factor)).clamp(min=0)


def turn(image: Tensor, depth: Tensor, draw: np.random.Generator, degrees: float = 2.5) -> tuple[Tensor, Tensor]:
    """One time in two both turned by up to so many degrees; what comes in at the edges is black and of no depth."""
    if draw.random() < 0.5:
        angle = float(draw.uniform(-degrees, degrees))
        image = rotate(image, angle, InterpolationMode.BILINEAR)
        depth = rotate(depth[None], angle, InterpolationMode.NEAREST)[0]
    return image, depth


def recolor(image: Tensor, draw: np.random.Generator) -> Tensor:
    """The depth protocol's ColorAug, one time in two: gamma 0.9 to 1.1, brightness 0.75 to 1.25, channels 0.9 to 1.1.

    The power is of values up to 255, as theirs: a gamma of 1.1 makes white, were it not clipped, 1.74 times as bright.
    """
    if draw.random() >= 0.5:
        return image
    gamma, brightness = draw.uniform(0.9, 1.1), draw.uniform(0.75, 1.25)
    channels = torch.tensor(draw.uniform(0.9, 1.1, 3), dtype=image.dtype).view(3, 1, 1)
    return (image**gamma * 255 ** (gamma - 1) * brightness * channels).clamp(0, 1)


def one_cycle(step: int, steps: int, low: float = 0.85, high: float = 0.95, rise: float = 0.3) -> float:
    """AdamW's first beta by mmcv's OneCycle policy: from high to low in the first part `rise`, and back, in cosines."""
    turning = rise * steps - 1
    if step <= turning:
        start, end, done = high, low, step / max(turning, 1e-9)
    else:
        start, end, done = low, high, (step - turning) / max(steps - 1 - turning, 1e-9)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))
