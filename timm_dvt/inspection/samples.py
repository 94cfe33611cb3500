"""Photographs to inspect a model on, checked to be different ones, and what they are where none are given."""

from collections.abc import Iterable

import torch
from PIL import Image

from timm_dvt.demo import PHOTOGRAPHS, read_image
from timm_dvt.inspection.results import InspectionError
from timm_dvt.sample_images import SampleError, Source, canvas, sources

LEAST_IMAGES = 4
ALIKE = 0.03  # root mean square difference of thumbnails with values in [0, 1]
THUMBNAIL = (16, 16)


def photographs(images: Source | Iterable[Source] | None, most: int) -> list[Source]:
    """Up to `most` images, none nearly like another; without images, parts of the package's photographs.

    Raises:
        InspectionError: they cannot be read, or fewer than `LEAST_IMAGES` of them are different.
    """
    if images is None:
        return _parts()
    try:
        found = sources(images, most)
        different: list[Source] = []
        seen: list[torch.Tensor] = []
        for one in found:
            small = canvas(one, THUMBNAIL, 0)
            if all(float((small - other).square().mean()) > ALIKE**2 for other in seen):
                different.append(one)
                seen.append(small)
    except SampleError as e:
        raise InspectionError(str(e)) from e
    if len(different) >= LEAST_IMAGES:
        return different
    what = f"{len(found)} image" + "s" * (len(found) > 1)
    if len(found) > len(different):
        what += f", of which only {len(different)} differ{'s' * (len(different) == 1)} from the others"
    raise InspectionError(
        f"images holds {what}. What a model adds at a place is told by what different images have in common there: "
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
