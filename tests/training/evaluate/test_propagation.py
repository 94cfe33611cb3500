"""Label propagation in videos: DAVIS' numbers against its toolkit's definition, labels against a loop of DINO's."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from tests.helpers import small_datasets
from training.evaluate import propagation
from training.evaluate.data.datasets import open_dataset
from training.evaluate.propagation import Settings
from training.evaluate.run import Run

# ---- J and F


def toolkit_j(annotation, segmentation):
    """db_eval_iou of DAVIS' toolkit."""
    if annotation.sum() == 0 and segmentation.sum() == 0:
        return 1.0
    return (annotation & segmentation).sum() / (annotation | segmentation).sum()


def toolkit_f(annotation, segmentation):
    """f_measure of DAVIS' toolkit: boundaries of seg2bmap, dilated by a disk, and matched."""
    radius = int(np.ceil(0.008 * np.linalg.norm(annotation.shape)))
    found, true = seg2bmap(segmentation), seg2bmap(annotation)
    found_match, true_match = found & dilated(true, radius), true & dilated(found, radius)
    if found.sum() == 0 and true.sum() > 0:
        precision, recall = 1, 0
    elif found.sum() > 0 and true.sum() == 0:
        precision, recall = 0, 1
    elif found.sum() == 0 and true.sum() == 0:
        precision, recall = 1, 1
    else:
        precision, recall = found_match.sum() / found.sum(), true_match.sum() / true.sum()
    return 0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def seg2bmap(seg):
    east, south, southeast = (np.zeros_like(seg) for _ in range(3))
    east[:, :-1], south[:-1], southeast[:-1, :-1] = seg[:, 1:], seg[1:], seg[1:, 1:]
    edges = seg ^ east | seg ^ south | seg ^ southeast
    edges[-1] = seg[-1] ^ east[-1]
    edges[:, -1] = seg[:, -1] ^ south[:, -1]
    edges[-1, -1] = False
    return edges


def dilated(mask, radius):
    height, width = mask.shape
    padded, out = np.pad(mask, radius), np.zeros_like(mask)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            if (dy - radius) ** 2 + (dx - radius) ** 2 <= radius**2:
                out |= padded[dy : dy + height, dx : dx + width]
    return out


def blob(draw, shape, share=0.3):
    field = gaussian_filter(draw.standard_normal(shape), 4)
    return field > np.quantile(field, 1 - share)


@pytest.mark.parametrize("shape", [(48, 85), (200, 130), (31, 31)])
def test_j_and_f_are_those_of_davis_toolkit_on_random_masks(shape):
    draw = np.random.default_rng(0)
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    masks = [blob(draw, shape), blob(draw, shape, 0.6), draw.random(shape) < 0.02, empty, full]
    masks += [np.roll(masks[0], (1, 2), (0, 1)), np.roll(masks[0], (4, 9), (0, 1))]
    scores = set()
    for true in masks:
        for predicted in masks:
            assert propagation.region_similarity(predicted, true) == pytest.approx(toolkit_j(true, predicted))
            f = propagation.contour_accuracy(predicted, true)
            assert f == pytest.approx(toolkit_f(true, predicted))
            scores.add(round(f, 3))
    assert len(scores) > 10


# ---- propagation


def dino_loop(maps, labels, near, settings):
    """label_propagation of DINO's eval_video_segmentation.py, patch by patch in float64."""
    tokens = [m.double().flatten(0, 1).numpy() for m in maps]
    tokens = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in tokens]
    first, queue, out = (tokens[0], labels.double().numpy()), [], []
    for target in tokens[1:]:
        context, present = [first, *queue], []
        for p, token in enumerate(target):
            similar = [
                (np.exp(token @ other[q] / settings.temperature), known[q])
                for other, known in context
                for q in range(len(other))
                if near[p, q]
            ]
            best = sorted(similar, key=lambda pair: -pair[0])[: settings.neighbors]
            present.append(sum(w * label for w, label in best) / sum(w for w, _ in best))
        out.append(np.stack(present))
        queue = [*queue, (target, out[-1])][-settings.context :]
    return out


@pytest.mark.parametrize("radius", [0, 24.0])
def test_labels_are_handed_on_as_by_a_loop_over_patches(radius):
    torch.manual_seed(0)
    settings = Settings(context=2, radius=radius)
    maps, labels = torch.randn(6, 5, 5, 8), torch.rand(25, 3)
    near = propagation.window(5, (40, 50), radius)
    assert near.all() == (radius == 0)
    found = list(propagation.propagate(maps, labels, near, settings))
    assert len(found) == 5
    for ours, theirs in zip(found, dino_loop(maps, labels, near, settings)):
        assert np.allclose(ours.numpy(), theirs, atol=1e-5)


def test_the_window_is_dinos_12_patches_of_60_rows_on_any_grid_and_aspect():
    near = propagation.window(60, (480, 480), 12).reshape(60, 60, 60, 60)
    assert near[30, 30].sum() == 25**2 and near[30, 30, 18:43, 18:43].all()
    near = propagation.window(30, (480, 960), 12).reshape(30, 30, 30, 30)  # as many pixels to the side as up
    assert near[15, 15].nonzero().amin(0).tolist() == [9, 12] and near[15, 15].nonzero().amax(0).tolist() == [21, 18]


