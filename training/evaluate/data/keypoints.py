"""Pairs of images with points that correspond: SPair-71k and PF-Pascal in their standard layouts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_dvt.errors import UserError
from training.evaluate.data.annotations import image_size, naming
from training.evaluate.data.splits import Split

SPAIR_LAYOUT = """  DATA/JPEGImages/CLASS/*.jpg
  DATA/PairAnnotation/test/*.json          src_imname, trg_imname, src_kps, trg_kps, trg_bndbox, category
  DATA/Layout/large/test.txt               optional: the pairs to take; without it all are taken
  or all of these in DATA/SPair-71k"""
PF_PASCAL_LAYOUT = """  DATA/JPEGImages/*.jpg
  DATA/test_pairs_pf_pascal.csv            or test_pairs.csv: source_image,target_image,class,XA,YA,XB,YB, with points
                                           as x;x;x of each
  or all of these in DATA/PF-dataset-PASCAL"""
PF_COLUMNS = ("source_image", "target_image", "class", "XA", "YA", "XB", "YB")


class PointPair(NamedTuple):
    """What belongs to a source image.

    Attributes:
        target: path of the other image.
        points, target_points: (N, 2) float x, y in pixels of the source and of the target.
        size, target_size: (width, height) of the images.
        extent: pixels that PCK's alpha is a part of: the longer side of the target's object (SPair) or image (PF).
        category: of the object.
    """

    target: Path
    points: Tensor
    target_points: Tensor
    size: tuple[int, int]
    target_size: tuple[int, int]
    extent: float
    category: str


def read_spair(folder: Path, kind: str) -> dict[str, Split]:
    """SPair-71k's test pairs, an item a pair; the images of all of them for images. Raises FileNotFoundError."""
    base = folder / "SPair-71k" if (folder / "SPair-71k").is_dir() else folder
    annotations, listing = base / "PairAnnotation" / "test", base / "Layout" / "large" / "test.txt"
    if listing.is_file():
        paths = [annotations / f"{line}.json" for line in listing.read_text().split()]
    elif annotations.is_dir():
        paths = sorted(annotations.glob("*.json"))
    else:
        raise FileNotFoundError(f"there is no folder {annotations}")

    def pair(path: Path) -> tuple[Path, Callable[[], PointPair]]:
        with naming(path, "an annotation of SPair-71k"):
            record = json.loads(path.read_text())
            images = base / "JPEGImages" / record["category"]
            source, target = images / record["src_imname"], images / record["trg_imname"]
            facts = record["src_kps"], record["trg_kps"], record["category"], record["trg_bndbox"]
        return source, lambda: _pair(path, source, target, *facts)

    return _split("SPair-71k test", [pair(path) for path in paths], kind)


def read_pf_pascal(folder: Path, kind: str) -> dict[str, Split]:
    """PF-Pascal's test pairs, an item a pair; the images of all of them for images. Raises FileNotFoundError."""
    base = folder / "PF-dataset-PASCAL" if (folder / "PF-dataset-PASCAL").is_dir() else folder
    path = base / "test_pairs_pf_pascal.csv"
    if not path.is_file():
        path = base / "test_pairs.csv"

    def pair(row: dict[str, str]) -> tuple[Path, Callable[[], PointPair]]:
        with naming(path, f"a list of {','.join(PF_COLUMNS)}"):
            names = row["source_image"], row["target_image"]
            source, target = (base / "JPEGImages" / Path(name).name for name in names)
            points, others = (list(zip_longest(*(row[axis + side].split(";") for axis in "XY"))) for side in "AB")
            return source, lambda: _pair(path, source, target, points, others, row["class"], None)

    with path.open(newline="") as file:
        return _split("PF-Pascal test", [pair(row) for row in csv.DictReader(file)], kind)


def _split(name: str, pairs: Sequence[tuple[Path, Callable[[], PointPair]]], kind: str) -> dict[str, Split]:
    if kind == "images":
        images = dict.fromkeys(path for source, read in pairs for path in (source, read().target))
        return {"val": Split(f"{name}, images", list(images), (), lambda i: None)}
    return {"val": Split(name, [source for source, _ in pairs], (), lambda i: pairs[i][1]())}


def _pair(
    path: Path, source: Path, target: Path, points: Any, target_points: Any, category: str, box: Any
) -> PointPair:
    """A pair, checked. Raises ValueError with the annotation's path, FileNotFoundError where an image is missing."""
    sizes = image_size(source), image_size(target)
    try:
        first, second = (torch.tensor([[float(x) for x in p] for p in side]) for side in (points, target_points))
        x0, y0, x1, y1 = map(float, box or (0, 0, *sizes[1]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the points or the box of {source.name} and {target.name}: {error}") from error
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] != 2:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise UserError(f"{path}: {source.name} and {target.name} must have the same points (N, 2), got {shapes}")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise UserError(f"{path}: points of {source.name} and {target.name} must be finite")
    return PointPair(target, first, second, *sizes, max(x1 - x0, y1 - y0), category)
