"""VOC2007 and VOC2012 in the layout of the devkit, read by torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets import VOCDetection, VOCSegmentation

from training.evaluate.data.annotations import boxes_of, read_mask, voc_things
from training.evaluate.data.splits import Boxes, Split, join

LAYOUT = """  DATA/VOCdevkit/VOC2012/{JPEGImages,Annotations,SegmentationClass}
  DATA/VOCdevkit/VOC2012/ImageSets/{Main/trainval.txt,Segmentation/{train,val}.txt}
  DATA/VOCdevkit/VOC2007/{JPEGImages,Annotations}              boxes alone, trainval and test together
  DATA/VOCdevkit/VOC2007/ImageSets/Main/{trainval,test}.txt
  and, where there are, for the augmented training set:
  DATA/VOCdevkit/VOC2012/SegmentationClassAug, ImageSets/Segmentation/trainaug.txt"""
VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


def read_voc(folder: Path, kind: str, trainaug: bool | None = None) -> dict[str, Split]:
    """The splits of one kind.

    Args:
        trainaug: masks of the augmented list, ImageSets/Segmentation/trainaug.txt, or (False) of train.txt; None takes
            the augmented list where it is there.

    Raises:
        FileNotFoundError, RuntimeError: a file or folder is missing.
    """
    if kind == "boxes":  # the paper's: trainval of 07 and 12, tested on 07 (Tab. 3)
        seven, twelve = (_voc_boxes(folder, year, "trainval") for year in ("2007", "2012"))
        return {"train": join("VOC07+12 trainval", seven, twelve), "val": _voc_boxes(folder, "2007", "test")}
    if kind == "discovery":
        years = [year for year in ("2007", "2012") if (folder / "VOCdevkit" / f"VOC{year}").is_dir()] or ["2007"]
        return {f"voc{year}": _voc_boxes(folder, year, "trainval") for year in years}
    val = VOCSegmentation(_with_year(folder, "2012"), "2012", "val")
    parts = {"val": _voc_masks("VOC2012 val", val.images, val.masks)}
    if kind == "masks":
        base = folder / "VOCdevkit" / "VOC2012"
        augmented = base / "ImageSets" / "Segmentation" / "trainaug.txt"
        there = augmented.is_file() and (base / "SegmentationClassAug").is_dir()
        if trainaug and not there:
            raise FileNotFoundError(f"there is no file {augmented}, or no folder SegmentationClassAug")
        if there and trainaug is not False:
            names = augmented.read_text().split()
            images = [str(base / "JPEGImages" / f"{name}.jpg") for name in names]
            masks = [str(base / "SegmentationClassAug" / f"{name}.png") for name in names]
            parts["train"] = _voc_masks("VOC2012 trainaug", images, masks)
        else:
            train = VOCSegmentation(str(folder), "2012", "train")
            parts["train"] = _voc_masks("VOC2012 train", train.images, train.masks)
    return parts


def _with_year(folder: Path, year: str) -> str:
    """The folder, if it holds that year's: torchvision would only say that it is corrupted."""
    base = folder / "VOCdevkit" / f"VOC{year}"
    if not base.is_dir():
        raise FileNotFoundError(f"there is no folder {base}")
    return str(folder)


def _voc_masks(name: str, images: Sequence[str], masks: Sequence[str]) -> Split:
    names = ["background", *VOC_CLASSES]
    return Split(
        name, [Path(p) for p in images], names, lambda i: read_mask(Path(masks[i]), Path(images[i]), len(names))
    )


def _voc_boxes(folder: Path, year: str, part: str) -> Split:
    reader = VOCDetection(_with_year(folder, year), year, part)
    images = [Path(p) for p in reader.images]
    index = {name: i for i, name in enumerate(VOC_CLASSES)}

    def read(i: int) -> Boxes:
        return boxes_of(voc_things(Path(reader.annotations[i]), index), len(index), images[i])

    return Split(f"VOC{year} {part}", images, VOC_CLASSES, read)
