"""Annotations of images, read in one way whatever the dataset: what cannot be is a ValueError that names the file."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from training.evaluate.data.splits import IGNORE, Boxes, Split

Thing = tuple[Any, Any, bool, str]  # corners in pixels, class, whether it is difficult, and what errors call it


def check(split: Split) -> tuple[Split, set[int]]:
    """Read each annotation once, before anything slow.

    Returns:
        The split with the digest of what was read, and the classes that its masks hold.

    Raises:
        ValueError: nothing is labeled in any of them. Whatever their reader raises.
    """
    labeled, present, digest = False, np.zeros(IGNORE, bool), sha256(repr(list(split.classes)).encode())

    def look(i: int) -> tuple[bool, bytes]:
        annotation = split.annotation(i)
        if isinstance(annotation, Split):  # the frames of a video
            annotation, _ = check(annotation)
        if isinstance(annotation, Tensor) and annotation.dtype == torch.uint8:
            present[np.bincount(annotation.numpy().ravel(), minlength=IGNORE)[:IGNORE] > 0] = True
        return _is_labeled(annotation), _digest(annotation)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for counts, content in tqdm(
            pool.map(look, range(len(split))), f"checking {split.name}", len(split), leave=False
        ):
            labeled = labeled or counts
            digest.update(content)
    if not labeled:
        raise UserError(
            f"nothing is labeled in {split.name}: no object, or no pixel that counts, in {len(split)} images"
        )
    return replace(split, digest=digest.hexdigest()), set(np.flatnonzero(present).tolist())


def _digest(annotation: Any) -> bytes:
    """By which an annotation is known again."""
    if isinstance(annotation, Tensor):
        kind = f"{annotation.dtype} {tuple(annotation.shape)}".encode()
        return sha256(kind + annotation.contiguous().numpy().tobytes()).digest()
    if isinstance(annotation, Path):  # of a pair of images the other one
        return files_digest([annotation]).encode()
    if isinstance(annotation, tuple):  # `Boxes`, points
        return sha256(b"".join(map(_digest, annotation))).digest()
    if isinstance(annotation, Split):
        return sha256(f"{annotation.digest} {files_digest(annotation.images)}".encode()).digest()
    return sha256(repr(annotation).encode()).digest()


def files_digest(paths: Iterable[Path]) -> str:
    """By which files are known again, without a look into them: where they are, their sizes and times."""
    digest = sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _is_labeled(annotation: Any) -> bool:
    """Whether there is something to learn or to score in an annotation."""
    if isinstance(annotation, Boxes):
        return len(annotation.boxes) > 0
    if isinstance(annotation, Tensor):  # a mask, or depths, of which 0 is unknown
        return bool((annotation > 0 if annotation.is_floating_point() else annotation != IGNORE).any())
    return True


@contextmanager
def naming(path: Path, what: str) -> Iterator[None]:
    """Say of which file it is that something in it is not there, or of another kind."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not {what}: {type(error).__name__}: {error}") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels as `load_image` gives the image, without decoding it."""
    with _decoding(path), Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation
        return (image.height, image.width) if turned else (image.width, image.height)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # on damaged files Pillow raises nearly anything
        raise UserError(f"{path}: not an image that Pillow can read: {error}") from error


# ---- a value a pixel


def read_mask(path: Path, image: Path, classes: int, first: int = 0, ignored: int = IGNORE) -> Tensor:
    """The mask of an image: (h, w) uint8, class indices from 0, and 255 for pixels that do not count.

    Args:
        classes: how many there are. first: the value of class 0 in the file.
        ignored: what the file has, beside 255, where pixels do not count.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no palette or gray image, of another size than the image, or a class is none of those.
    """
    values = _read_pixels(path, image, "mask", "a palette or gray PNG of one class index a pixel").astype(np.int64)
    counted = (values != ignored) & (values != IGNORE)
    wrong = values[counted & ((values < first) | (values >= first + classes))]
    if wrong.size:
        raise UserError(
            f"{path}: class {wrong.flat[0]} is out of range: there are {classes} classes, {first} to "
            f"{first + classes - 1}, and {' or '.join(map(str, sorted({ignored, IGNORE})))} for what does not count"
        )
    return torch.from_numpy(np.where(counted, values - first, IGNORE).astype(np.uint8))


def read_depth(path: Path, image: Path, per_meter: float = 1000) -> Tensor:
    """The depths of an image: (h, w) float32 in meters, 0 where unknown; so many units of the file make one.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no gray image, of another size than the image, or a depth is negative or no number.
    """
    values = _read_pixels(path, image, "depth map", "a gray image of one depth a pixel")
    if values.dtype.itemsize < 2 and per_meter > 255:
        raise UserError(f"{path}: a depth map has 16 bits a pixel, {per_meter:g} for a meter; this has 8")
    depths = values.astype(np.float32)
    if not (np.isfinite(depths).all() and (depths >= 0).all()):
        raise UserError(f"{path}: depths must be finite and 0 or more")
    return torch.from_numpy(depths / np.float32(per_meter))


def _read_pixels(path: Path, image: Path, what: str, meant: str) -> np.ndarray:
    """The values (h, w) of an annotation of an image."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path} for the image {image}")
    with _decoding(path), Image.open(path) as file:
        mode, values = file.mode, np.array(file)
    if values.ndim != 2 or (what == "mask" and mode == "F"):
        raise UserError(f"{path}: a {what} is {meant}, this is of Pillow's mode {mode}")
    width, height = image_size(image)
    if values.shape != (height, width):
        stored = f"{values.shape[1]} x {values.shape[0]}"
        raise UserError(f"sizes differ: {image} is {width} x {height}, its {what} {path} {stored}")
    return values


