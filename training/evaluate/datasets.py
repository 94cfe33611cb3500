"""Datasets in their standard layouts, as splits of image paths with one kind of annotation.

A dataset is a function (folder, kind) -> {part: Split}; `DATASETS` lists them with the kinds they have. The
parts are "train" and "val" for what is learned, and the dataset's own names for object discovery, which
learns nothing. A missing file or folder is an error that shows the whole layout expected.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CocoDetection, ImageFolder

from training.evaluate import davis, voc
from training.evaluate import folder as own_folder
from training.evaluate.splits import IGNORE, Boxes, Split, boxes_from, read_mask


@dataclass(frozen=True)
class Dataset:
    """How a dataset is read.

    Attributes:
        read: (folder, kind) -> {part: Split}.
        kinds: of annotation that it has: images, masks, boxes, discovery, labels, depth, videos.
        layout: what must lie in the folder, for the error message.
        present: folder -> those of the kinds that it has, where that differs from one to the next; None is all.
        small: whether it has no protocol in the paper and, as a rule, some hundreds of images: tasks take their `SMALL`
            settings.
    """

    read: Callable[..., dict[str, Split]]
    kinds: Sequence[str]
    layout: str
    present: Callable[[Path], Sequence[str]] | None = None
    small: bool = False


def named(name: str) -> Dataset:
    """A dataset by its name. Raises ValueError if there is none."""
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]


def kinds_of(name: str, folder: str | Path) -> Sequence[str]:
    """The kinds of annotation that a dataset has in this folder."""
    dataset = named(name)
    return dataset.kinds if dataset.present is None else dataset.present(Path(folder))


def open_dataset(name: str, folder: str | Path, kind: str, trainaug: bool | None = None) -> dict[str, Split]:
    """The splits of a dataset for one kind of annotation.

    Args:
        trainaug: train with VOC2012's augmented list, or (False) with train.txt; None takes it where it is there.

    Raises:
        ValueError: no such dataset, no such annotation in it, or a file or folder is missing or empty; the
            message shows the layout expected.
    """
    dataset = named(name)
    if kind not in dataset.kinds:
        able = [other for other, entry in DATASETS.items() if kind in entry.kinds]
        raise ValueError(f"dataset {name} has no {kind}; those that have: {', '.join(able)}")
    folder = Path(folder)
    if trainaug and name != "voc":
        raise ValueError(f"trainaug is a list of images of dataset voc, not of {name}")
    read = partial(dataset.read, trainaug=trainaug) if name == "voc" else dataset.read
    try:
        splits = read(folder, kind)
        empty = [split.name for split in splits.values() if not len(split)]
        if empty:
            raise FileNotFoundError(f"no images for {', '.join(empty)}")
    except (OSError, RuntimeError, KeyError) as error:  # torchvision raises RuntimeError for a missing folder
        raise ValueError(f"{name} under {folder}: {error}\nExpected layout:\n{dataset.layout}") from error
    return splits


# ---- ADE20k

ADE_CLASSES = 150


def _ade20k(folder: Path, kind: str) -> dict[str, Split]:
    base = folder / "ADEChallengeData2016" if (folder / "ADEChallengeData2016").is_dir() else folder
    return {part: _ade_split(base, name) for part, name in (("train", "training"), ("val", "validation"))}


def _ade_split(base: Path, part: str) -> Split:
    images = _listing(base / "images" / part, ".jpg")

    def read(i: int) -> Tensor:
        mask = read_mask(base / "annotations" / part / f"{images[i].stem}.png")
        return mask - 1  # 0 is "other": uint8 wraps it to 255, which is ignored; classes move to 0..149

    names = [f"class {i}" for i in range(ADE_CLASSES)]
    listed = base / "objectInfo150.txt"
    if listed.is_file():
        names = [line.split("\t")[-1].strip() for line in listed.read_text().splitlines()[1:]]
    return Split(f"ADE20k {part}", images, names, read)


def _listing(folder: Path, *suffixes: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


# ---- CamVid

CAMVID_CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()


def _camvid(folder: Path, kind: str) -> dict[str, Split]:
    base = folder / "CamVid" if (folder / "CamVid").is_dir() else folder
    return {part: _camvid_split(base, name) for part, name in (("train", "train"), ("val", "test"))}


def _camvid_split(base: Path, part: str) -> Split:
    images = _listing(base / part, ".png")

    def read(i: int) -> Tensor:
        mask = read_mask(base / f"{part}annot" / images[i].name)
        return torch.where(mask == len(CAMVID_CLASSES), IGNORE, mask)  # the number after the last class is "void"

    return Split(f"CamVid {part}", images, CAMVID_CLASSES, read)


# ---- NYU


def _nyu(folder: Path, kind: str) -> dict[str, Split]:
    return {part: _nyu_split(folder, name) for part, name in (("train", "nyu_train.txt"), ("val", "nyu_test.txt"))}


def _nyu_split(folder: Path, listing: str) -> Split:
    path = folder / listing
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    rows = [line.split()[:2] for line in path.read_text().splitlines() if line.strip()]
    # Lines begin with a slash in the published lists. The test list names images without depth: "None".
    rows = [[name.lstrip("/") for name in row] for row in rows if row[1] != "None"]

    def read(i: int) -> Tensor:
        millimetres = np.array(Image.open(folder / rows[i][1])).astype(np.float32)
        return torch.from_numpy(millimetres / 1000)

    return Split(f"NYUv2 {listing}", [folder / row[0] for row in rows], (), read)


# ---- COCO


def _coco(folder: Path, kind: str) -> dict[str, Split]:
    if kind == "discovery":
        chosen = folder / "coco_20k_filenames.txt"  # published with LOST
        if not chosen.is_file():
            raise FileNotFoundError(f"there is no file {chosen}")
        numbers = {int(Path(line).stem.split("_")[-1]) for line in chosen.read_text().split()}
        return {"coco20k": _coco_split(folder, _coco_year(folder, "train"), numbers)}
    parts = ("val",) if kind == "images" else ("train", "val")
    return {part: _coco_split(folder, _coco_year(folder, part)) for part in parts}


def _coco_year(folder: Path, part: str) -> str:
    for year in ("2017", "2014"):
        if (folder / "annotations" / f"instances_{part}{year}.json").is_file():
            return f"{part}{year}"
    raise FileNotFoundError(f"there is no file {folder}/annotations/instances_{part}2017.json (or 2014)")


def _coco_split(folder: Path, name: str, numbers: set[int] | None = None) -> Split:
    root = folder / name if (folder / name).is_dir() else folder / "images" / name
    with redirect_stdout(sys.stderr):  # pycocotools prints
        reader = CocoDetection(str(root), str(folder / "annotations" / f"instances_{name}.json"))
    ids = [i for i in reader.ids if numbers is None or i in numbers]
    categories = sorted(reader.coco.cats)
    index = {category: i for i, category in enumerate(categories)}

    def read(i: int) -> Boxes:
        corners, classes, crowd = [], [], []
        for thing in reader.coco.loadAnns(reader.coco.getAnnIds(ids[i])):
            x, y, width, height = thing["bbox"]
            if width > 0 and height > 0:
                corners.append([x, y, x + width, y + height])
                classes.append(index[thing["category_id"]])
                crowd.append(bool(thing.get("iscrowd", 0)))
        record = reader.coco.imgs[ids[i]]
        return boxes_from(corners, classes, (record["width"], record["height"]), crowd)

    images = [root / reader.coco.imgs[i]["file_name"] for i in ids]
    return Split(f"COCO {name}", images, [reader.coco.cats[c]["name"] for c in categories], read)


# ---- ImageFolder


def _imagefolder(folder: Path, kind: str) -> dict[str, Split]:
    return {part: _folder_split(folder / part) for part in ("train", "val")}


def _folder_split(folder: Path) -> Split:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    reader = ImageFolder(str(folder))
    return Split(
        f"{folder.name} images",
        [Path(path) for path, _ in reader.samples],
        reader.classes,
        lambda i: reader.samples[i][1],
    )


# ---- stamps (training/stamps.py)


def _stamps(folder: Path, kind: str) -> dict[str, Split]:
    classes = (folder / "classes.txt").read_text().split("\n")
    classes = [name.strip() for name in classes if name.strip()]
    parts = {part: _stamps_split(folder / part, kind, classes) for part in ("train", "val")}
    return {"stamps": parts["val"]} if kind == "discovery" else parts


def _stamps_split(folder: Path, kind: str, classes: Sequence[str]) -> Split:
    images = _listing(folder / "images", ".png")
    if kind in ("images", "masks"):
        return Split(f"stamps {folder.name}", images, classes, lambda i: read_mask(folder / "masks" / images[i].name))
    objects: Mapping[str, list[dict]] = json.loads((folder / "objects.json").read_text())
    if kind == "labels":  # of the largest object; an image without one has no label
        images = [path for path in images if objects.get(path.stem)]
        labels = [max(objects[path.stem], key=_area)["class"] - 1 for path in images]
        return Split(f"stamps {folder.name}", images, classes[1:], lambda i: labels[i])

    def read(i: int) -> Boxes:
        things = objects.get(images[i].stem, [])
        with Image.open(images[i]) as image:
            size = image.size
        return boxes_from([thing["box"] for thing in things], [thing["class"] - 1 for thing in things], size)

    return Split(f"stamps {folder.name}", images, classes[1:], read)


def _area(thing: Mapping[str, Any]) -> int:
    x0, y0, x1, y1 = thing["box"]
    return (x1 - x0) * (y1 - y0)


DATASETS = {
    "voc": Dataset(voc.read_voc, ("images", "masks", "boxes", "discovery"), voc.LAYOUT),
    "ade20k": Dataset(
        _ade20k,
        ("images", "masks"),
        """  DATA/ADEChallengeData2016/images/{training,validation}/*.jpg
  DATA/ADEChallengeData2016/annotations/{training,validation}/*.png      0 other, 1 to 150 classes""",
    ),
    "camvid": Dataset(
        _camvid,
        ("images", "masks"),
        """  DATA/CamVid/{train,test}/*.png            street scenes, 11 classes: the version with SegNet's tutorial
  DATA/CamVid/{train,test}annot/*.png      0 to 10 classes, 11 void""",
        small=True,
    ),
    "nyu": Dataset(
        _nyu,
        ("images", "depth"),
        """  DATA/nyu_train.txt, DATA/nyu_test.txt    the published lists: IMAGE DEPTH [FOCAL], one pair a line
  DATA/SCENE/rgb_NNNNN.jpg                 640 x 480
  DATA/SCENE/sync_depth_NNNNN.png          16-bit, millimetres, 0 unknown""",
    ),
    "coco": Dataset(
        _coco,
        ("images", "boxes", "discovery"),
        """  DATA/{train2017,val2017}/*.jpg           or 2014; or DATA/images/train2017, ...
  DATA/annotations/instances_{train,val}2017.json
  DATA/coco_20k_filenames.txt              for discovery: LOST's list of images (of train2014)""",
    ),
    "imagefolder": Dataset(
        _imagefolder, ("images", "labels"), "  DATA/{train,val}/CLASS/*.jpg             (or png, webp, ...)"
    ),
    "davis": Dataset(davis.read_davis, ("images", "videos"), davis.LAYOUT),
    "stamps": Dataset(
        _stamps,
        ("images", "masks", "boxes", "discovery", "labels"),
        """  DATA/classes.txt                         line 0 is "background"
  DATA/{train,val}/images/NNNNN.png
  DATA/{train,val}/masks/NNNNN.png         class a pixel, 255 ignored
  DATA/{train,val}/objects.json            {"NNNNN": [{"class": 3, "box": [x0, y0, x1, y1]}]}
  (python -m training.stamps --out DATA writes it)""",
        small=True,
    ),
    "folder": Dataset(
        own_folder.read_folder,
        ("images", "masks", "boxes", "discovery"),
        own_folder.LAYOUT,
        own_folder.kinds_present,
        small=True,
    ),
}
