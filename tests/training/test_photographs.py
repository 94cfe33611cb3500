"""Claims about photographs of public repositories: what of a checkout becomes a folder that the evaluation reads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from tests.helpers import small_datasets
from tests.helpers.small_datasets import save
from training import photographs
from training.evaluate.data.datasets import open_dataset


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def made(tmp_path):
    """name -> the folder that the command makes of the checkout in tmp_path / "source"."""

    def make(name):
        words = [name, "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
        assert photographs.main(words) == 0
        return tmp_path / "out"

    return make


def voc_checkout(source):
    """Part, name, seed of the photograph, boxes as two corners each: the last pixels belong to the object."""
    for part, name, seed, boxes in (
        ("train", "a", 1, [("cat", [[0, 0], [39, 29]])]),
        ("train", "b", 2, [("dog", [[3, 4], [3, 6]]), ("cat", [[10, 0], [19, 9]])]),
        ("val", "empty", 3, []),
        ("val", "c", 4, [("dog", [[1, 1], [2, 2]])]),
        ("trainval", "a", 1, [("cat", [[0, 0], [39, 29]])]),
    ):
        save(source / "project" / part / "img" / f"{name}.jpg", pixels(seed, 30, 40, 3))
        things = [{"classTitle": label, "points": {"exterior": corners, "interior": []}} for label, corners in boxes]
        path = source / "project" / part / "ann" / f"{name}.jpg.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"size": {"height": 30, "width": 40}, "objects": things}))


def test_photographs_of_voc_have_their_boxes_and_appear_once_or_not_at_all(tmp_path, made, monkeypatch):
    monkeypatch.setitem(photographs.VAL, "voc-boxes", 1)
    voc_checkout(tmp_path / "source")
    splits = open_dataset("folder", made("voc-boxes"), "boxes")
    assert {part: len(split) for part, split in splits.items()} == {"train": 2, "val": 1}
    assert splits["val"].classes == ["cat", "dog"]
    found = {}
    for split in splits.values():
        for i, path in enumerate(split.images):
            boxes = split.annotation(i)
            found[path.stem] = (boxes.boxes * torch.tensor([40, 30, 40, 30])).round().int().tolist(), boxes.classes
    assert set(found) == {"a", "b", "c"}
    assert found["a"][0] == [[0, 0, 40, 30]] and found["c"][0] == [[1, 1, 3, 3]]
    assert found["b"][0] == [[3, 4, 4, 7], [10, 0, 20, 10]] and found["b"][1].tolist() == [1, 0]


def test_a_split_hangs_on_names_alone_and_not_on_their_order(tmp_path):
    files = [tmp_path / f"{i}.jpg" for i in range(20)]
    split = photographs._split(files, 5)
    assert len(split["val"]) == 5 and sorted(split["train"] + split["val"]) == sorted(files)
    shuffled = photographs._split(files[::-1], 5)
    assert {part: set(paths) for part, paths in shuffled.items()} == {part: set(paths) for part, paths in split.items()}


def clothing_checkout(source, masks):
    labels = np.array([["null", "bag", "hat"]], dtype=object)
    source.mkdir()
    savemat(source / "label_list.mat", {"label_list": labels})
    (source / "annotations/pixel-level").mkdir(parents=True)
    for number, mask in enumerate(masks):
        save(source / "photos" / f"{number:04d}.jpg", pixels(number, 8, 6, 3))
        savemat(source / "annotations/pixel-level" / f"{number:04d}.mat", {"groundtruth": mask})


def test_masks_of_clothing_are_those_of_the_mat_files(tmp_path, made, monkeypatch):
    monkeypatch.setitem(photographs.VAL, "clothing", 2)
    masks = [pixels(i, 8, 6) % 3 for i in range(5)]
    clothing_checkout(tmp_path / "source", masks)
    splits = open_dataset("folder", made("clothing"), "masks")
    assert {part: len(split) for part, split in splits.items()} == {"train": 3, "val": 2}
    for split in splits.values():
        assert split.classes == ["null", "bag", "hat"]
        for i, path in enumerate(split.images):
            assert split.annotation(i).tolist() == masks[int(path.stem)].tolist()


def test_a_mask_of_another_size_is_an_error_and_leaves_no_folder(tmp_path, capsys):
    clothing_checkout(tmp_path / "source", [np.zeros((6, 8), np.uint8)])
    assert photographs.main(["clothing", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "sizes differ: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_videos_of_davis_keep_their_layout(tmp_path, made):
    small_datasets.davis(tmp_path / "source/DAVIS", train=0, val=6)
    (tmp_path / "source/DAVIS/cont").mkdir()
    out = made("davis")
    assert sorted(path.name for path in out.iterdir()) == ["Annotations", "JPEGImages"]
    videos = open_dataset("davis", out, "videos")["val"]
    assert [len(videos.annotation(i)) for i in range(len(videos))] == [3, 3]


def test_bsds_tests_on_its_test_photographs(tmp_path, made):
    for i, part in enumerate(("train", "val", "test")):
        save(tmp_path / "source/BSDS500/data/images" / part / f"{i}.jpg", pixels(i, 8, 8, 3))
        (tmp_path / "source/BSDS500/data/images" / part / "Thumbs.db").write_bytes(b"")
    out = made("bsds")
    assert sorted(path.name for path in (out / "train/images").iterdir()) == ["0.jpg", "1.jpg"]
    assert [path.name for path in open_dataset("folder", out, "images")["val"].images] == ["2.jpg"]


def lzf_compressed(data):
    """LZF by the format's description: the longest earlier match, overlapping its copy too, or one literal."""
    packed, i = bytearray(), 0
    while i < len(data):
        length, back = 0, 0
        for start in range(max(0, i - 8192), i):
            n = 0
            while i + n < len(data) and n < 264 and data[start + n] == data[i + n]:
                n += 1
            if n > length:
                length, back = n, i - start
        if length < 3:
            packed += bytes([0, data[i]])
            i += 1
            continue
        code, distance = length - 2, back - 1
        packed.append(min(code, 7) << 5 | distance >> 8)
        packed += bytes([code - 7]) if code >= 7 else b""
        packed.append(distance & 255)
        i += length
    return bytes(packed)


