"""The page's examples: the package's photographs, and two images in which position is nearly all there is to see."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from timm_dvt.images import PHOTOGRAPHS, read_image

SIZE = (630, 420)
BLANK, FAINT = 0.5, 12.0  # standard deviations, of 255 levels, under which an image is one color or of little texture


def gray() -> Image.Image:
    """An image of one color."""
    return Image.new("RGB", SIZE, (128, 128, 128))


def wall() -> Image.Image:
    """A plastered wall, lit from the left: low texture, drawn from a fixed seed."""
    draw = np.random.default_rng(0)
    width, height = SIZE
    light = np.linspace(10, -10, width) + np.linspace(4, -4, height)[:, None]
    stains = Image.fromarray(draw.normal(0, 3, (14, 21)).astype(np.float32)).resize(SIZE, Image.Resampling.BICUBIC)
    levels = light + np.asarray(stains) + draw.normal(0, 2, (height, width))
    return Image.fromarray((levels[..., None] + (198, 192, 180)).clip(0, 255).astype(np.uint8))


EXAMPLES: dict[str, Callable[[], Image.Image]] = {
    **{path.stem: lambda path=path: read_image(path) for path in PHOTOGRAPHS},  # type: ignore[misc]
    "gray": gray,
    "wall (drawn)": wall,
}


def on_position(image: Image.Image) -> str:
    """A sentence on what is position in the maps of an image; nothing where the image itself differs all over."""
    spread = float(np.asarray(image, float).std((0, 1)).max())
    if spread < BLANK:
        return "All patches of this image are alike, so whatever differs from patch to patch is position, not image."
    if spread < FAINT:
        return "This image hardly differs from patch to patch, so most of what does in these maps is position."
    return ""
