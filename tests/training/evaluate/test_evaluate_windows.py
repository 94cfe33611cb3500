"""Sliding windows, padding, crops and augmentation against loops, other libraries and cases worked out by hand."""

import colorsys
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from training.evaluate.data import augment
from training.evaluate.segmentation.windows import (
    pad_below,
    patch_padding,
    resize_labels,
    scaled_size,
    slide,
    window_places,
)


def draw(seed=0):
    return np.random.default_rng(seed)


# ---- windows


@pytest.mark.parametrize("length", [1, 340, 341, 511, 512, 513, 682, 683, 853, 854, 1024, 2048])
def test_windows_cover_a_side_at_the_stride_and_end_with_it(length):
    places = window_places(length, 512, 341)
    assert places[0][0] == 0 and places[-1][1] == length
    assert all(stop - start == min(512, length) for start, stop in places)
    assert all(start == 341 * i for i, (start, _) in enumerate(places[:-1]))
    assert len(places) == 1 + max(0, math.ceil((length - 512) / 341))


def test_a_slide_is_the_mean_over_windows_pixel_by_pixel():
    images = torch.randn(2, 3, 13, 22)

    def predict(crops):  # depends on where in its window a pixel lies, and on all of the window
        places = torch.arange(crops.shape[-2])[:, None] * 10 + torch.arange(crops.shape[-1])
        return torch.cat([crops * places, crops.sum((1, 2, 3), keepdim=True).expand(-1, 1, *crops.shape[-2:])], 1)

    window, stride = 7, 4
    want, counts = torch.zeros(2, 4, 13, 22, dtype=torch.float64), torch.zeros(13, 22)
    tops, lefts = [0, 4, 6], [0, 4, 8, 12, 15]
    for top in tops:
        for left in lefts:
            for n in range(2):
                found = predict(images[n : n + 1, :, top : top + window, left : left + window])[0]
                for y in range(window):
                    for x in range(window):
                        want[n, :, top + y, left + x] += found[:, y, x]
                        counts[top + y, left + x] += n
    for batch_size in (1, 5, 64):
        found = slide(images, predict, window, stride, batch_size)
        assert torch.allclose(found.double(), want / counts, atol=1e-4)


def test_a_small_image_is_one_window_of_its_own_size():
    seen = []
    slide(torch.randn(1, 3, 5, 30), lambda crops: seen.append(tuple(crops.shape)) or crops, 8, 6, 1)
    assert set(seen) == {(1, 3, 5, 8)}


# ---- sizes and padding


@pytest.mark.parametrize(
    "size, want",
    [
        ((375, 500), (512, 683)),  # VOC: 500 * 512 / 375 = 682.7
        ((500, 375), (683, 512)),
        ((1024, 2048), (512, 1024)),
        ((200, 1000), (410, 2048)),  # the long side is the limit: 200 * 2.048 = 409.6
        ((512, 512), (512, 512)),
    ],
)
def test_the_short_side_is_512_unless_the_long_one_would_be_over_2048(size, want):
    assert scaled_size(size, 2048, 512) == want


def test_keep_ratio_512_gives_the_long_side_512():
    assert scaled_size((375, 500), 512, 512) == (384, 512)


def test_512_is_padded_by_3_to_518_and_odd_pixels_go_right_and_below():
    assert patch_padding((512, 512), 14) == (3, 3, 3, 3)
    assert patch_padding((480, 640), 14) == (2, 2, 5, 5)  # 644, 490
    assert patch_padding((5, 3), 8) == (2, 3, 1, 2)
    assert patch_padding((512, 64), 16) == (0, 0, 0, 0)


def test_what_is_missing_is_added_below_and_to_the_right():
    found = pad_below(torch.ones(2, 3), (3, 3), 255)
    assert found.tolist() == [[1, 1, 1], [1, 1, 1], [255, 255, 255]]
    assert pad_below(torch.ones(4, 4), (2, 2), 0).shape == (4, 4)


@pytest.mark.parametrize("size", [(3, 9), (40, 31), (12, 10)])
def test_labels_are_resized_to_the_nearest_by_flooring(size):
    labels = torch.randint(0, 255, (12, 10), dtype=torch.uint8)
    want = interpolate(labels[None, None].double(), size, mode="nearest")[0, 0]
    assert torch.equal(resize_labels(labels, size).double(), want)


# ---- crops


def share_of_most(mask):
    values, counts = np.unique(mask, return_counts=True)
    counts = counts[values != 255]
    return counts.max() / counts.sum() if len(counts) > 1 else 1.0


