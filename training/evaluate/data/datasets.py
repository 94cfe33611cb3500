"""Datasets in their standard layouts, as splits of image paths with one kind of annotation.

A dataset is a function (folder, kind) -> {part: Split}; `DATASETS` lists them with the kinds they have. The
parts are "train" and "val" for what is learned, and the dataset's own names for object discovery, which
learns nothing. A missing file or folder is an error that shows the whole layout expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from timm_dvt.errors import UserError
from timm_dvt.image_files import list_images
from training.evaluate.data import davis, keypoints, stamps, voc
from training.evaluate.data import folder as own_folder
from training.evaluate.data.annotations import check, coco_split, read_depth, read_mask
from training.evaluate.data.splits import Split, list_files


@dataclass(frozen=True)
class Dataset:
    """How a dataset is read.

    Attributes:
        read: (folder, kind) -> {part: Split}.
        kinds: of annotation that it has: images, masks, boxes, discovery, labels, depth, videos, points.
        layout: what must lie in the folder, for the error message.
        present: folder -> those of the kinds that it has, where that differs from one to the next; None is all.
        title: what training.report calls it; "" is its own name.
        small: whether it has no protocol in the paper and, as a rule, some hundreds of images: tasks take their `SMALL`
            settings.
    """

    read: Callable[..., dict[str, Split]]
    kinds: Sequence[str]
    layout: str
    present: Callable[[Path], Sequence[str]] | None = None
    title: str = ""
    small: bool = False


def named(name: str) -> Dataset:
    """A dataset by its name. Raises ValueError if there is none."""
    if name not in DATASETS:
        raise UserError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name]


def kinds_of(name: str, folder: str | Path) -> Sequence[str]:
    """The kinds of annotation that a dataset has in this folder."""
    dataset = named(name)
    return dataset.kinds if dataset.present is None else dataset.present(Path(folder))


def open_dataset(
    name: str, folder: str | Path, kind: str, trainaug: bool | None = None, limit: int | None = None
) -> dict[str, Split]:
    """The splits of a dataset for one kind of annotation, each of which was read once, to know that it can be.

    Args:
        trainaug: train with VOC2012's augmented list, or (False) with train.txt; None takes it where it is there.
        limit: images of a split at most, evenly spread over it.

    Raises:
        ValueError: no such dataset, no such annotation in it, one that cannot be, classes of train that are not those
            of val, or a file or folder that is missing or empty: then the message shows the layout expected.
    """
    dataset = named(name)
    if kind not in dataset.kinds:
        able = [other for other, entry in DATASETS.items() if kind in entry.kinds]
        raise UserError(f"dataset {name} has no {kind}; those that have: {', '.join(able)}")
    folder = Path(folder)
    if trainaug and name != "voc":
        raise UserError(f"trainaug is a list of images of dataset voc, not of {name}")
    read = partial(dataset.read, trainaug=trainaug) if name == "voc" else dataset.read
    try:
        splits = read(folder, kind)
        empty = [split.name for split in splits.values() if not len(split)]
        if empty:
            raise FileNotFoundError(f"no images for {', '.join(empty)}")
        _check_classes(splits)
        if kind == "masks" and any(len(split.classes) < 2 for split in splits.values()):
            raise UserError(f"{name} under {folder}: its masks have one class, and there is nothing to tell it from")
        splits = {part: split.limit(limit) for part, split in splits.items()}
        if kind != "images":  # whose annotations nobody reads
            checked = {part: check(split) for part, split in splits.items()}
            splits = {part: split for part, (split, _) in checked.items()}
            held = set().union(*(classes for _, classes in checked.values()))
            if kind == "masks" and len(held) < 2:
                raise UserError(
                    f"{name} under {folder}: of all classes its masks hold class {min(held)} alone, and there is "
                    "nothing to tell it from; 255 is for pixels that do not count, so objects of masks of 0 and 255 "
                    "have to be 1"
                )
    except (OSError, RuntimeError, UnicodeError) as error:  # torchvision raises RuntimeError for a missing folder
        raise UserError(f"{name} under {folder}: {reason(error)}\nExpected layout:\n{dataset.layout}") from error
    return splits


def reason(error: Exception) -> str:
    """What an error of reading says, without its number."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no file {error.filename}"
    return str(error)


