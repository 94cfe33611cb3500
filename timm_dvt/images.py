"""Images below a folder, and pixels of an image of whatever kind.

One rule for each kind of image, so that the same file always gives the same numbers:

- grayscale and bilevel: the one channel is repeated; palettes are looked up; CMYK is converted by Pillow
- alpha, of whatever kind: composited over white, as a page would show it, because the colors under
  transparent pixels are arbitrary
- 16 bits a channel: scaled by 1/65535, never clipped at 255
- float pixels: taken as they are when they lie in [0, 1], refused otherwise: their scale is not in the file
- animations and multi-page files: the first frame
- EXIF orientation: applied; a damaged EXIF block is ignored
- color profiles: not applied, as in timm and torchvision
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps

from timm_dvt.errors import ImageError

Pixels = TypeVar("Pixels", np.ndarray, Image.Image)
try:
    from pi_heif import register_heif_opener  # of the extra app: Pillow reads AVIF, and not HEIC

    register_heif_opener()
    HEIF = ["HEIF"]
except ImportError:
    HEIF = []

REMEDIES = {  # of a file that begins so, where it cannot be read
    b"avif": "Pillow 11.3 or later reads AVIF",
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"), "pip install pi-heif, to read HEIC"),
}
SUFFIXES = frozenset(
    ".avif .bmp .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)
# Of the package; README.md beside them says whose they are.
PHOTOGRAPHS = tuple(Path(__file__).parent / "assets" / name for name in ("cat.jpg", "mountain.jpg"))
_ALPHA_MODES = frozenset(["LA", "La", "PA", "RGBA", "RGBa"])


def image_names(root: Path) -> Iterator[str]:
    """The images below a folder, as paths from there with `/` between folders, in no order.

    They are known by `SUFFIXES`, capitals too; names that start with a dot are left out, and so is what lies in such a
    folder. Links to folders are followed, each real folder once. Raises ImageError for a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, onerror=_refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was, or is being, walked
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def _refuse(error: OSError) -> None:
    raise ImageError(f"{error.filename} cannot be read: {error.strerror}") from error


def read_image(source: Path) -> Image.Image:
    """The image as RGB, upright, what is transparent on white. Raises ImageError."""
    try:
        with open_file(source) as file:
            return decode(file, to_rgb)
    except OSError as e:
        raise ImageError(f"{source}: {e.strerror or e}") from e
    except ImageError as e:
        raise ImageError(f"{source}: {e}") from e


def open_file(path: Path) -> BinaryIO:
    """An image file, to be read. Raises ImageError for what is no plain file, OSError for one that cannot be opened."""
    if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
        raise ImageError("not a file")
    return path.open("rb")


def decode(
    file: BinaryIO,
    convert: Callable[[Image.Image], Pixels],
    formats: list[str] | None = None,
    max_pixels: float = math.inf,
) -> Pixels:
    """An open file's image, upright, as `to_rgb` or `to_array`.

    Args:
        formats: those that Pillow may try; default all.
        max_pixels: more are refused before they are decoded.

    Raises:
        ImageError: not an image, truncated or damaged, too large, or of a kind whose scale is unknown.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > max_pixels:
                size = math.ceil(image.width * image.height / 1e5) / 10  # never as much as what would be taken
                raise ImageError(
                    f"{size:g} megapixels ({image.width} x {image.height}); the most that is taken is "
                    f"{max_pixels / 1e6:g}. Make it smaller and try again"
                )
            image.load()
            return convert(upright(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError as e:
        kinds = f"is taken; choose one of {', '.join(formats)}" if formats else "Pillow can read"
        file.seek(0)
        start = file.read(12)
        remedy = REMEDIES.get(start[8:]) if start[4:8] == b"ftyp" else None
        raise ImageError(f"not an image that {kinds}" + (f"; {remedy}" if remedy else "")) from e
    except Image.DecompressionBombError as e:  # it comes before the size can be asked for
        most = f"the most that is taken is {max_pixels / 1e6:g} megapixels. " if max_pixels < math.inf else ""
        raise ImageError(f"far too many pixels to be read; {most}Make it smaller and try again") from e
    except OSError as e:
        raise ImageError(e.strerror or str(e)) from e
    except Exception as e:  # on damaged files Pillow raises nearly anything, IndexError included
        raise ImageError(f"not an image that can be read ({e or type(e).__name__})") from e


def upright(image: Image.Image) -> Image.Image:
    """A loaded image turned as its EXIF block says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are loaded, so this can only be the EXIF block: the image is still good
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as RGB of 8 bits. Raises ImageError."""
    _check_size(image)
    if _is_wide(image):
        return Image.fromarray((_wide_gray(image) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
    return image.convert("RGB")


def to_array(image: Image.Image) -> np.ndarray:
    """A loaded image of any mode as (H, W, 3) float32 in [0, 1]. Raises ImageError."""
    _check_size(image)
    if _is_wide(image):
        return np.repeat(_wide_gray(image)[..., None], 3, axis=2)
    return np.asarray(to_rgb(image), dtype=np.float32) / 255


def _check_size(image: Image.Image) -> None:
    if min(image.size) < 1:
        raise ImageError(f"has no pixels ({image.width} x {image.height})")


def _is_wide(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _wide_gray(image: Image.Image) -> np.ndarray:
    """A one-channel image of more than 8 bits as (H, W) float32 in [0, 1]."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # written so that NaN is refused too
            raise ImageError(f"float pixels must lie in [0, 1], these lie in [{low:g}, {high:g}]")
        return values.astype(np.float32)
    if low < 0 or high > 65535:  # mode I holds 32 bits, which Pillow also uses for some 16-bit files
        raise ImageError(f"integer pixels must lie in [0, 65535], these lie in [{low}, {high}]")
    return values.astype(np.float32) / 65535