def pcd(label, depth, color):
    """A point cloud (h, w) of PCL, binary_compressed: field after field."""
    rgba = (255 << 24) + (color.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(2)
    body = label.astype("<u4").tobytes() + 2 * depth.astype("<f4").tobytes() + depth.astype("<f4").tobytes()
    body += rgba.astype("<u4").tobytes()
    packed = lzf_compressed(body)
    head = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS label x y z rgba\nSIZE 4 4 4 4 4\n"
        f"TYPE U F F F U\nCOUNT 1 1 1 1 1\nWIDTH {label.shape[1]}\nHEIGHT {label.shape[0]}\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {label.size}\nDATA binary_compressed\n"
    )
    return head.encode() + np.array([len(packed), len(body)], "<u4").tobytes() + packed


def test_scenes_of_mosd_keep_colors_depths_in_millimeters_and_objects(tmp_path, made):
    label = np.array([[0, 1, 2], [20, 21, 30]])
    depth = np.array([[np.nan, 1.2345, 0.7], [0.5, 0.5, 2.0]])
    color = pixels(0, 2, 3, 3)
    for own in ("learn", "test"):
        folder = tmp_path / "source/segmentation/mOSD" / own
        folder.mkdir(parents=True)
        (folder / "x0.pcd").write_bytes(pcd(label, depth, color))
        (folder / "x1.pcd").write_bytes(pcd(label[:1], depth[:1], color[:1]))  # one row: no picture
    out = made("mosd")
    assert [path.name for path in (out / "val/images").iterdir()] == ["x0.png"]
    assert np.array(Image.open(out / "val/images/x0.png")).tolist() == color.tolist()
    with Image.open(out / "val/depths/x0.png") as image:
        assert image.mode.startswith("I") and np.array(image).tolist() == [[0, 1234, 700], [500, 500, 2000]]
    assert np.allclose(open_dataset("folder", out, "depth")["val"].annotation(0), [[0, 1.234, 0.7], [0.5, 0.5, 2]])
    masks = open_dataset("folder", out, "masks")["train"]
    assert masks.classes == ["table", "object"] and masks.annotation(0).tolist() == [[255, 0, 0], [1, 1, 1]]


def test_a_cloud_of_repeated_bytes_is_unpacked_as_it_was():
    for data in (b"a" * 1000, b"abcabcabcabd" * 60, bytes(pixels(0, 700)), bytes(pixels(1, 9000) % 2)[:3000]):
        assert photographs._lzf(lzf_compressed(data), len(data)) == data


def test_frames_of_the_kitchen_are_split_by_time(tmp_path, made):
    for i in range(20):
        save(tmp_path / "source/data" / f"frame-{i:06d}.color.jpg", pixels(i, 8, 8, 3))
        save(tmp_path / "source/data" / f"frame-{i:06d}.depth.png", np.full((8, 8), 1000 + i, np.uint16))
    out = made("kitchen")
    names = {part: sorted(path.stem for path in (out / part / "images").iterdir()) for part in ("train", "val")}
    assert len(names["train"]) == 14 and len(names["val"]) == 5 and max(names["train"]) < min(names["val"])
    assert open_dataset("folder", out, "depth")["val"].annotation(4).unique().tolist() == pytest.approx([1.019])


def test_what_is_no_checkout_or_is_there_already_is_one_line(tmp_path, capsys):
    for name in photographs.DATASETS:
        assert photographs.main([name, "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert "must be a checkout" in told and told.count("\n") == 1
    assert photographs.main(["bsds", "--source", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_damaged_record_is_one_line_that_names_it(tmp_path, capsys):
    voc_checkout(tmp_path / "source")
    path = tmp_path / "source/project/val/ann/c.jpg.json"
    path.write_text(path.read_text()[:-5])
    words = ["voc-boxes", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out")]
    assert photographs.main(words) == 2
    told = capsys.readouterr().err
    assert f"{path} is damaged" in told and told.count("\n") == 1 and not (tmp_path / "out").exists()
