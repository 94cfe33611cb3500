"""Composed images: exact masks, nothing shared between the splits, the same image for the same number."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion

from tests.helpers.stamp_packages import fabricate
from training import stamps
from training.common.stamp_sources import CLASSES, CLOTHES_CLASSES, STAMP_CLASSES, SourcesMissing, load_sources


@pytest.fixture(scope="module")
def share(tmp_path_factory):
    """A folder like /usr/share."""
    return fabricate(tmp_path_factory.mktemp("share"))


def test_no_source_is_in_both_splits_and_each_class_is_in_both(share):
    train, val = (load_sources(split, share) for split in ("train", "val"))
    for ours, theirs in zip(train.stamps, val.stamps, strict=True):
        greens = [{stamp.getpixel((20, 10))[1] for stamp in part} for part in (ours, theirs)]
        assert len(greens[0]) == 6 and len(greens[1]) == 2 and not greens[0] & greens[1]
    assert len(train.photos) == 6 and len(val.photos) == 2
    assert all(images.max() == 100 for images in train.clothes) and all(images.max() == 200 for images in val.clothes)


def test_the_mask_names_the_class_of_every_pixel(share):
    """Photographs are gray, and a cut-out's ratio of red to blue says its class, whatever light it is drawn in."""
    composer = stamps.Composer("val", sources=load_sources("val", share))
    seen, right, total = set(), 0, 0
    for index in range(30):
        stamped = composer[index]
        image, mask = stamped.image.astype(float), stamped.mask
        for label in np.unique(mask):
            inside = binary_erosion(mask == label, iterations=2)  # borders are blended with what lies below
            red, green, blue = image[inside].T
            if label == 0:
                right += int(((red == green) & (green == blue)).sum())
                total += len(red)
            elif label <= len(STAMP_CLASSES) and inside.any():
                right += int((abs(10 * red / blue - label) < 0.35).sum())
                total += len(red)
                seen.add(label)
    # Not quite all: two cut-outs of a class may meet, blended, and soft edges reach further than two pixels.
    assert len(seen) > 12 and right > 0.98 * total


def test_a_box_holds_what_is_visible_of_an_object_and_no_more(share):
    composer = stamps.Composer("train", sources=load_sources("train", share))
    for index in range(20):
        stamped = composer[index]
        for label, (x0, y0, x1, y1) in stamped.objects:
            inside = stamped.mask[y0:y1, x0:x1] == label
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_place_says_nothing_of_the_class(share):
    composer = stamps.Composer("train", sources=load_sources("train", share, size=192), size=192)
    covered = np.mean([composer[index].mask > 0 for index in range(150)], axis=0)
    quarters = covered.reshape(4, 48, 4, 48).mean((1, 3))
    # Objects are cut off at the image's edges, so the middle has a little more of them.
    assert quarters.max() < 1.8 * quarters.min()


def test_with_places_by_class_the_height_of_an_object_tells_its_class(share):
    """Least squares from the height of a whole object to its class: all of it where places say so, none elsewhere."""
    sources, explained = load_sources("train", share, size=192), {}
    for places in stamps.PLACES:
        composer = stamps.Composer("train", sources=sources, size=192, places=places)
        objects = [thing for index in range(80) for thing in composer[index].objects]
        whole = [(label, y0 + y1) for label, (_, y0, _, y1) in objects if y0 > 0 and y1 < 192]
        explained[places] = np.corrcoef(np.array(whole, float).T)[0, 1] ** 2
    assert explained["class"] > 0.8 and explained["any"] < 0.1
    with pytest.raises(ValueError, match="places must be one of"):
        stamps.Composer("train", sources=sources, places="street")


def test_an_image_depends_on_seed_split_and_number_alone(share):
    sources = load_sources("train", share)
    composer, again = stamps.Composer("train", sources=sources), stamps.Composer("train", sources=sources)
    composer[3]
    assert np.array_equal(composer[7].image, again[7].image)
    other = stamps.Composer("train", seed=1, sources=sources)
    assert not np.array_equal(composer[7].image, other[7].image)


def test_the_folder_is_complete_and_made_again_is_the_same(share, tmp_path):
    arguments = ["--train", "3", "--val", "2", "--share", str(share), "--size", "140", "--out"]
    assert stamps.main([*arguments, str(tmp_path / "a")]) == 0
    assert stamps.main([*arguments, str(tmp_path / "b")]) == 0
    files = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.*"))
    assert "train/images/00002.png" in files and "val/masks/00001.png" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "classes.txt").read_text().splitlines() == list(CLASSES)
    objects = json.loads((tmp_path / "a" / "val" / "objects.json").read_text())
    assert set(objects) == {"00000", "00001"}
    with Image.open(tmp_path / "a" / "val" / "masks" / "00000.png") as mask:
        assert mask.mode == "L" and mask.size == (140, 140)
        assert {entry["class"] for entry in objects["00000"]} <= set(np.unique(np.asarray(mask)))


def test_a_folder_takes_more_images_of_its_settings_and_none_of_others(share, tmp_path, capsys):
    """Two seeds, or two places, in one folder would be a dataset that no command makes again."""
    arguments = ["--val", "1", "--share", str(share), "--size", "140", "--out", str(tmp_path)]
    assert stamps.main([*arguments, "--train", "1"]) == 0
    first = (tmp_path / "train" / "images" / "00000.png").read_bytes()
    assert stamps.main([*arguments, "--train", "2"]) == 0
    for other in (["--seed", "1"], ["--size", "96"], ["--places", "class"]):
        capsys.readouterr()
        assert stamps.main([*arguments, "--train", "2", *other]) == 1
        told = capsys.readouterr().err
        assert f"begun with other settings; use those, or another folder:\n  {other[0][2:]}: " in told
    assert (tmp_path / "train" / "images" / "00000.png").read_bytes() == first
    assert len(list((tmp_path / "train" / "images").iterdir())) == 2
    assert stamps.main([*arguments, "--train", "1"]) == 0  # of the other one nothing is lost
    assert set(json.loads((tmp_path / "train" / "objects.json").read_text())) == {"00000", "00001"}


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, capsys):
    with pytest.raises(SourcesMissing, match="apt-get install .*tuxpaint-stamps-default"):
        load_sources("train", tmp_path)
    assert stamps.main(["--share", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_there_are_as_many_classes_as_fashion_mnist_and_the_stamps_have():
    assert len(CLASSES) == 1 + len(STAMP_CLASSES) + 10 and len(CLOTHES_CLASSES) == 10