# ---- boxes


def boxes_of(things: Iterable[Thing], classes: int, image: Path) -> Boxes:
    """The objects of an image; those without an area are left out.

    Raises:
        ValueError: a box is not four finite numbers, its corners are interchanged or it lies outside of the image, or
            a class is not in 0 to classes - 1.
    """
    width, height = image_size(image)
    corners, labels, hard = [], [], []
    for box, label, difficult, name in things:
        x0, y0, x1, y1 = four(box, name)
        if x1 < x0 or y1 < y0:
            raise UserError(f"{name}: the box from {x0:g}, {y0:g} to {x1:g}, {y1:g} has no right side or no bottom")
        if x1 == x0 or y1 == y0:
            continue
        if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
            raise UserError(
                f"{name}: the box from {x0:g}, {y0:g} to {x1:g}, {y1:g} lies outside of {image}, which is {width} x "
                f"{height}"
            )
        if type(label) is not int or not 0 <= label < classes:
            raise UserError(f"{name}: its class is none of the {classes} that there are")
        corners.append([x0 / width, y0 / height, x1 / width, y1 / height])
        labels.append(label)
        hard.append(difficult)
    return Boxes(
        torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(hard, dtype=torch.bool),
    )


def four(box: Any, name: str) -> list[float]:
    """The numbers of a box. Raises ValueError if they are not four, or not finite."""
    numbers = isinstance(box, (list, tuple)) and all(type(value) in (int, float) for value in box)
    if not numbers or len(box) != 4 or not all(map(math.isfinite, box)):
        raise UserError(f"{name}: a box is four finite numbers, this is {str(box)[:100]}")
    return [float(value) for value in box]


def coco_split(name: str, path: Path, root: Path, ids: Collection[int] | None = None, crowds: bool = True) -> Split:
    """Images with objects as COCO's JSON has them, in the order of their files' names.

    Args:
        path: of the JSON. root: where the names of its images start.
        ids: of the images that are wanted; None is all.
        crowds: whether groups in one box ("iscrowd") are objects; for discovery LOST leaves them out.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not COCO's JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with naming(path, "COCO's JSON of boxes"):
        record = json.loads(path.read_text(encoding="utf-8"))
        categories = {entry["id"]: entry["name"] for entry in record["categories"]}
        things: dict[Any, list[Mapping[str, Any]]] = {entry["id"]: [] for entry in record["images"]}
        for thing in record["annotations"]:
            if thing["category_id"] not in categories:
                raise UserError(f"{path}: there is no category {thing['category_id']}, which an annotation names")
            if thing["image_id"] not in things:
                raise UserError(f"{path}: there is no image {thing['image_id']}, which an annotation names")
            if crowds or not thing.get("iscrowd"):
                things[thing["image_id"]].append(thing)
        listed = sorted(record["images"], key=lambda entry: entry["file_name"])
        listed = [entry for entry in listed if ids is None or entry["id"] in ids]
        images = [root / entry["file_name"] for entry in listed]
        index = {category: i for i, category in enumerate(sorted(categories))}

    def read(i: int) -> Boxes:
        image, entry = images[i], listed[i]
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {image}, which {path} lists")
        said, size = (entry.get("width"), entry.get("height")), image_size(image)
        if None not in said and said != size:
            raise UserError(f"sizes differ: {image} is {size[0]} x {size[1]}, {path} says {said[0]} x {said[1]}")
        return boxes_of((_coco_thing(thing, index, path) for thing in things[entry["id"]]), len(index), image)

    return Split(name, images, [str(categories[category]) for category in index], read)


def _coco_thing(thing: Mapping[str, Any], index: Mapping[Any, int], path: Path) -> Thing:
    name = f"{path}: annotation {thing.get('id', '')} of image {thing['image_id']}"
    x, y, width, height = four(thing.get("bbox"), name)
    return [x, y, x + width, y + height], index[thing["category_id"]], bool(thing.get("iscrowd", 0)), name


def voc_things(path: Path, names: Mapping[str, int]) -> Iterator[Thing]:
    """The objects that a VOC devkit's XML lists. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except ElementTree.ParseError as error:
        raise UserError(f"{path} is not XML: {error}") from error
    for number, thing in enumerate(objects, 1):
        label = (thing.findtext("name") or "").strip()
        name = f"{path}: object {number} ({label or 'without a name'})"
        texts = [thing.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x0, y0, x1, y1 = four([float(text or "nan") for text in texts], name)
        except ValueError:
            raise UserError(f"{name}: a box is four finite numbers, this is {texts}") from None
        # VOC counts pixels from 1 and includes the last one.
        yield [x0 - 1, y0 - 1, x1, y1], names.get(label), thing.findtext("difficult") == "1", name
