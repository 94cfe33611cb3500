"""Real photographs for the evaluation: python -m training.photographs NAME --source CHECKOUT --out DIR

Nothing is fetched: clone NAME's repository yourself, under its terms. davis keeps its layout (--dataset davis), all
others become a folder for training.evaluate --dataset folder. Splits are the same on every machine.

    voc-boxes   https://github.com/supervisely-ecosystem/pascal_sample_gt   928 photographs of VOC, boxes of 15 classes
    clothing    https://github.com/bearpaw/clothing-co-parsing              1,004 photographs, masks of 59 classes
    davis       https://github.com/MathLee/EOR-VOS                          DAVIS-2016's 20 validation videos, masks
    bsds        https://github.com/BIDS/BSDS500                             500 photographs
    mosd        https://github.com/PointCloudLibrary/data                   107 Kinect scenes, depths, masks of objects
    kitchen     https://github.com/andyzeng/tsdf-fusion-python              1,000 frames of a kitchen, depths

    git clone --depth 1 https://github.com/bearpaw/clothing-co-parsing
    python -m training.photographs clothing --source clothing-co-parsing --out clothing

Terms: clothing Apache-2.0, kitchen BSD-2-Clause, by their repositories. The others' say nothing of the photographs:
VOC's are Flickr's, those of DAVIS, BSDS and mOSD their authors'; all are published for research.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from training.common.command import command_parser, complain
from training.evaluate.data.annotations import image_size
from training.evaluate.data.splits import IGNORE

VAL = {"voc-boxes": 400, "clothing": 300}  # photographs, where the repository has no split of its own
KITCHEN_TRAIN, KITCHEN_GAP = 0.7, 0.05  # shares of the frames, in order of time; the gap is in neither part


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 with a line that says what is wrong."""
    args = make_parser().parse_args(argv)
    try:
        convert(args.name, args.source, args.out)
    except (UserError, OSError) as error:
        return complain(2, error)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = command_parser("photographs", __doc__)
    parser.add_argument("name", choices=list(DATASETS), metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--source", type=Path, required=True, metavar="CHECKOUT", help="the repository, cloned")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    return parser


def convert(name: str, source: Path, out: Path) -> None:
    """Make the folder `out`, whole or not at all, from a checkout of a repository.

    Raises:
        ValueError: `out` is there already, or a file of the checkout is missing or not as it should be.
    """
    if out.exists():
        raise UserError(f"{out} is there already: take another --out, or remove it")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    DATASETS[name](source, partial)
    partial.rename(out)


def _listing(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, sorted. Raises ValueError if there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"there is no {folder / pattern}: --source must be a checkout of the repository (see --help)")
    return files


def _split(files: Sequence[Path], val: int) -> dict[str, list[Path]]:
    """Files by part: those for val are drawn by the hash of their names, the same on every machine."""
    drawn = set(sorted(files, key=lambda path: sha256(path.stem.encode()).digest())[:val])
    return {
        "train": [path for path in files if path not in drawn],
        "val": [path for path in files if path in drawn],
    }


def _copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _save(pixels: np.ndarray, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(target)


# ---- VOC with boxes


def voc_boxes(source: Path, out: Path) -> None:
    """Photographs that have a box, each once, with boxes as COCO's JSON."""
    unique = {sha256(path.read_bytes()).digest(): path for path in _listing(source / "project", "*/img/*.jpg")}
    records = {path: _record(path.parents[1] / "ann" / f"{path.name}.json") for path in unique.values()}
    images = {path: record for path, record in records.items() if record["objects"]}
    classes = sorted({thing["classTitle"] for record in images.values() for thing in record["objects"]})
    for part, paths in _split(list(images), VAL["voc-boxes"]).items():
        for path in paths:
            _copy(path, out / part / "images" / path.name)
        record = _coco([(path.name, images[path]) for path in paths], classes)
        (out / part / "boxes.json").write_text(json.dumps(record))


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): clone the repository again") from error
    return record


def _coco(images: Sequence[tuple[str, dict[str, Any]]], classes: Sequence[str]) -> dict[str, Any]:
    things = [(i, thing) for i, (_, record) in enumerate(images) for thing in record["objects"]]
    return {
        "images": [{"id": i, "file_name": name, **record["size"]} for i, (name, record) in enumerate(images)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        "annotations": [
            {"id": j, "image_id": i, "category_id": classes.index(thing["classTitle"]), "bbox": _box(thing)}
            for j, (i, thing) in enumerate(things)
        ],
    }


def _box(thing: dict[str, Any]) -> list[int]:
    """x, y, width, height; the corners given are the first and the last pixel of the object, as VOC's are."""
    (x0, y0), (x1, y1) = thing["points"]["exterior"]
    return [x0, y0, x1 - x0 + 1, y1 - y0 + 1]


# ---- clothing


def clothing(source: Path, out: Path) -> None:
    """Photographs with masks; class 0, "null", is what is neither clothing nor body."""
    from scipy.io import loadmat

    names = [str(name[0]) for name in loadmat(_listing(source, "label_list.mat")[0])["label_list"][0]]
    for part, paths in _split(_listing(source / "annotations/pixel-level", "*.mat"), VAL["clothing"]).items():
        for path in tqdm(paths, part, unit=" photographs"):
            mask, photo = loadmat(path)["groundtruth"], source / "photos" / f"{path.stem}.jpg"
            if image_size(photo) != mask.shape[::-1]:
                raise UserError(f"sizes differ: {photo} is {image_size(photo)}, {path} {mask.shape[::-1]}")
            _copy(photo, out / part / "images" / photo.name)
            _save(mask, out / part / "masks" / f"{path.stem}.png")
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in names))


