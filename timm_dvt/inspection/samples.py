"""Photographs to inspect a model on, checked to be different ones, and what they are where none are given."""

from collections.abc import Iterable

import torch
from PIL import Image

from timm_dvt.calibration.samples import THUMBNAIL, Source, canvas, sources, warn_if_alike
from timm_dvt.errors import InspectionError
from timm_dvt.images import PHOTOGRAPHS, read_image

LEAST_IMAGES = 4
LEAST_TRIED = 8  # half to calibrate on, half to judge by
ONE_LEVEL = 1 / 255
ALIKE = 0.03  # root mean square difference of thumbnails with values in [0, 1]


def photographs(
    images: Source | Iterable[Source] | None, most: int, channels: int = 3, tried: bool = False
) -> list[Source] | None:
    """Up to `most` images, none nearly like another; without images, parts of the package's photographs.

    Args:
        channels: of the model's inputs; there are no photographs of other than 3, and so None.
        tried: whether half of them have to judge what is calibrated on the other half.

    Raises:
        InspectionError: too few of them are different.
        UserError: one cannot be used.
    """
    if channels != 3 and (images is not None or tried):
        raise InspectionError(f"The model takes images of {channels} channels; leave images out, and a trial.")
    chosen = None if channels != 3 else _parts()[:most] if images is None else _different(images, most)
    if tried and chosen is not None and len(chosen) < LEAST_TRIED:
        raise InspectionError(
            f"images holds {len(chosen)} different ones within the views; a trial takes {LEAST_TRIED} (and 8 views for "
            "each): half of them to calibrate on, half to judge by."
        )
    return chosen


def _different(images: Source | Iterable[Source], most: int) -> list[Source]:
    candidates = sources(images, most)
    different: list[Source] = []
    seen: list[torch.Tensor] = []
    for image in candidates:
        small = canvas(image, THUMBNAIL, 0)
        if float((small - small.mean((1, 2), keepdim=True)).abs().max()) < ONE_LEVEL:
            continue  # of one color, it holds nothing that a share could be a share of; blank images are read anyway
        if all(float((small - other).square().mean()) > ALIKE**2 for other in seen):
            different.append(image)
            seen.append(small)
    if len(different) >= LEAST_IMAGES:
        warn_if_alike(different)
        return different
    found = f"images holds {len(candidates)} image" + "s" * (len(candidates) > 1)
    if len(candidates) == most:
        found = f"of images {most} were looked at, as each takes 8 of the views"
    if len(candidates) > len(different):
        found += f", and only {len(different)} of them show{'s' * (len(different) == 1)} what no other does"
    raise InspectionError(
        f"{found}. What a model adds at a place is found from what different images have in common there: "
        f"give {LEAST_IMAGES} or more of different scenes, better 16, or none (parts of two photographs that come with "
        "the package)."
    )


def _parts() -> list[Source]:
    """The quarters of the package's photographs: eight images of which no two show the same thing."""
    parts: list[Source] = []
    for path in PHOTOGRAPHS:
        image: Image.Image = read_image(path)
        width, height = image.width // 2, image.height // 2
        boxes = [(x, y, x + width, y + height) for y in (0, height) for x in (0, width)]
        parts += [image.crop(box) for box in boxes]
    return parts
