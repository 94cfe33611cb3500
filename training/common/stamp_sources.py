"""The photographs, cut-outs and clothing items that stamps are composed of, out of Debian packages."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from timm_dvt.errors import UserError

PACKAGES = (
    "tuxpaint-stamps-default dataset-fashion-mnist mate-backgrounds gnome-backgrounds plasma-workspace-wallpapers "
    "ukui-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04"
)
SHARE = "/usr/share"
STAMPS, PHOTOS, CLOTHES = "tuxpaint/stamps", ("backgrounds", "wallpapers"), "datasets/fashion-mnist"
SPLITS = ("train", "val")
VAL_SHARE = 4  # one source in four belongs to the validation split

# Classes of cut-outs and the folders they lie in, subfolders included. Of two folders that match, the longer counts.
STAMP_CLASSES: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),
    "insect": ("animals/insects",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "sea animal": ("animals/fish", "animals/shellfish", "animals/mammals/aquatic"),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables", "food/nuts", "food/spices", "plants/mushrooms"),
    "flower": ("plants/flowers",),
    "tree": ("plants",),
    "instrument": ("hobbies/music",),
    "household item": ("household",),
    "vehicle": ("vehicles", "military/vehicles"),
    "building": ("town",),
    "sign": ("town/roadsigns", "town/flags"),
    "planet": ("space",),
    "coin": ("symbols/money/canadian", "symbols/money/euro", "symbols/money/japanese", "symbols/money/us"),
    "festive item": ("seasonal",),
    "chess piece": ("symbols/chess",),
    "sports item": ("sports",),
    "letter": tuple(f"symbols/alphabets/{language}/filled" for language in ("english", "german", "spanish")),
}
# In the order of the labels of Fashion-MNIST.
CLOTHES_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASSES = ("background", *STAMP_CLASSES, *CLOTHES_CLASSES)

# What is kept of the longer side of a cut-out, and of the shorter one of a photograph, in sides of the composed image.
_LARGEST_STAMP, _PHOTO_SIDE = 0.84, 2.1


class SourcesMissing(FileNotFoundError):
    """A package that stamps are composed of is not installed."""


@dataclass(frozen=True)
class Sources:
    """What one split is composed of.

    Attributes:
        photos: backgrounds, RGB, the shorter side about twice that of the image to compose.
        stamps: for each stamp class its cut-outs, RGBA, no larger than that image.
        clothes: for each clothing class (N, 28, 28) brightness, black where there is no clothing.
    """

    photos: list[Image.Image]
    stamps: list[list[Image.Image]]
    clothes: list[np.ndarray]


def load_sources(split: str, share: str | Path = SHARE, size: int = 518) -> Sources:
    """Read the sources of a split: no photograph, cut-out or clothing item is in both.

    Cut-outs and photographs are split by a hash of their names, Fashion-MNIST as it comes.

    Args:
        split: "train" or "val".
        share: the folder that the packages are installed in.
        size: side of the images that will be composed, in pixels.

    Raises:
        ValueError: no such split.
        SourcesMissing: a package is not installed; the message says which to install.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {list(SPLITS)}, got {split!r}")
    share = Path(share)
    photos = [p for folder in PHOTOS for p in _photo_files(_need(share / folder))]
    stamps = _stamp_files(_need(share / STAMPS))
    return Sources(
        photos=[_open_photo(path, round(_PHOTO_SIDE * size)) for path in _photo_part(photos, split)],
        stamps=[
            [_open_stamp(path, round(_LARGEST_STAMP * size)) for path in _part(stamps[name], split)]
            for name in STAMP_CLASSES
        ],
        clothes=_clothes(_need(share / CLOTHES), split),
    )


def _need(path: Path) -> Path:
    if not path.exists():
        raise SourcesMissing(f"{path} is missing; on Debian or Ubuntu: apt-get install {PACKAGES}")
    return path


def _part(files: list[Path], split: str) -> list[Path]:
    """The split's files: of every class the same share, whatever its size, by the order of the names' hashes."""
    ordered = sorted(files, key=lambda path: hashlib.sha256(path.stem.encode()).digest())
    held_out = max(len(ordered) // VAL_SHARE, 1)
    return sorted(ordered[:held_out] if split == "val" else ordered[held_out:])


def _photo_part(files: list[Path], split: str) -> list[Path]:
    """As `_part`, but no validation photograph is another version (light or dark, another size) of a training one."""
    trained = set() if split == "train" else {_motif(path) for path in _part(files, "train")}
    return [path for path in _part(files, split) if _motif(path) not in trained]


def _motif(path: Path) -> str:
    name = path.parts[path.parts.index("contents") - 1] if "contents" in path.parts else path.stem
    return re.sub(r"(-[dl]|_\d+x\d+)$", "", name)


def _photo_files(folder: Path) -> Iterator[Path]:
    """One file a wallpaper: packages ship links and several shapes of the same one."""
    seen = set()
    for path in sorted(folder.rglob("*"), key=lambda path: (str(path.parent), -path.stat().st_size, path.name)):
        if path.suffix not in (".jpg", ".jpeg", ".png", ".webp") or path.is_symlink() or path.stat().st_size < 20_000:
            continue
        # /usr/share/wallpapers/NAME/contents/images[_dark]/WxH.jpg, beside a small screenshot of the desktop.
        wallpaper = path.parts[len(folder.parts)] if "contents" in path.parts else path
        if path.stem != "screenshot" and wallpaper not in seen:
            seen.add(wallpaper)
            yield path


def _stamp_files(folder: Path) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {name: [] for name in STAMP_CLASSES}
    owners = {prefix: name for name, prefixes in STAMP_CLASSES.items() for prefix in prefixes}
    for path in sorted(folder.rglob("*.png")):
        place = path.relative_to(folder).parent
        for parent in (place, *place.parents):
            if str(parent) in owners:
                classes[owners[str(parent)]].append(path)
                break
    return classes


def _open_photo(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        scale = side / min(image.size)
        size = (max(round(image.width * scale), side), max(round(image.height * scale), side))
        image.draft("RGB", size)
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _open_stamp(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        stamp = image.convert("RGBA")
    box = stamp.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    stamp = stamp.crop(box)
    stamp.thumbnail((side, side), Image.Resampling.LANCZOS)
    return stamp


def _clothes(folder: Path, split: str) -> list[np.ndarray]:
    name = "train" if split == "train" else "t10k"
    with gzip.open(_need(folder / f"{name}-labels-idx1-ubyte.gz")) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    with gzip.open(_need(folder / f"{name}-images-idx3-ubyte.gz")) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    return [images[labels == label] for label in range(len(CLOTHES_CLASSES))]
