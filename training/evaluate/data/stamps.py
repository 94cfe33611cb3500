"""Composed images with all kinds of annotation, as training/stamps.py writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.evaluate.data.annotations import Thing, boxes_of, four, naming, read_mask
from training.evaluate.data.splits import Boxes, Split, list_files

LAYOUT = """  DATA/classes.txt                         line 0 is "background"
  DATA/{train,val}/images/NNNNN.png
  DATA/{train,val}/masks/NNNNN.png         class a pixel, 255 ignored
  DATA/{train,val}/objects.json            {"NNNNN": [{"class": 3, "box": [x0, y0, x1, y1]}]}
  (python -m training.stamps --out DATA writes it)"""


def read_stamps(folder: Path, kind: str) -> dict[str, Split]:
    """The splits of one kind. Raises FileNotFoundError or ValueError, as `annotations` does."""
    classes = (folder / "classes.txt").read_text().split("\n")
    classes = [name.strip() for name in classes if name.strip()]
    parts = {part: _split(folder / part, kind, classes) for part in ("train", "val")}
    return {"stamps": parts["val"]} if kind == "discovery" else parts


def _split(folder: Path, kind: str, classes: Sequence[str]) -> Split:
    images, name = list_files(folder / "images", ".png"), f"stamps {folder.name}"
    if kind in ("images", "masks"):
        masks = folder / "masks"
        return Split(name, images, classes, lambda i: read_mask(masks / images[i].name, images[i], len(classes)))
    path = folder / "objects.json"
    with naming(path, "a JSON of boxes"):
        record: Mapping[str, list[dict]] = json.loads(path.read_text())
        things: dict[str, list[Thing]] = {
            stem: [(thing["box"], thing["class"] - 1, False, f"{path}: {stem}") for thing in listed]
            for stem, listed in record.items()
        }

    def read(i: int) -> Boxes:
        return boxes_of(things.get(images[i].stem, ()), len(classes) - 1, images[i])

    if kind == "labels":  # of the largest object; an image without one has no label
        images = [image for image in images if things.get(image.stem)]
        labels = [max(things[image.stem], key=_area)[1] for image in images]

        def label(i: int) -> int:
            read(i)  # tells what is wrong with the boxes
            return labels[i]

        return Split(name, images, classes[1:], label)
    return Split(name, images, classes[1:], read)


def _area(thing: Thing) -> float:
    x0, y0, x1, y1 = four(thing[0], thing[3])
    return (x1 - x0) * (y1 - y0)
