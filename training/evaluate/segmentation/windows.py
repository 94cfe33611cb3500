"""Sizes, padding and sliding windows, as mmsegmentation and DINOv2's evaluations have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad


def scaled_size(size: tuple[int, int], longest: int, shortest: int) -> tuple[int, int]:
    """(height, width), aspect kept, as large as a long side of `longest` and a short one of `shortest` let it be.

    Rounded half up, as mmcv's rescale_size.
    """
    factor = min(longest / max(size), shortest / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (..., 3, h, w) at (..., 3, *size): bilinear without smoothing first, as OpenCV's INTER_LINEAR."""
    batch = image if image.ndim == 4 else image[None]
    return interpolate(batch, size, mode="bilinear", align_corners=False).reshape(*image.shape[:-2], *size)


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (h, w) at `size`: pixel i is pixel floor(i h / size) of before, as OpenCV's INTER_NEAREST."""
    rows, columns = (torch.arange(n) * old // n for n, old in zip(size, labels.shape))
    return labels[rows[:, None], columns]


def pad_below(x: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """x (..., h, w) with `value` below and to the right, up to `size`; as it is where it is larger."""
    height, width = (max(0, wanted - there) for wanted, there in zip(size, x.shape[-2:]))
    return pad(x, (0, width, 0, height), value=value)


def patch_padding(size: tuple[int, int], patch: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom): pixels that make a size (h, w) a multiple of the patch, half on either side.

    Where they are odd the larger half is on the right and at the bottom (DINOv2's CenterPadding): 512 is padded by 3
    and 3 to 518 = 37 * 14.
    """
    height, width = (-side % patch for side in size)
    return width // 2, width - width // 2, height // 2, height - height // 2


def window_places(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(start, stop) of the windows along one side; the last is moved back to end with the image.

    An image shorter than the window has one, of its own length.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    stops = [min(i * stride + window, length) for i in range(count)]
    return [(max(stop - window, 0), stop) for stop in stops]


def slide(images: Tensor, predict: Callable[[Tensor], Tensor], window: int, stride: int, batch_size: int = 8) -> Tensor:
    """Predictions over windows, each pixel the mean over the windows that it lies in.

    Args:
        images: (B, 3, h, w).
        predict: (N, 3, a, b) -> (N, C, a, b).
        window, stride: pixels, alike along both sides.
        batch_size: images that `predict` is given at once, at most.

    Returns:
        (B, C, h, w).
    """
    height, width = images.shape[-2:]
    places = [
        (slice(*rows), slice(*columns))
        for rows in window_places(height, window, stride)
        for columns in window_places(width, window, stride)
    ]
    counts = images.new_zeros(height, width)
    total: Tensor | None = None
    step = max(1, batch_size // len(images))
    for start in range(0, len(places), step):
        some = places[start : start + step]
        parts = predict(torch.cat([images[..., rows, columns] for rows, columns in some])).split(len(images))
        for (rows, columns), part in zip(some, parts):
            if total is None:
                total = part.new_zeros(len(images), part.shape[1], height, width)
            total[..., rows, columns] += part
            counts[rows, columns] += 1
    assert total is not None
    return total / counts.to(total.device)