def test_pixels_take_the_label_that_is_largest_of_its_own_range():
    soft = torch.tensor([[[0.9, 0.9, 0.6]], [[0.1, 0.1, 0.4]], [[0.0, 0.0, 0.0]]])
    assert propagation.hard_labels(soft, (1, 3)).tolist() == [[0, 0, 1]]


# ---- videos


class OfColors:
    """In place of Features: frames whose patch features are their mean colors, on a grid of 8 x 8."""

    def __init__(self, extractor, split, cache, batch_size):
        self.split, self.extractor, self.cache, self.batch_size, self.grid = split, extractor, cache, batch_size, 8

    def __len__(self):
        return len(self.split)

    def extract(self):
        pass

    def batches(self, state, label):
        images = [torch.nn.functional.adaptive_avg_pool2d(self.split.image(i), 8) - 0.5 for i in range(len(self))]
        yield list(range(len(self))), torch.stack(images).permute(0, 2, 3, 1)


@pytest.fixture
def videos(tmp_path, monkeypatch):
    small_datasets.davis(tmp_path, train=0, val=14)
    monkeypatch.setattr(propagation, "Features", OfColors)
    return {"val": OfColors(None, open_dataset("davis", tmp_path, "videos")["val"], None, 4)}


def test_numbers_are_means_over_objects_of_means_over_frames_but_the_first_and_last(videos, tmp_path, monkeypatch):
    predictions = []
    original = propagation.hard_labels

    def record(*args):
        predictions.append(original(*args))
        return predictions[-1]

    monkeypatch.setattr(propagation, "hard_labels", record)
    found = propagation.run(videos, Settings(), Run("raw"))
    assert len(predictions) == 2 * 5  # of 7 frames each
    objects = {}
    for video, ids, own in (("one", (255,), predictions[:5]), ("two", (1, 2), predictions[5:])):
        for channel, label in enumerate(ids, 1):
            pairs = []
            for frame, predicted in enumerate(own, 1):
                path = tmp_path / "Annotations/480p" / video / f"{frame:05d}.png"
                true = np.array(Image.open(path))
                counts = (true != 255) | (video == "one")
                pair = true == label, (predicted.numpy() == channel) & counts
                pairs.append((toolkit_j(*pair), toolkit_f(*pair)))
            objects[f"J&F/{video}/{channel}"] = np.mean(pairs, 0)
    assert {name for name in found if "/" in name} == set(objects)
    j, f = 100 * np.mean(list(objects.values()), 0)
    assert found["J"] == pytest.approx(j) and found["F"] == pytest.approx(f)
    assert found["J&F"] == pytest.approx((j + f) / 2) and found["J&F"] > 50
    assert all(found[name] == pytest.approx(100 * score.mean()) for name, score in objects.items())


def test_frames_and_strides_are_chosen_and_two_are_too_few(videos):
    every_third = propagation.run(videos, Settings(stride=3), Run("raw"))
    assert every_third == propagation.run(videos, Settings(stride=3, frames=3), Run("raw"))
    assert every_third != propagation.run(videos, Settings(frames=3), Run("raw"))
    with pytest.raises(ValueError, match="the video one has 2 frames .of 7, stride 4.: it takes 3"):
        propagation.run(videos, Settings(stride=4), Run("raw"))
    with pytest.raises(ValueError, match="neighbors and stride must be 1 or more"):
        propagation.run(videos, Settings(stride=0), Run("raw"))


def test_a_list_names_the_videos_in_either_years_form(tmp_path):
    small_datasets.davis(tmp_path / "DAVIS", train=0, val=6)
    names = {}
    for year, text in (("480p", "/JPEGImages/480p/two/00000.jpg /Annotations/480p/two/00000.png\n"), ("2017", "one\n")):
        small_datasets.write(tmp_path / "DAVIS/ImageSets" / year / "val.txt", text)
        split = open_dataset("davis", tmp_path, "videos")["val"]
        names[year] = [split.annotation(i).name for i in range(len(split))]
    assert names == {"480p": ["two"], "2017": ["one"]}
    assert len(open_dataset("davis", tmp_path, "images")["val"]) == 3


def test_a_missing_mask_and_a_first_frame_without_objects_are_named(tmp_path, videos):
    masks = tmp_path / "Annotations" / "480p"
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(masks / "one" / "00000.png")
    videos["val"].split = open_dataset("davis", tmp_path, "videos")["val"]
    with pytest.raises(ValueError, match="the first frame of the video one has no object"):
        propagation.run(videos, Settings(), Run("raw"))
    (masks / "two" / "00003.png").unlink()
    with pytest.raises(ValueError, match="there is no mask .*two/00003.png for the image .*\nExpected layout"):
        open_dataset("davis", tmp_path, "videos")