def test_crops_have_no_class_of_three_quarters_where_that_can_be():
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[:, 30:], mask[50:] = 1, 255
    # 9 of 41 columns will do, 16 to 24; eleven tries miss them all with probability (32 / 41)^11 = 0.065.
    starts = []
    for seed in range(40):
        rows, columns = augment.crop_with_many_classes(mask, (20, 20), 0.75, draw(seed))
        assert mask[rows, columns].shape == (20, 20)
        assert (share_of_most(mask[rows, columns]) < 0.75) == (16 <= columns.start <= 24)
        starts.append(columns.start)
    assert sum(16 <= start <= 24 for start in starts) >= 30 and len(set(starts)) > 6


def test_the_crop_rule_tries_ten_times_and_then_takes_what_comes():
    class Counting:
        calls = 0

        def integers(self, high):
            Counting.calls += 1
            return 0

    assert augment.crop_with_many_classes(torch.zeros(9, 9, dtype=torch.uint8), (4, 4), 0.75, Counting())
    assert Counting.calls == 2 * 11
    mask = torch.tensor([[0, 0, 0, 1], [255] * 4], dtype=torch.uint8)  # exactly three quarters, ignored pixels left out
    Counting.calls = 0
    augment.crop_with_many_classes(mask, (2, 4), 0.75, Counting())
    assert Counting.calls == 22
    mask[0, 2] = 1
    Counting.calls = 0
    augment.crop_with_many_classes(mask, (2, 4), 0.75, Counting())
    assert Counting.calls == 2


# ---- augmentation


def test_saturation_and_hue_are_those_of_hsv_and_order_follows_the_draw():
    image = torch.rand(3, 4, 5)
    for factor in (0.5, 1.0, 1.4):
        found = augment.saturate(image, factor)
        for pixel, want in zip(found.flatten(1).T.tolist(), image.flatten(1).T.tolist()):
            hue, saturation, value = colorsys.rgb_to_hsv(*want)
            assert pixel == pytest.approx(colorsys.hsv_to_rgb(hue, min(1, factor * saturation), value), abs=1e-5)
    gray = torch.full((3, 2, 2), 0.4)
    assert torch.allclose(augment.saturate(gray, 1.5), gray) and not augment.saturate(0 * gray, 1.5).any()


def test_photometric_distortion_follows_the_seed_and_leaves_one_image_in_sixteen_alone():
    image = torch.rand(3, 8, 8)
    same = 0
    for seed in range(160):
        found = augment.photometric_distortion(image, draw(seed))
        assert torch.equal(found, augment.photometric_distortion(image, draw(seed)))
        assert found.min() >= 0 and found.max() <= 1
        same += torch.allclose(found, image, atol=1e-6)
    assert 3 <= same <= 20  # 160 / 16 = 10


def test_recolor_is_a_power_of_values_up_to_255():
    class Fixed:
        def random(self):
            return 0.0

        def uniform(self, low, high, size=None):
            return high if size is None else np.array([0.9, 1.0, 1.1])

    image = torch.rand(3, 4, 4) / 4
    want = (image.double() * 255) ** 1.1 * 1.25 * torch.tensor([0.9, 1.0, 1.1]).view(3, 1, 1)
    assert torch.allclose(augment.recolor(image, Fixed()).double(), want.clamp(0, 255) / 255, atol=1e-5)


def test_image_and_depth_turn_together():
    image = torch.zeros(3, 41, 61)
    image[:, 20:, :] = 1
    for seed in range(20):
        turned, depth = augment.turn(image, 5 * image[0], draw(seed))
        agree = (turned[0] - depth / 5).abs()[4:-4, 4:-4]
        assert agree.mean() < 0.02  # bilinear and nearest differ at the edge alone
    assert not torch.equal(augment.turn(image, image[0], draw(1))[0], augment.turn(image, image[0], draw(2))[0])


def test_normalization_is_imagenets():
    image = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) + torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(augment.normalize(image), torch.ones(3, 1, 1), atol=1e-3)


def test_the_first_beta_falls_and_rises_in_one_cycle():
    betas = [augment.one_cycle(step, 1000) for step in range(1000)]
    assert betas[0] == pytest.approx(0.95) and betas[-1] == pytest.approx(0.95)
    assert min(betas) == pytest.approx(0.85) and betas.index(min(betas)) == 299
    want = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1.0), 1.0, total_steps=1000
    )
    for beta in betas[:999]:
        assert beta == pytest.approx(want.optimizer.param_groups[0]["betas"][0])
        want.optimizer.step()
        want.step()
