"""DAVIS' videos in their standard layout: 2016 (one object, 255 in its masks) and 2017 (several, 1, 2, ...)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from training.evaluate.data.annotations import read_mask
from training.evaluate.data.splits import IGNORE, Split

LAYOUT = """  DATA/JPEGImages/480p/VIDEO/00000.jpg
  DATA/Annotations/480p/VIDEO/00000.png    palette or gray: 0 background, 1, 2, ... objects; or 255 the only one
  DATA/ImageSets/2017/val.txt              optional, or 2016, 480p: the videos to take; without it all are taken
  or all of these in DATA/DAVIS"""


def read_davis(folder: Path, kind: str) -> dict[str, Split]:
    """The frames of all videos for images; for videos an item a video, whose annotation is a `Split` of its frames.

    Raises:
        FileNotFoundError: a file or folder is missing.
    """
    base = folder / "DAVIS" if (folder / "DAVIS").is_dir() else folder
    frames = {name: _frames(base / "JPEGImages" / "480p" / name) for name in _names(base)}
    if kind == "images":
        return {"val": Split("DAVIS frames", sum(frames.values(), []), (), lambda i: None)}
    videos = [_video(name, images, base / "Annotations" / "480p" / name) for name, images in frames.items()]
    return {"val": Split("DAVIS", [video.images[0] for video in videos], (), lambda i: videos[i])}


def _names(base: Path) -> list[str]:
    """The videos: lines of a list are their names (2017), or files of theirs (2016)."""
    for year in ("2017", "2016", "480p"):
        listing = base / "ImageSets" / year / "val.txt"
        if listing.is_file():
            first = [Path(line.split()[0]) for line in listing.read_text().splitlines() if line.strip()]
            return list(dict.fromkeys(path.parent.name or path.name for path in first))
    folder = base / "JPEGImages" / "480p"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _frames(folder: Path) -> list[Path]:
    frames = sorted(folder.glob("*.jpg"))
    if not frames:
        raise FileNotFoundError(f"there is no frame {folder / '*.jpg'}")
    return frames


def _video(name: str, frames: list[Path], folder: Path) -> Split:
    def mask(i: int) -> Tensor:
        return read_mask(folder / f"{frames[i].stem}.png", frames[i], IGNORE)

    def only(i: int) -> Tensor:
        return (mask(i) == IGNORE).to(torch.uint8)

    return Split(name, frames, (), only if set(mask(0).unique().tolist()) == {0, IGNORE} else mask)
