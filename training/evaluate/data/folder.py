"""A folder of one's own images with masks, depths, or boxes in COCO's JSON, as a dataset (--dataset folder).

Images may have any suffix of timm_dvt/image_files.py and lie in subfolders; the mask of train/images/a/b.jpg is
train/masks/a/b.png, a palette or gray PNG of one class index a pixel, 255 for pixels that do not count. Line i of
classes.txt (from 0) names class i; without it there are as many classes as the largest index in the masks says.
train/depths/a/b.png has the depths, 16-bit gray in millimeters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.image_files import list_images
from training.evaluate.data.annotations import coco_split, read_depth, read_mask
from training.evaluate.data.splits import IGNORE, Split

PARTS = ("train", "val")
LAYOUT = """  DATA/{train,val}/images/NAME.jpg         any image suffix, subfolders too
  DATA/{train,val}/masks/NAME.png          for masks: class a pixel, palette or gray, 255 ignored
  DATA/classes.txt                         optional: line i, from 0, names class i of the masks
  DATA/{train,val}/depths/NAME.png         for depth: 16-bit gray, millimeters, 0 unknown
  DATA/{train,val}/boxes.json              for boxes: COCO's JSON, file names relative to images/"""


def kinds_present(folder: Path) -> list[str]:
    """Of which kinds the folder has annotations: images always; masks; depth; boxes and, of val/ alone, discovery."""
    kinds = ["images"]
    for kind, name in (("masks", "masks"), ("depth", "depths")):
        if any((folder / part / name).is_dir() for part in PARTS):
            kinds.append(kind)
    if (folder / "val" / "boxes.json").is_file():
        kinds.append("discovery")
    if all((folder / part / "boxes.json").is_file() for part in PARTS):
        kinds.append("boxes")
    return kinds


def read_folder(folder: Path, kind: str) -> dict[str, Split]:
    """The splits of a folder for images, masks, depth, boxes or discovery.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: class names or a list of boxes that cannot be; the message names the file.
    """
    if kind == "masks":
        return _with_masks(folder)
    if kind == "depth":
        return {part: _pixels_split(folder / part, "depths", (), read_depth) for part in PARTS}
    if kind == "boxes":
        return {part: _with_boxes(folder / part) for part in PARTS}
    if kind == "discovery":
        return {"folder": _with_boxes(folder / "val", crowds=False)}
    return {"val": Split("folder val", _images(folder / "val"), (), lambda i: None)}


def _images(folder: Path) -> list[Path]:
    if not (folder / "images").is_dir():
        raise FileNotFoundError(f"there is no folder {folder / 'images'}")
    return [source.path for source in list_images(folder / "images")]


def _with_boxes(folder: Path, crowds: bool = True) -> Split:
    """A part with COCO's JSON; images that it does not list are left out."""
    return coco_split(f"folder {folder.name}", folder / "boxes.json", folder / "images", crowds=crowds)


def _with_masks(folder: Path) -> dict[str, Split]:
    names = _class_names(folder / "classes.txt")
    read = partial(read_mask, classes=IGNORE if names is None else len(names))
    splits = {part: _pixels_split(folder / part, "masks", names or (), read) for part in PARTS}
    if names is None:
        largest = [_largest_class(split) for split in splits.values()]
        if max(largest) < 0:
            raise UserError(f"no mask under {folder} has a labeled pixel: all are {IGNORE}")
        names = [f"class {i}" for i in range(max(largest) + 1)]
    return {part: replace(split, classes=names) for part, split in splits.items()}


def _pixels_split(folder: Path, kind: str, names: Sequence[str], read: Callable[[Path, Path], Tensor]) -> Split:
    """A part with a PNG for each image, in the folder `kind`."""
    if not (folder / kind).is_dir():
        raise FileNotFoundError(f"there is no folder {folder / kind}")
    images = _images(folder)
    files = [(folder / kind / path.relative_to(folder / "images")).with_suffix(".png") for path in images]
    return Split(f"folder {folder.name}", images, names, lambda i: read(files[i], images[i]))


def _class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    if not all(names):
        line = names.index("")
        raise UserError(f"{path}: line {line}, counted from 0, is empty: it should name class {line}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: the class {twice!r} is named twice")
    return names


def _largest_class(split: Split) -> int:
    """The largest class in the masks, -1 if all is ignored."""
    with ThreadPoolExecutor() as pool:
        masks = tqdm(pool.map(split.annotation, range(len(split))), "classes of masks", len(split), leave=False)
        return max(int(torch.where(mask == IGNORE, -1, mask.int()).max()) for mask in masks)
