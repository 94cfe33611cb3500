"""A folder of one's own images with masks, or with boxes in COCO's JSON, as a dataset (--dataset folder).

Images may have any suffix of training/common/images.py and lie in subfolders; the mask of train/images/a/b.jpg is
train/masks/a/b.png, a palette or grey PNG of one class index a pixel, 255 for pixels that do not count. Line i of
classes.txt (from 0) names class i; without it there are as many classes as the largest index in the masks says.
Everything is checked before anything slow begins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from timm_dvt.bars import tqdm
from training.common.images import list_images
from training.evaluate.splits import IGNORE, Boxes, Split, boxes_from

PARTS = ("train", "val")
LAYOUT = """  DATA/{train,val}/images/NAME.jpg         any image suffix, subfolders too
  DATA/{train,val}/masks/NAME.png          for masks: class a pixel, palette or grey, 255 ignored
  DATA/classes.txt                         optional: line i, from 0, names class i of the masks
  DATA/{train,val}/boxes.json              for boxes: COCO's JSON, file names relative to images/"""


def kinds_present(folder: Path) -> list[str]:
    """Of which kinds the folder has annotations: images always; masks; boxes and, of val/ alone, discovery."""
    kinds = ["images"]
    if any((folder / part / "masks").is_dir() for part in PARTS):
        kinds.append("masks")
    if (folder / "val" / "boxes.json").is_file():
        kinds.append("discovery")
    if all((folder / part / "boxes.json").is_file() for part in PARTS):
        kinds.append("boxes")
    return kinds


def read_folder(folder: Path, kind: str) -> dict[str, Split]:
    """The splits of a folder for images, masks, boxes or discovery.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a mask or a list of boxes that cannot be; the message names the file.
    """
    if kind == "masks":
        return _with_masks(folder)
    if kind == "boxes":
        found = {part: _with_boxes(folder / part) for part in PARTS}
        first, second = (split.classes for split in found.values())
        if first != second:
            raise ValueError(f"train/boxes.json has the categories {list(first)}, val/boxes.json {list(second)}")
        return found
    if kind == "discovery":
        return {"folder": _with_boxes(folder / "val")}
    return {"val": Split("folder val", _images(folder / "val" / "images"), (), lambda i: None)}


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return [source.path for source in list_images(folder)]


# ---- masks


def _with_masks(folder: Path) -> dict[str, Split]:
    pairs = {part: _pairs(folder / part) for part in PARTS}
    names = _class_names(folder / "classes.txt")
    everything = [pair for part in PARTS for pair in pairs[part]]
    limit = IGNORE if names is None else len(names)
    with ThreadPoolExecutor() as pool:
        check = partial(_largest_class, limit=limit)
        largest = max(tqdm(pool.map(check, everything), "checking masks", len(everything), leave=False), default=-1)
    if names is None:
        if largest < 0:
            raise ValueError(f"no mask under {folder} has a labelled pixel: all are {IGNORE}")
        names = [f"class {i}" for i in range(largest + 1)]
    return {
        part: Split(
            f"folder {part}",
            [image for image, _ in pairs[part]],
            names,
            lambda i, part=part: read_mask(pairs[part][i][1]),  # type: ignore[misc]
        )
        for part in PARTS
    }


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Images with their masks."""
    if not (folder / "masks").is_dir():
        raise FileNotFoundError(f"there is no folder {folder / 'masks'}")
    images = _images(folder / "images")
    pairs = [(path, (folder / "masks" / path.relative_to(folder / "images")).with_suffix(".png")) for path in images]
    missing = [(image, mask) for image, mask in pairs if not mask.is_file()]
    if missing:
        image, mask = missing[0]
        others = f" (and {len(missing) - 1} more images without a mask)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"there is no mask {mask} for the image {image}{others}")
    return pairs


def _class_names(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    if not all(names):
        line = names.index("")
        raise ValueError(f"{path}: line {line}, counted from 0, is empty: it should name class {line}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: the class {twice!r} is named twice")
    return names


def _largest_class(pair: tuple[Path, Path], limit: int) -> int:
    """The largest class in a mask, -1 if all is ignored. Raises ValueError if it does not fit image or classes."""
    image, path = pair
    size, mask = image_size(image), read_mask(path, limit)
    if size != (mask.shape[1], mask.shape[0]):
        raise ValueError(
            f"sizes differ: {image} is {size[0]} x {size[1]}, its mask {path} {mask.shape[1]} x {mask.shape[0]}"
        )
    return int(torch.where(mask == IGNORE, -1, mask.int()).max())


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as `load_image` gives the image, without decoding it."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
            return (image.height, image.width) if turned else (image.width, image.height)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image, or of a format that Pillow does not know") from error


def read_mask(path: Path, classes: int = IGNORE) -> Tensor:
    """A mask of class indices, (h, w) uint8.

    Raises:
        ValueError: it is no palette or grey image, or a class is not in 0 to classes - 1 nor 255.
    """
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path}: not an image that Pillow can read: {error}") from error
    if values.ndim != 2 or mode == "F":
        raise ValueError(
            f"{path}: a mask is a palette or grey PNG of one class index a pixel, this is of Pillow's mode {mode}"
        )
    values = values.astype(np.int64)  # bilevel masks are bool
    wrong = values[(values != IGNORE) & ((values < 0) | (values >= classes))]
    if wrong.size:
        raise ValueError(
            f"{path}: class {wrong.flat[0]} is out of range: there are {classes} classes, 0 to {classes - 1}, and "
            f"{IGNORE} for pixels that do not count"
        )
    return torch.from_numpy(values.astype(np.uint8))


# ---- boxes


def _with_boxes(folder: Path) -> Split:
    """A part with COCO's JSON; images that it does not list are left out."""
    path = folder / "boxes.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        record = json.loads(path.read_text())
        categories = {entry["id"]: entry["name"] for entry in record["categories"]}
        things: dict[Any, list[Mapping[str, Any]]] = {entry["id"]: [] for entry in record["images"]}
        for thing in record["annotations"]:
            if thing["category_id"] not in categories:
                raise ValueError(f"{path}: there is no category {thing['category_id']}, which an annotation names")
            if thing["image_id"] not in things:
                raise ValueError(f"{path}: there is no image {thing['image_id']}, which an annotation names")
            things[thing["image_id"]].append(thing)
        listed = [(folder / "images" / entry["file_name"], things[entry["id"]], entry) for entry in record["images"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not COCO's JSON of boxes: {type(error).__name__}: {error}") from error
    index = {category: i for i, category in enumerate(sorted(categories))}
    for image, _, entry in listed:
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {image}, which {path} lists")
        said, size = (entry.get("width"), entry.get("height")), image_size(image)
        if None not in said and said != size:
            raise ValueError(f"sizes differ: {image} is {size[0]} x {size[1]}, {path} says {said[0]} x {said[1]}")
    return Split(
        f"folder {folder.name}",
        [image for image, _, _ in listed],
        [categories[category] for category in index],
        lambda i: _boxes(listed[i][1], index, image_size(listed[i][0])),
    )


def _boxes(things: Sequence[Mapping[str, Any]], index: Mapping[Any, int], size: tuple[int, int]) -> Boxes:
    kept = [thing for thing in things if thing["bbox"][2] > 0 and thing["bbox"][3] > 0]
    corners = [[x, y, x + width, y + height] for x, y, width, height in (thing["bbox"] for thing in kept)]
    crowds = [bool(thing.get("iscrowd", 0)) for thing in kept]
    return boxes_from(corners, [index[thing["category_id"]] for thing in kept], size, crowds)