def _check_classes(splits: Mapping[str, Split]) -> None:
    """Raise ValueError where class i of train is another one in val."""
    train, val = (list(splits[part].classes) if part in splits else None for part in ("train", "val"))
    if train is None or val is None or train == val:
        return
    lacks = [
        f"{part} has no {', '.join(map(repr, missing[:9]))}" + f" and {len(missing) - 9} more" * (len(missing) > 9)
        for part, classes, other in (("train", train, val), ("val", val, train))
        if (missing := [name for name in other if name not in classes])
    ]
    raise UserError(f"the classes of train and val differ: {'; '.join(lacks) or 'they are in another order'}")


# ---- ADE20k

ADE_CLASSES = 150


def _ade20k(folder: Path, kind: str) -> dict[str, Split]:
    base = folder / "ADEChallengeData2016" if (folder / "ADEChallengeData2016").is_dir() else folder
    return {part: _ade_split(base, name) for part, name in (("train", "training"), ("val", "validation"))}


def _ade_split(base: Path, part: str) -> Split:
    images = list_files(base / "images" / part, ".jpg")

    names = [f"class {i}" for i in range(ADE_CLASSES)]
    listed = base / "objectInfo150.txt"
    if listed.is_file():
        names = [line.split("\t")[-1].strip() for line in listed.read_text().splitlines()[1:]]

    def read(i: int) -> Tensor:
        mask = base / "annotations" / part / f"{images[i].stem}.png"
        return read_mask(mask, images[i], len(names), first=1, ignored=0)  # 0 is "other"

    return Split(f"ADE20k {part}", images, names, read)


# ---- CamVid

CAMVID_CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()


def _camvid(folder: Path, kind: str) -> dict[str, Split]:
    base = folder / "CamVid" if (folder / "CamVid").is_dir() else folder
    return {part: _camvid_split(base, name) for part, name in (("train", "train"), ("val", "test"))}


def _camvid_split(base: Path, part: str) -> Split:
    images = list_files(base / part, ".png")

    def read(i: int) -> Tensor:
        count = len(CAMVID_CLASSES)
        return read_mask(base / f"{part}annot" / images[i].name, images[i], count, ignored=count)  # which is "void"

    return Split(f"CamVid {part}", images, CAMVID_CLASSES, read)


# ---- NYU


def _nyu(folder: Path, kind: str) -> dict[str, Split]:
    return {part: _nyu_split(folder, name) for part, name in (("train", "nyu_train.txt"), ("val", "nyu_test.txt"))}


def _nyu_split(folder: Path, listing: str) -> Split:
    path = folder / listing
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    short = next((row for row in rows if len(row) < 2), None)
    if short:
        raise UserError(f"{path}: a line is IMAGE DEPTH [FOCAL], this is {short[0]!r}")
    # Lines begin with a slash in the published lists. The test list names images without depth: "None".
    pairs = [[folder / name.lstrip("/") for name in row[:2]] for row in rows if row[1] != "None"]
    return Split(f"NYUv2 {listing}", [image for image, _ in pairs], (), lambda i: read_depth(pairs[i][1], pairs[i][0]))


# ---- COCO


def _coco(folder: Path, kind: str) -> dict[str, Split]:
    if kind == "discovery":
        chosen = folder / "coco_20k_filenames.txt"  # published with LOST
        if not chosen.is_file():
            raise FileNotFoundError(f"there is no file {chosen}")
        ends = {line: Path(line).stem.split("_")[-1] for line in chosen.read_text().split()}
        wrong = next((line for line, end in ends.items() if not end.isdecimal()), None)
        if wrong:
            raise UserError(f"{chosen}: {wrong[:100]!r} ends with no number of an image of COCO")
        numbers = set(map(int, ends.values()))
        return {"coco20k": _coco_split(folder, _coco_year(folder, "train"), numbers, crowds=False)}
    parts = ("val",) if kind == "images" else ("train", "val")
    return {part: _coco_split(folder, _coco_year(folder, part)) for part in parts}


