"""Random views of one image (crop, resize, flip) and where each of their patches lies in the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from timm_dvt.errors import UserError


@dataclass(frozen=True)
class Views:
    """The crops of one image.

    Attributes:
        boxes: (V, 4) float64, x0, y0, x1, y1 as fractions of the whole image's width and height.
        flips: (V,) bool, True where the crop is mirrored left to right.
    """

    boxes: Tensor
    flips: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, which: slice) -> Views:
        return Views(self.boxes[which], self.flips[which])


def sample_views(
    count: int,
    image_size: tuple[int, int],
    seed: int = 0,
    *,
    area: tuple[float, float] = (0.1, 0.5),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
) -> Views:
    """Draw the paper's random views (A.1): crops of 0.1 to 0.5 of the image's area, flipped half of the time.

    Area and aspect are measured after the image is made square, as the paper does before it crops, so that
    all views and the whole image are, on average, distorted alike. Boxes are snapped to whole pixels of the
    image: the box recorded is exactly the box cut out.

    Args:
        count: number of views; view i is the same whatever the count.
        image_size: (height, width) of the image in pixels.
        seed: same seed, same views.
        area: smallest and largest share of the image's area, within (0, 1].
        aspect: smallest and largest width / height; drawn log-uniformly.
        flip: probability that a view is mirrored.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 1:
        raise UserError(f"count must be at least 1, got {count}")
    check_area(area)
    if not 0 < aspect[0] <= aspect[1]:
        raise UserError(f"aspect must be (smallest, largest), both positive, got {aspect}")
    if not 0 <= flip <= 1:
        raise UserError(f"flip must be a probability, got {flip}")
    # A fixed number of draws a view, row by row: a longer run begins with the shorter run's views.
    draws = np.random.default_rng(seed).random((count, 5))
    share = area[0] + (area[1] - area[0]) * draws[:, 0]
    ratio = np.exp(np.log(aspect[0]) + (np.log(aspect[1]) - np.log(aspect[0])) * draws[:, 1])
    x0, x1 = _interval(np.sqrt(share * ratio), draws[:, 2], image_size[1])
    y0, y1 = _interval(np.sqrt(share / ratio), draws[:, 3], image_size[0])
    return Views(torch.from_numpy(np.stack([x0, y0, x1, y1], 1)), torch.from_numpy(draws[:, 4] < flip))


def check_area(area: tuple[float, float]) -> None:
    """Raise UserError for what are no shares of an image."""
    if not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"area must be (smallest, largest) within (0, 1], got {area}")


def _interval(length: np.ndarray, place: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of about `length` at `place` (both in [0, 1]) that start and end between pixels."""
    whole = np.clip(np.rint(length * pixels), 1, pixels)
    start = np.minimum(np.floor(place * (pixels - whole + 1)), pixels - whole)
    return start / pixels, (start + whole) / pixels


def whole_view() -> Views:
    """The one view that is the whole image, not flipped."""
    return Views(torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64), torch.tensor([False]))


def shrink_for_views(image: Tensor, size: int, area: tuple[float, float], aspect: tuple[float, float]) -> Tensor:
    """Shrink an image once if it has more pixels than the smallest view resized to `size` can show.

    Views of a 50-megapixel photograph are then as quick to cut as those of a small one.
    """
    narrowest = (area[0] * min(aspect[0], 1 / aspect[1])) ** 0.5
    limit = math.ceil(size / narrowest)
    target = tuple(min(side, limit) for side in image.shape[-2:])
    if target == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image[None], size=target, mode="bilinear", align_corners=False, antialias=True)[0]


def render_views(image: Tensor, views: Views, size: int) -> Tensor:
    """Cut views out of an image and resize each to a square (antialiased bilinear).

    Args:
        image: (3, H, W) floating point.
        views: their boxes are snapped to the pixels of this image, as `sample_views` already did.
        size: side of the result in pixels.

    Returns:
        (V, 3, size, size) of the image's dtype and device.
    """
    height, width = image.shape[-2:]
    boxes = views.boxes * torch.tensor([width, height, width, height], dtype=torch.float64)
    rendered = []
    for (x0, y0, x1, y1), flip in zip(boxes.round().long().tolist(), views.flips.tolist()):
        crop = image[None, :, y0:y1, x0:x1]
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
        rendered.append(crop.flip(-1) if flip else crop)
    return torch.cat(rendered)


def patch_centers(size: int, patch: int, stride: int) -> Tensor:
    """(K,) float64: centers of the patches along one side of a square input, as fractions of that side.

    With K = (size - patch) // stride + 1 (paper A.1), patch i's center is (i * stride + patch / 2) / size.
    """
    count = (size - patch) // stride + 1
    return (torch.arange(count, dtype=torch.float64) * stride + patch / 2) / size


def view_axes(views: Views, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Where each view's patch centers lie in the whole image; crops are axis-aligned, so two axes say it all.

    Args:
        views: V views.
        centers: (K,) patch centers within an input, from `patch_centers`.

    Returns:
        xs (V, K), ys (V, K) float64, fractions of the whole image: the patch in row i and column j of view v
        has its center at (xs[v, j], ys[v, i]). A flipped view's xs run from right to left.
    """
    x0, y0, x1, y1 = views.boxes[:, :, None].unbind(1)
    across = torch.where(views.flips[:, None], 1 - centers, centers)
    return x0 + (x1 - x0) * across, y0 + (y1 - y0) * centers
