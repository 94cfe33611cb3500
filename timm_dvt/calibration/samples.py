"""Images to calibrate on: the caller's, in any of the forms they come in, or blank and noise images."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate, normalize

from timm_dvt.errors import CalibrationError, UserError
from timm_dvt.images import image_names, read_image, to_rgb, upright

Source = str | os.PathLike | Image.Image | torch.Tensor
AREA = (0.5, 1.0)  # of the largest box of the canvas's shape that an image holds
JUDGED = 32  # images by which it is judged whether they look alike
FEWEST_JUDGED = 8  # of fewer, any two are alike by chance
CORRELATED = 0.2  # thumbnails, on average: photographs up to 0.13, frames of one video 0.17 to 0.75
THUMBNAIL = (16, 16)
NOISE_CELLS = (2.0, 64.0)  # pixels, finest and coarsest
_logger = logging.getLogger(__name__)


def sources(images: Source | Iterable[Source], most: int) -> list[Source]:
    """Up to `most` single images out of what a caller passes as images.

    Args:
        images: an image (a path, a PIL image, a tensor (3, h, w)), a folder, which is searched with all its
            sub-folders and of which a random sample is taken, a tensor (B, 3, h, w), or an iterable of any of these,
            read no further than needed. Of several files those that cannot be decoded are left out, and named.

    Raises:
        CalibrationError: there is no image, no file of that name, or a thing that is none.
    """
    candidates: Iterator[Source]
    left_out: list[UserError] = []
    if isinstance(images, (str, os.PathLike)):
        candidates = _of_folder(Path(images), left_out) if os.path.isdir(images) else iter([images])
    elif isinstance(images, Image.Image) or (isinstance(images, torch.Tensor) and images.ndim == 3):
        candidates = iter([images])
    elif isinstance(images, Iterable):
        candidates = (
            source
            for item in images
            for source in (sources(item, most) if _is_several(item) else _readable([item], left_out))
        )
    else:
        raise CalibrationError(f"images is a {type(images).__name__}; pass paths, PIL images or tensors, or a folder.")
    taken: list[Source] = list(islice(candidates, most))
    for item in taken:
        if not isinstance(item, (str, os.PathLike, Image.Image, torch.Tensor)):
            raise CalibrationError(
                f"images holds a {type(item).__name__}; an image is a path, a PIL image or a tensor."
            )
    if not taken:
        why = f" ({left_out[0]})" if left_out else ""
        raise CalibrationError(
            f"images holds no image that can be read{why}; leave images out to use blank ones, or the package's."
        )
    return taken


def _is_several(item: object) -> bool:
    if isinstance(item, torch.Tensor):
        return item.ndim == 4
    return isinstance(item, (str, os.PathLike)) and os.path.isdir(item)


def _of_folder(folder: Path, left_out: list[UserError]) -> Iterator[Source]:
    names = sorted(image_names(folder))
    if not names:
        raise CalibrationError(
            f"{folder}: no image in this folder or below it; images are recognized by suffixes such as .jpg."
        )
    order = np.random.default_rng(0).permutation(len(names))
    return _readable((folder / names[place] for place in order), left_out)


def _readable(items: Iterable[Source], left_out: list[UserError]) -> Iterator[Source]:
    """Those that are no files, and files that can be decoded; the others are named, and what they raise is added."""
    for source in items:
        if isinstance(source, (str, os.PathLike)) and os.path.lexists(source):  # what is not there is a mistake
            try:
                read_image(Path(source))
            except UserError as e:
                _logger.warning("left out %s", e)
                left_out.append(e)
                continue
        yield source


def warn_if_alike(images: Sequence[Source]) -> None:
    """Say so where images have much in common, as frames of one video have: that cannot be told from position.

    Nor does the estimated error see it, which takes images for independent ones.
    """
    if len(images) < FEWEST_JUDGED:
        return
    some = images[:: -(-len(images) // JUDGED)]
    small = torch.stack([canvas(image, THUMBNAIL, place) for place, image in enumerate(some)])
    small = normalize((small - small.mean((2, 3), keepdim=True)).flatten(1), dim=1)
    products = small @ small.T
    alike = float((products.sum() - products.trace()) / (len(some) * (len(some) - 1)))
    if alike > CORRELATED:
        _logger.warning(
            "the images look alike (correlation %.2f; photographs of many kinds have 0.13 at most): what they have in "
            "common is taken for position, and the estimated error is too small; use images of many kinds",
            alike,
        )


def canvas(source: Source, size: tuple[int, int], visit: int) -> torch.Tensor:
    """A random part of an image, resized to (3, height, width) = (3, *size), in [0, 1].

    Args:
        visit: what decides the part.

    Raises:
        CalibrationError: the image cannot be read, or a tensor is not an RGB image of [0, 1] or uint8.
    """
    image = _tensor(source) if isinstance(source, torch.Tensor) else _upright(source)
    width, height = (image.shape[2], image.shape[1]) if isinstance(image, torch.Tensor) else image.size
    draw = np.random.default_rng((1, visit)).random(3)
    scale = min(width / size[1], height / size[0]) * (AREA[0] + (AREA[1] - AREA[0]) * draw[0]) ** 0.5
    box_width, box_height = scale * size[1], scale * size[0]
    left, top = draw[1] * (width - box_width), draw[2] * (height - box_height)
    if isinstance(image, torch.Tensor):
        x, y = int(left), int(top)
        part = image[None, :, y : y + max(round(box_height), 1), x : x + max(round(box_width), 1)]
        return interpolate(part, size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    box = (left, top, left + box_width, top + box_height)
    resized = image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(*size, 3).permute(2, 0, 1) / 255


def _upright(source: str | os.PathLike | Image.Image) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            source.load()
            return to_rgb(upright(source))
        return read_image(Path(source))
    except UserError as e:
        raise CalibrationError(f"{e}; leave it out.") from e


def _tensor(image: torch.Tensor) -> torch.Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise CalibrationError(f"A tensor of shape {tuple(image.shape)} is not an RGB image (3, h, w).")
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image / 255
    if not image.is_floating_point():
        raise CalibrationError(f"A tensor of {image.dtype} is not an image; pass uint8, or floats in [0, 1].")
    low, high = float(image.min()), float(image.max())
    if not -1e-3 <= low <= high <= 1.001:  # also where one is NaN
        raise CalibrationError(
            f"A tensor has values from {low:.3g} to {high:.3g}; pass images in [0, 1], not normalized."
        )
    return image.float()


def blank(channels: int, size: tuple[int, int], visit: int) -> torch.Tensor:
    """An image (channels, *size) without content, as a model sees it (normalized): one color, or noise by turns.

    Noise is of one cell size, drawn anew for each image: smooth as photographs are, where white noise is nothing that
    a model has seen. The first image is zero.
    """
    draw = torch.Generator().manual_seed(visit)
    if visit % 2 == 0:
        color = torch.randn(channels, 1, 1, generator=draw) * (visit > 0)
        return color.expand(channels, *size)
    low, high = NOISE_CELLS
    cell = low * (high / low) ** float(torch.rand(1, generator=draw))
    grid = [int(side / cell) + 2 for side in size]
    noise = torch.randn(1, channels, *grid, generator=draw)
    return interpolate(noise, size=size, mode="bicubic", align_corners=False)[0]
