"""A folder of one's own images with masks or boxes: what is read, and what is said of what does not fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import small_datasets
from training.evaluate.data.datasets import DATASETS, kinds_of, open_dataset
from training.evaluate.tasks import task_settings


@pytest.fixture
def where(tmp_path):
    small_datasets.folder(tmp_path, train=4, val=3)
    return tmp_path


def paint(path, values, mode=None):
    Image.fromarray(np.asarray(values, np.uint8), mode).save(path)


def test_masks_are_class_indices_of_the_image_of_the_same_name(where):
    splits = open_dataset("folder", where, "masks")
    assert [len(splits[part]) for part in ("train", "val")] == [4, 3]
    train, scenes = splits["train"], small_datasets.scenes("train", 4)
    assert list(train.classes) == ["background", "red", "green", "blue"]
    for i, path in enumerate(train.images):
        scene = scenes[int(path.stem)]
        assert torch.equal(train.annotation(i), torch.from_numpy(scene.mask))
        assert (train.image(i) * 255 - torch.from_numpy(scene.image).permute(2, 0, 1)).abs().mean() < 12  # JPEG
    assert "more/001.jpg" in str(train.images[-1])


def test_without_names_the_masks_say_how_many_classes_there_are(where):
    (where / "classes.txt").unlink()
    paint(where / "val" / "masks" / "000.png", np.full((64, 64), 6))
    assert open_dataset("folder", where, "masks")["train"].classes == [f"class {i}" for i in range(7)]


def test_masks_of_one_class_are_refused(where):
    (where / "classes.txt").write_text("all\n")
    for path in where.glob("*/masks/**/*.png"):
        paint(path, np.zeros((64, 64)))
    with pytest.raises(ValueError, match="its masks have one class"):
        open_dataset("folder", where, "masks")


def test_any_image_suffix_and_a_turned_photograph(where):
    image = where / "train" / "images" / "000.jpg"
    Image.open(image).convert("RGB").save(image.with_suffix(".webp"))
    image.unlink()
    wide = Image.new("RGB", (30, 20))
    exif = wide.getexif()
    exif[0x0112] = 6  # to be turned by a quarter: 20 x 30 as seen
    wide.save(where / "train" / "images" / "turned.jpg", exif=exif)
    paint(where / "train" / "masks" / "turned.png", np.zeros((30, 20)))
    split = open_dataset("folder", where, "masks")["train"]
    assert split.image(4).shape[1:] == split.annotation(4).shape == (30, 20)


def test_one_s_own_images_are_evaluated_at_sizes_that_a_cpu_bears():
    for task, setting, paper, own in (("linear-seg", "steps", 40_000, 1_500), ("knn-seg", "query_size", 0, 48)):
        assert [getattr(task_settings(task, name), setting) for name in ("voc", "folder")] == [paper, own]
        assert getattr(task_settings(task, "folder", [f"{setting}={paper}"]), setting) == paper


def test_boxes_are_fractions_of_the_image(where):
    splits = open_dataset("folder", where, "boxes")
    assert list(splits["val"].classes) == ["red", "green", "blue"]
    for i, path in enumerate(splits["val"].images):
        ((label, box),) = small_datasets.scenes("val", 3)[int(path.stem)].objects
        found = splits["val"].annotation(i)
        assert found.classes.tolist() == [label - 1] and found.difficult.tolist() == [False]
        assert torch.allclose(found.boxes, torch.tensor([box]) / small_datasets.SIZE)


def test_a_folder_has_the_kinds_that_it_has_annotations_for(where):
    assert set(kinds_of("folder", where)) == set(DATASETS["folder"].kinds)
    (where / "train" / "boxes.json").unlink()
    assert set(kinds_of("folder", where)) == {"images", "masks", "depth", "discovery"}
    shutil.rmtree(where / "train")
    shutil.rmtree(where / "val" / "masks")
    assert set(kinds_of("folder", where)) == {"images", "depth", "discovery"}
    shutil.rmtree(where / "val" / "depths")
    assert set(kinds_of("folder", where)) == {"images", "discovery"}
    assert len(open_dataset("folder", where, "images")["val"]) == 3  # which needs no training images


def test_depths_are_in_millimeters_and_0_where_unknown(where):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(values).save(where / "train" / "depths" / "more" / "001.png")
    splits = open_dataset("folder", where, "depth")
    assert [len(splits[part]) for part in ("train", "val")] == [4, 3]
    i = [path.name for path in splits["train"].images].index("001.jpg")
    assert np.allclose(splits["train"].annotation(i).numpy(), values / 1000)
    assert task_settings("depth", "folder").eigen_crop is False and task_settings("depth", "nyu").eigen_crop is True
    (where / "val" / "depths" / "002.png").unlink()
    with pytest.raises(
        ValueError, match=r"there is no depth map .*val/depths/002.png for the image .*val/images/002.jpg"
    ):
        open_dataset("folder", where, "depth")


def missing_mask(where):
    (where / "val" / "masks" / "002.png").unlink()


def class_out_of_range(where):
    paint(where / "train" / "masks" / "002.png", np.full((64, 64), 4))


def other_size(where):
    paint(where / "train" / "masks" / "more" / "001.png", np.zeros((64, 32)))


def colored_mask(where):
    paint(where / "val" / "masks" / "000.png", np.zeros((64, 64, 3)))


def class_named_twice(where):
    (where / "classes.txt").write_text("sky\nroad\nsky\ncar\n")


def no_class_name(where):
    (where / "classes.txt").write_text("sky\n\nroad\ncar\n")


@pytest.mark.parametrize(
    "harm, message",
    [
        (missing_mask, r"there is no mask .*val/masks/002.png for the image .*val/images/002.jpg"),
        (class_out_of_range, r"train/masks/002.png: class 4 is out of range: there are 4 classes, 0 to 3"),
        (other_size, r"sizes differ: .*more/001.jpg is 64 x 64, its mask .*more/001.png 32 x 64"),
        (colored_mask, r"val/masks/000.png: a mask is a palette or gray PNG .* mode RGB"),
        (class_named_twice, r"the class 'sky' is named twice"),
        (no_class_name, r"classes.txt: line 1, counted from 0, is empty"),
    ],
)
def test_masks_that_cannot_be_are_named(harm, message, where):
    harm(where)
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", where, "masks")


def change(where, alter, part="val"):
    path = where / part / "boxes.json"
    record = json.loads(path.read_text())
    alter(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "alter, message",
    [
        (lambda record: record["images"][0].update(width=65), "sizes differ: .*000.jpg is 64 x 64, .* says 65 x 64"),
        (lambda record: record["images"][1].update(file_name="no.jpg"), "there is no image .*no.jpg, which .* lists"),
        (lambda record: record["annotations"][0].update(category_id=9), "there is no category 9"),
        (lambda record: record["annotations"][0].update(image_id=99), "there is no image 99"),
        (lambda record: record.pop("categories"), "is not COCO's JSON of boxes: KeyError: 'categories'"),
        (lambda record: record["categories"][0].update(name="pink"), "train has no .pink.; val has no .red."),
    ],
)
def test_boxes_that_cannot_be_are_named(alter, message, where):
    change(where, alter)
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", where, "boxes")


def test_crowds_are_no_objects_to_discover_and_neither_hit_nor_miss_to_detect(where):
    """LOST leaves them out of COCO; a detector that finds one is not wrong."""
    path = where / "val" / "boxes.json"
    record = json.loads(path.read_text())
    crowd = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 64, 64], "iscrowd": 1, "id": 99}
    record["annotations"].append(crowd)
    path.write_text(json.dumps(record))
    (split,) = open_dataset("folder", where, "discovery").values()
    assert [len(split.annotation(i).boxes) for i in range(3)] == [1, 1, 1]
    val = open_dataset("folder", where, "boxes")["val"]
    assert sorted(flag for i in range(3) for flag in val.annotation(i).difficult.tolist()) == [False] * 3 + [True]


def test_masks_of_0_and_255_are_refused_with_the_remedy(where):
    """Objects of 255 would not count, and whatever is said of the rest would be right."""
    (where / "classes.txt").write_text("background\nobject\n")
    for path in where.glob("*/masks/**/*.png"):
        values = np.where(np.array(Image.open(path)) == 0, 0, 255)
        paint(path, values)
    with pytest.raises(ValueError, match="hold class 0 alone.* objects of masks of 0 and 255 have to be 1"):
        open_dataset("folder", where, "masks")


def test_depths_of_8_bits_are_refused(where):
    for path in where.glob("*/depths/**/*.png"):
        paint(path, np.full((64, 64), 200))
    with pytest.raises(ValueError, match="has 16 bits a pixel, 1000 for a meter; this has 8"):
        open_dataset("folder", where, "depth")