def _coco_year(folder: Path, part: str) -> str:
    for year in ("2017", "2014"):
        if (folder / "annotations" / f"instances_{part}{year}.json").is_file():
            return f"{part}{year}"
    raise FileNotFoundError(f"there is no file {folder}/annotations/instances_{part}2017.json (or 2014)")


def _coco_split(folder: Path, name: str, numbers: set[int] | None = None, crowds: bool = True) -> Split:
    root = folder / name if (folder / name).is_dir() else folder / "images" / name
    return coco_split(f"COCO {name}", folder / "annotations" / f"instances_{name}.json", root, numbers, crowds)


# ---- ImageFolder


def _imagefolder(folder: Path, kind: str) -> dict[str, Split]:
    return {part: _folder_split(folder / part) for part in (("val",) if kind == "images" else ("train", "val"))}


def _folder_split(folder: Path) -> Split:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    sources = [source for source in list_images(folder) if "/" in source.name]
    labels = [source.name.split("/")[0] for source in sources]
    classes = sorted(set(labels))
    index = {name: i for i, name in enumerate(classes)}
    return Split(f"{folder.name} images", [s.path for s in sources], classes, lambda i: index[labels[i]])


DATASETS = {
    "voc": Dataset(voc.read_voc, ("images", "masks", "boxes", "discovery"), voc.LAYOUT, title="VOC12"),
    "ade20k": Dataset(
        _ade20k,
        ("images", "masks"),
        """  DATA/ADEChallengeData2016/images/{training,validation}/*.jpg
  DATA/ADEChallengeData2016/annotations/{training,validation}/*.png      0 other, 1 to 150 classes""",
        title="ADE20k",
    ),
    "camvid": Dataset(
        _camvid,
        ("images", "masks"),
        """  DATA/CamVid/{train,test}/*.png            street scenes, 11 classes: the version with SegNet's tutorial
  DATA/CamVid/{train,test}annot/*.png      0 to 10 classes, 11 void""",
        title="CamVid",
        small=True,
    ),
    "nyu": Dataset(
        _nyu,
        ("images", "depth"),
        """  DATA/nyu_train.txt, DATA/nyu_test.txt    the published lists: IMAGE DEPTH [FOCAL], one pair a line
  DATA/SCENE/rgb_NNNNN.jpg                 640 x 480
  DATA/SCENE/sync_depth_NNNNN.png          16-bit, millimeters, 0 unknown""",
        title="NYUv2",
    ),
    "coco": Dataset(
        _coco,
        ("images", "boxes", "discovery"),
        """  DATA/{train2017,val2017}/*.jpg           or 2014; or DATA/images/train2017, ...
  DATA/annotations/instances_{train,val}2017.json
  DATA/coco_20k_filenames.txt              for discovery: LOST's list of images (of train2014)""",
        title="COCO",
    ),
    "imagefolder": Dataset(
        _imagefolder,
        ("images", "labels"),
        "  DATA/{train,val}/CLASS/*.jpg             any image suffix, subfolders too",
        title="ImageFolder",
    ),
    "spair": Dataset(keypoints.read_spair, ("images", "points"), keypoints.SPAIR_LAYOUT, title="SPair-71k"),
    "pfpascal": Dataset(keypoints.read_pf_pascal, ("images", "points"), keypoints.PF_PASCAL_LAYOUT, title="PF-Pascal"),
    "davis": Dataset(davis.read_davis, ("images", "videos"), davis.LAYOUT, title="DAVIS"),
    "stamps": Dataset(
        stamps.read_stamps,
        ("images", "masks", "boxes", "discovery", "labels"),
        stamps.LAYOUT,
        small=True,
    ),
    "folder": Dataset(
        own_folder.read_folder,
        ("images", "masks", "depth", "boxes", "discovery"),
        own_folder.LAYOUT,
        own_folder.kinds_present,
        small=True,
    ),
}