# ---- DAVIS, BSDS: copied as they are


def davis(source: Path, out: Path) -> None:
    """The videos in DAVIS' standard layout, for --dataset davis."""
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for path in _listing(source / "DAVIS" / kind / "480p", f"*/*.{suffix}"):
            _copy(path, out / path.relative_to(source / "DAVIS"))


def bsds(source: Path, out: Path) -> None:
    """Photographs alone: train and val for training, test for validation, as BSDS has it."""
    for folder, part in (("train", "train"), ("val", "train"), ("test", "val")):
        for path in _listing(source / "BSDS500/data/images" / folder, "*.jpg"):
            _copy(path, out / part / "images" / path.name)


# ---- depth


def kitchen(source: Path, out: Path) -> None:
    """Frames with depths; what is filmed last is for validation."""
    frames = _listing(source / "data", "frame-*.color.jpg")
    end, start = round(KITCHEN_TRAIN * len(frames)), round((KITCHEN_TRAIN + KITCHEN_GAP) * len(frames))
    for part, paths in (("train", frames[:end]), ("val", frames[start:])):
        for path in paths:
            name = path.name.removesuffix(".color.jpg")
            _copy(path, out / part / "images" / f"{name}.jpg")
            _copy(path.with_name(f"{name}.depth.png"), out / part / "depths" / f"{name}.png")


def mosd(source: Path, out: Path) -> None:
    """Scenes with depths and masks of objects, in the split of their authors.

    Class 1 is an object, 0 the table, 255 what was not measured. Clouds that are no picture (of one row) are left out.
    """
    for folder, part in (("learn", "train"), ("test", "val")):
        for path in tqdm(_listing(source / "segmentation/mOSD" / folder, "*.pcd"), part, unit=" scenes"):
            cloud = read_pcd(path)
            if len(cloud["z"]) == 1:
                continue
            color = np.stack([cloud["rgba"] >> shift & 255 for shift in (16, 8, 0)], 2).astype(np.uint8)
            measured, labels = np.isfinite(cloud["z"]), cloud["label"]
            depth = np.where(measured, np.round(1000 * np.nan_to_num(cloud["z"])), 0).astype(np.uint16)
            mask = np.where(labels == 0, IGNORE, labels >= 20).astype(np.uint8)  # 1 to 9: table; tens: objects
            for kind, pixels in (("images", color), ("depths", depth), ("masks", mask)):
                _save(pixels, out / part / kind / f"{path.stem}.png")
    (out / "classes.txt").write_text("table\nobject\n")


def read_pcd(path: Path) -> dict[str, np.ndarray]:
    """The fields of a point cloud of PCL's format, each (height, width). Raises ValueError if it cannot be read."""
    head, separator, body = path.read_bytes().partition(b"\nDATA binary_compressed\n")
    words = {line.split()[0]: line.split()[1:] for line in head.decode("ascii").splitlines() if line.strip()}
    if not separator:
        raise UserError(f"{path}: not a point cloud of PCL with DATA binary_compressed")
    height, width = int(words["HEIGHT"][0]), int(words["WIDTH"][0])
    packed, size = np.frombuffer(body[:8], "<u4")
    data = _lzf(body[8 : 8 + packed], int(size))
    fields, start = {}, 0
    for name, length, kind in zip(words["FIELDS"], words["SIZE"], words["TYPE"]):
        values = np.frombuffer(data, f"<{kind.lower()}{length}", height * width, start)
        fields[name], start = values.reshape(height, width), start + values.nbytes
    return fields


def _lzf(data: bytes, size: int) -> bytes:
    """Bytes that liblzf compressed: runs of literals, and copies of what came `back` bytes before."""
    out, i = bytearray(), 0
    while i < len(data):
        control = data[i]
        i += 1
        if control < 32:
            out += data[i : i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[i]
            i += 1
        back = ((control & 31) << 8 | data[i]) + 1
        i += 1
        length += 2
        start = len(out) - back
        repeated = out[start : start + length]  # shorter than length where the copy overlaps what it writes
        out += (repeated * (length // len(repeated) + 1))[:length]
    if len(out) != size:
        raise UserError(f"a compressed cloud has {len(out)} bytes, its head says {size}")
    return bytes(out)


DATASETS: dict[str, Callable[[Path, Path], None]] = {
    "voc-boxes": voc_boxes,
    "clothing": clothing,
    "davis": davis,
    "bsds": bsds,
    "mosd": mosd,
    "kitchen": kitchen,
}

if __name__ == "__main__":
    sys.exit(main())
