"""Tiny datasets in the real layouts: colored rectangles on gray noise, the color being the class."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import timm_dvt

SIZE = 64
COLORS = np.array([[220, 40, 40], [40, 200, 40], [50, 60, 230]])
VOC_NAMES = ("aeroplane", "bicycle", "bird")
REPOSITORY = [  # settings of the repository's protocols for images of this size
    "linear-seg.steps=30",
    "linear-seg.warmup=3",
    "linear-seg.lr=0.01",
    "linear-seg.batch_size=4",
    "linear-seg.short=32",
    "linear-seg.longest=128",
    "linear-seg.crop=32",
    "linear-seg.stride=20",
    "linear-seg.validate_every=20",
    "depth.steps=20",
    "depth.warmup=5",
    "depth.batch_size=4",
    "depth.crop=(40, 48)",
    "depth.bins=32",
    "depth.validate_every=8",
    "depth.loss_warmup=5",
    "detection.steps=3",
    "detection.batch_size=2",
    "detection.size=48",
    "detection.width=8",
    "detection.hidden=16",
    "detection.proposals=16",
    "detection.candidates=(20, 20, 20, 20)",
    "detection.anchors=(8, 12, 16, 24, 32)",
]


class Scene:
    """A (64, 64) image, its mask (0 is background), and its objects as (class from 1, [x0, y0, x1, y1])."""

    def __init__(self, seed: int):
        random = np.random.default_rng(seed)
        self.image = random.integers(90, 160, (SIZE, SIZE, 3)).astype(np.uint8)
        self.mask = np.zeros((SIZE, SIZE), np.uint8)
        self.label = seed % 3 + 1
        side, (x, y) = 8 * random.integers(3, 6), 8 * random.integers(0, 4, 2)
        self.objects = [(self.label, [int(x), int(y), int(min(SIZE, x + side)), int(min(SIZE, y + side))])]
        for label, (x0, y0, x1, y1) in self.objects:
            self.image[y0:y1, x0:x1] = COLORS[label - 1]
            self.mask[y0:y1, x0:x1] = label
        self.mask[-2:] = 255  # a strip that does not count
        # Nearer where it is brighter, from 1 to 9 m.
        self.depth = 1 + 8 * (1 - self.image.mean(2) / 255)


def scenes(part: str, count: int):
    return [Scene(i + (0 if part == "train" else 1000)) for i in range(count)]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stamps(folder: Path, train: int, val: int) -> None:
    write(folder / "classes.txt", "background\nred\ngreen\nblue\n")
    write(folder / "settings.json", "{}")
    for part, count in (("train", train), ("val", val)):
        objects = {}
        for i, scene in enumerate(scenes(part, count)):
            save(folder / part / "images" / f"{i:05d}.png", scene.image)
            save(folder / part / "masks" / f"{i:05d}.png", scene.mask)
            objects[f"{i:05d}"] = [{"class": label, "box": box} for label, box in scene.objects]
        write(folder / part / "objects.json", json.dumps(objects))


def voc(folder: Path, train: int, val: int) -> None:
    sets = {
        ("2012", "Segmentation", "train"): train,
        ("2012", "Segmentation", "val"): val,
        ("2012", "Main", "trainval"): train,
        ("2007", "Main", "trainval"): train,
        ("2007", "Main", "test"): val,
    }
    for (year, kind, part), count in sets.items():
        base = folder / "VOCdevkit" / f"VOC{year}"
        names = []
        for i, scene in enumerate(scenes("val" if part in ("val", "test") else "train", count)):
            name = f"{year}_{kind}_{part}_{i:03d}"
            names.append(name)
            save(base / "JPEGImages" / f"{name}.jpg", scene.image)
            save(base / "SegmentationClass" / f"{name}.png", scene.mask)
            things = "".join(
                f"<object><name>{VOC_NAMES[label - 1]}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin>"
                f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
                for label, (x0, y0, x1, y1) in scene.objects
            )
            size = f"<size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
            write(base / "Annotations" / f"{name}.xml", f"<annotation>{size}{things}</annotation>")
        write(base / "ImageSets" / kind / f"{part}.txt", "\n".join(names))


def ade20k(folder: Path, train: int, val: int) -> None:
    base = folder / "ADEChallengeData2016"
    for part, count in (("training", train), ("validation", val)):
        for i, scene in enumerate(scenes(part[:5] if part == "training" else "val", count)):
            save(base / "images" / part / f"ADE_{i:04d}.jpg", scene.image)
            mask = np.where(scene.mask == 255, 0, scene.mask + 1).astype(np.uint8)  # 0 is "other"
            save(base / "annotations" / part / f"ADE_{i:04d}.png", mask)


def camvid(folder: Path, train: int, val: int) -> None:
    for part, count in (("train", train), ("test", val)):
        for i, scene in enumerate(scenes(part, count)):
            save(folder / "CamVid" / part / f"{part}_{i:05d}.png", scene.image)
            mask = np.where(scene.mask == 255, 11, scene.mask).astype(np.uint8)  # 11 is void
            save(folder / "CamVid" / f"{part}annot" / f"{part}_{i:05d}.png", mask)


def nyu(folder: Path, train: int, val: int) -> None:
    for part, listing, count in (("train", "nyu_train.txt", train), ("val", "nyu_test.txt", val)):
        lines = []
        for i, scene in enumerate(scenes(part, count)):
            save(folder / f"{part}_room" / f"rgb_{i:05d}.jpg", scene.image)
            millimeters = (1000 * scene.depth).astype(np.uint16)
            save(folder / f"{part}_room" / f"sync_depth_{i:05d}.png", millimeters)
            lines.append(f"/{part}_room/rgb_{i:05d}.jpg /{part}_room/sync_depth_{i:05d}.png 518.8579")
        write(folder / listing, "\n".join(lines) + "\n")


def coco(folder: Path, train: int, val: int) -> None:
    for part, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for i, scene in enumerate(scenes(part, count)):
            name = f"{i + 1:012d}.jpg"
            save(folder / f"{part}2017" / name, scene.image)
            images.append({"id": i + 1, "file_name": name, "width": SIZE, "height": SIZE})
            for label, (x0, y0, x1, y1) in scene.objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": 10 * label,
                        "iscrowd": 0,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                    }
                )
        categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(("red", "green", "blue"))]
        record = {"images": images, "annotations": annotations, "categories": categories}
        write(folder / "annotations" / f"instances_{part}2017.json", json.dumps(record))
    write(
        folder / "coco_20k_filenames.txt",
        "train2014/COCO_train2014_000000000001.jpg\ntrain2014/COCO_train2014_000000000003.jpg\n",
    )


def davis(folder: Path, train: int, val: int) -> None:
    """Two videos: 2016's masks (one object, 255) and 2017's (two, void at a corner); there is nothing to learn from."""
    for name, ids in (("one", (255,)), ("two", (1, 2))):
        for frame in range(val // 2):
            scene = np.random.default_rng(frame).integers(90, 160, (SIZE, 3 * SIZE // 2, 3)).astype(np.uint8)
            mask = np.zeros(scene.shape[:2], np.uint8)
            for i, label in enumerate(ids):
                rows, columns = slice(8 + 24 * i, 32 + 24 * i), slice(8 + 4 * frame, 40 + 4 * frame)
                scene[rows, columns], mask[rows, columns] = COLORS[i], label
            if len(ids) > 1:
                mask[:4, :4] = 255
            save(folder / "JPEGImages" / "480p" / name / f"{frame:05d}.jpg", scene)
            save(folder / "Annotations" / "480p" / name / f"{frame:05d}.png", mask)


def spair(folder: Path, train: int, val: int) -> None:
    """Pairs of a square each, whose corners correspond; boxes lack a strip of it, so that they have a longer side."""
    names = []
    for i, (source, target) in enumerate(_pairs(val)):
        for name, scene in (("s", source), ("t", target)):
            save(folder / "JPEGImages" / "bird" / f"{i}{name}.jpg", scene.image)
        names.append(f"{i:06d}-{i}s-{i}t:bird")
        (box, other) = (scene.objects[0][1] for scene in (source, target))
        points = {
            "src_kps": _corners(box),
            "trg_kps": _corners(other),
            "trg_bndbox": [*other[:3], other[3] - 8],
            "category": "bird",
        }
        record = {"src_imname": f"{i}s.jpg", "trg_imname": f"{i}t.jpg", **points}
        write(folder / "PairAnnotation" / "test" / f"{names[-1]}.json", json.dumps(record))
    write(folder / "Layout" / "large" / "test.txt", "\n".join(names))


def pfpascal(folder: Path, train: int, val: int) -> None:
    rows = ["source_image,target_image,class,XA,YA,XB,YB"]
    for i, pair in enumerate(_pairs(val)):
        names = [f"PF-dataset-PASCAL/JPEGImages/{i}{side}.jpg" for side in "ab"]
        for name, scene in zip(names, pair):
            save(folder / name, scene.image)
        axes = [";".join(map(str, axis)) for scene in pair for axis in zip(*_corners(scene.objects[0][1]))]
        rows.append(",".join([*names, "3", *axes]))
    write(folder / "PF-dataset-PASCAL" / "test_pairs_pf_pascal.csv", "\n".join(rows) + "\n")


def _pairs(count: int) -> list[tuple[Scene, Scene]]:
    return [(Scene(i), Scene(i + 3 * count)) for i in range(count)]


def _corners(box: list[int]) -> list[list[int]]:
    x0, y0, x1, y1 = box
    return [[x0, y0], [x1 - 1, y0], [x0, y1 - 1], [x1 - 1, y1 - 1], [(x0 + x1) // 2, (y0 + y1) // 2]]


def imagefolder(folder: Path, train: int, val: int) -> None:
    for part, count in (("train", train), ("val", val)):
        for i, scene in enumerate(scenes(part, count)):
            save(folder / part / ("red", "green", "blue")[scene.label - 1] / f"{i:04d}.png", scene.image)


def folder(where: Path, train: int, val: int) -> None:
    """One's own: JPEG images, one of them in a subfolder, palette masks, boxes in COCO's JSON."""
    write(where / "classes.txt", "background\nred\ngreen\nblue\n")
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(("red", "green", "blue"))]
    for part, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for i, scene in enumerate(scenes(part, count)):
            name = f"{'more/' if i == 1 else ''}{i:03d}.jpg"
            save(where / part / "images" / name, scene.image)
            mask = Image.fromarray(scene.mask, "P")
            mask.putpalette([channel for value in range(256) for channel in (value, 255 - value, 7 * value % 256)])
            path = (where / part / "masks" / name).with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
            depths = (where / part / "depths" / name).with_suffix(".png")
            save(depths, (1000 * scene.depth).astype(np.uint16))
            images.append({"id": i, "file_name": name, "width": SIZE, "height": SIZE})
            for label, (x0, y0, x1, y1) in scene.objects:
                box = {"image_id": i, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                annotations.append({"id": len(annotations), **box})
        record = {"images": images, "annotations": annotations, "categories": categories}
        write(where / part / "boxes.json", json.dumps(record))


def written(names: Iterable[str], make_folder: Callable[[str], Path], train: int, val: int) -> dict[str, Path]:
    """Folders of the data sets of these names, which are those of the functions above."""
    folders = {name: make_folder(name) for name in names}
    for name, folder in folders.items():
        assert name in globals(), f"write a function {name} in this file: a small data set to test with"
        globals()[name](folder, train=train, val=val)
    return folders


def saved_model(folder: Path, arguments: dict[str, Any]) -> str:
    """A small ViT of random weights with a denoiser, saved as a folder; returns its name for timm."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **arguments)
    timm_dvt.save_pretrained(timm_dvt.add_denoiser(vit), folder, model_args=arguments)
    return f"local-dir:{folder}"


def small_vit(**arguments: Any) -> Any:
    """A ViT of random weights for 64 pixels."""
    torch.manual_seed(0)
    options = dict(img_size=SIZE, depth=2, embed_dim=32, num_heads=2, num_classes=0) | arguments
    return timm.create_model("vit_tiny_patch16_224", **options).eval()
