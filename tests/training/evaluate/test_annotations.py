"""Masks, depths, boxes and classes that cannot be: each is named with its file, in every dataset, before a model is."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers import small_datasets
from training.evaluate.__main__ import main
from training.evaluate.data.datasets import DATASETS, open_dataset

PIXELS = {  # an annotation of val by dataset
    "voc": "VOCdevkit/VOC2012/SegmentationClass/2012_Segmentation_val_001.png",
    "ade20k": "ADEChallengeData2016/annotations/validation/ADE_0001.png",
    "camvid": "CamVid/testannot/test_00001.png",
    "stamps": "val/masks/00001.png",
    "folder": "val/masks/000.png",
    "nyu": "val_room/sync_depth_00001.png",
}
KINDS = {name: "depth" if name == "nyu" else "masks" for name in PIXELS}
SHORT = "sizes differ: .* is 64 x 64, its .* 64 x 56"


def written(name, folder):
    return small_datasets.written([name], lambda _: folder, train=2, val=2)[name]


def refused(name, folder, kind):
    """The message; the run stops before the model, which is none."""
    with pytest.raises(ValueError) as error:
        open_dataset(name, folder, kind)
    return str(error.value)


def test_every_dataset_with_masks_or_depth_is_tried():
    assert set(PIXELS) == {name for name, entry in DATASETS.items() if {"masks", "depth"} & set(entry.kinds)}
    assert set(BOXES) == {name for name, entry in DATASETS.items() if "boxes" in entry.kinds}


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda path, mask: Image.fromarray(mask[:56]).save(path), SHORT),
        (lambda path, mask: Image.fromarray(np.stack([mask] * 3, 2).astype(np.uint8)).save(path), "mode RGB"),
        (lambda path, mask: path.write_bytes(b"<html>404</html>"), "not an image that Pillow can read"),
        (lambda path, mask: path.write_bytes(b""), "not an image that Pillow can read"),
        (lambda path, mask: path.write_bytes(path.read_bytes()[:-40]), "not an image that Pillow can read"),
        (lambda path, mask: path.unlink(), "there is no (mask|depth map) .* for the image"),
        (lambda path, mask: Image.fromarray(np.full_like(mask, 200)).save(path), "class 200 is out of range"),
    ],
)
@pytest.mark.parametrize("name", PIXELS)
def test_a_mask_or_depth_that_cannot_be_is_named(name, harm, message, tmp_path):
    path = written(name, tmp_path) / PIXELS[name]
    harm(path, np.array(Image.open(path)))
    if name == "nyu" and "class" in message:
        return  # any number is a depth
    said = refused(name, tmp_path, KINDS[name])
    assert str(path) in said and re.search(message, said)


def test_a_depth_that_is_no_number_is_named(tmp_path):
    path = written("nyu", tmp_path) / PIXELS["nyu"]
    values = np.full((64, 64), 1000, np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(path.with_suffix(".tif"))
    listing = tmp_path / "nyu_test.txt"
    listing.write_text(listing.read_text().replace(path.name, path.with_suffix(".tif").name))
    assert "sync_depth_00001.tif: depths must be finite" in refused("nyu", tmp_path, "depth")
    listing.write_text("rgb.jpg\n")
    assert "nyu_test.txt: a line is IMAGE DEPTH" in refused("nyu", tmp_path, "depth")


def test_other_and_void_and_255_do_not_count(tmp_path):
    for name, other in (("ade20k", 0), ("camvid", 11)):
        path = written(name, tmp_path / name) / PIXELS[name]
        mask = np.full((64, 64), 5, np.uint8)
        mask[0], mask[1] = other, 255
        Image.fromarray(mask).save(path)
        found = open_dataset(name, tmp_path / name, "masks")["val"].annotation(1)
        assert (found[:2] == 255).all() and (found[2:] == (4 if name == "ade20k" else 5)).all()


# ---- boxes

BOXES = {
    "coco": "annotations/instances_val2017.json",
    "folder": "val/boxes.json",
    "stamps": "val/objects.json",
    "voc": "VOCdevkit/VOC2007/Annotations/2007_Main_test_001.xml",
}


def with_box(name, path, box, label):
    """Give an object of the second image another box and class; box None leaves it out."""
    if name == "voc":
        sides = "" if box is None else "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, box))
        text = re.sub("<bndbox>.*</bndbox>", f"<bndbox>{sides}</bndbox>", path.read_text())
        path.write_text(text if label is None else re.sub("<name>.*</name>", f"<name>{label}</name>", text))
        return
    record = json.loads(path.read_text())
    thing = record["00001"][0] if name == "stamps" else record["annotations"][1]
    key, class_key = ("box", "class") if name == "stamps" else ("bbox", "category_id")
    thing[key] = box
    if box is None:
        del thing[key]
    if label is not None:
        thing[class_key] = label
    path.write_text(json.dumps(record))


SIDES = ("xmin", "ymin", "xmax", "ymax")


@pytest.mark.parametrize(
    "box, label",
    [
        (None, None),
        ([], None),
        ([1, 2, 3], None),
        ([None] * 4, None),
        ([1, 2, float("nan"), 4], None),
        ([1, 2, float("inf"), 4], None),
        (["a", 2, 3, 4], None),
        ([70, 70, 90, 90], None),
        ([9, 9, -20, -20], None),
        ([1, 1, 9, 9], 77),
    ],
)
@pytest.mark.parametrize("name", BOXES)
def test_a_box_that_cannot_be_is_named(name, box, label, tmp_path):
    path = written(name, tmp_path) / BOXES[name]
    with_box(name, path, box, label)
    assert str(path) in refused(name, tmp_path, "boxes")


@pytest.mark.parametrize("name", BOXES)
def test_a_file_of_boxes_that_is_none_is_named_and_one_without_area_is_left_out(name, tmp_path):
    path = written(name, tmp_path) / BOXES[name]
    with_box(name, path, [3, 4, {"voc": 2}.get(name, 0 if name != "stamps" else 3), 9], None)
    assert [len(open_dataset(name, tmp_path, "boxes")["val"].annotation(i).boxes) for i in (0, 1)] == [1, 0]
    for text in ("<ann", '{"a": 1'):
        path.write_text(text)
        assert str(path) in refused(name, tmp_path, "boxes")
    if name != "voc":
        for record in ([1], {"images": None, "00001": None}):
            path.write_text(json.dumps(record))
            assert str(path) in refused(name, tmp_path, "boxes")


# ---- classes


def test_classes_of_train_and_val_that_differ_are_named(tmp_path):
    for part, names in (("train", "abc"), ("val", "bcd")):
        for name in names:
            small_datasets.save(tmp_path / "a" / part / name / "1.png", np.zeros((8, 8, 3), np.uint8))
    assert "train has no 'd'; val has no 'a'" in refused("imagefolder", tmp_path / "a", "labels")
    path = written("coco", tmp_path / "b") / BOXES["coco"]
    path.write_text(path.read_text().replace('"red"', '"blau"'))
    assert "train has no 'blau'; val has no 'red'" in refused("coco", tmp_path / "b", "boxes")
    path.write_text(path.read_text().replace('"blau"', '"x"').replace('"green"', '"red"').replace('"x"', '"green"'))
    assert "they are in another order" in refused("coco", tmp_path / "b", "boxes")


def test_labels_are_those_of_the_folders_that_hold_images(tmp_path):
    for part in ("train", "val"):
        for name in ("red/1.png", "blue/deep/2.webp", "blue/._2.png", ".ipynb_checkpoints/3.png", "4.png"):
            small_datasets.save(tmp_path / part / name, np.zeros((8, 8, 3), np.uint8))
        (tmp_path / part / "empty").mkdir()
    split = open_dataset("imagefolder", tmp_path, "labels")["train"]
    assert split.classes == ["blue", "red"] and [split.annotation(i) for i in range(len(split))] == [0, 1]
    assert len(open_dataset("imagefolder", tmp_path, "images")["val"]) == 2


@pytest.mark.parametrize("kind", ["masks", "boxes", "discovery"])
def test_a_split_in_which_nothing_is_labeled_is_named(kind, tmp_path):
    written("stamps", tmp_path)
    for path in (tmp_path / "val" / "masks").iterdir():
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    (tmp_path / "val" / "objects.json").write_text("{}")
    assert "nothing is labeled in stamps val" in refused("stamps", tmp_path, kind)


def test_names_of_classes_that_are_no_text_are_told_with_their_folder(tmp_path):
    written("stamps", tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    assert f"stamps under {tmp_path}: 'utf-8' codec" in refused("stamps", tmp_path, "masks")


# ---- through the command line


def test_a_bad_annotation_is_told_before_a_model_is_asked_for(tmp_path, capsys):
    path = written("voc", tmp_path) / PIXELS["voc"]
    Image.open(path).crop((0, 0, 64, 56)).save(path)
    words = ["linear-seg", "--model", "no_such_model", "--dataset", "voc", "--data", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and "64 x 56" in said and "no_such_model" not in said
    assert main([*words, "--limit", "1"]) == 2 and "no_such_model" in capsys.readouterr().err  # it is not among these
