"""Views: what the paper asks of them, and that coordinates and pixels agree."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.common.views import (
    Views,
    patch_centers,
    render_views,
    sample_views,
    shrink_for_views,
    view_axes,
    whole_view,
)


def coordinate_image(height: int, width: int) -> torch.Tensor:
    """(3, H, W): red is x, green is y of each pixel's center, as fractions of the image."""
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.zeros(height, width)])


def test_areas_aspects_and_flips_are_the_papers():
    views = sample_views(4000, (2000, 2000), seed=3)
    width, height = (views.boxes[:, 2] - views.boxes[:, 0]), (views.boxes[:, 3] - views.boxes[:, 1])
    area, aspect = width * height, width / height
    assert 0.0985 < float(area.min()) < 0.11 and 0.49 < float(area.max()) < 0.5015
    assert abs(float(area.mean()) - 0.3) < 0.01
    assert 0.745 < float(aspect.min()) < 0.77 and 1.31 < float(aspect.max()) < 1.34
    assert abs(float(views.flips.double().mean()) - 0.5) < 0.03
    assert float(views.boxes.min()) >= 0 and float(views.boxes.max()) <= 1


def test_a_view_is_the_same_however_many_are_drawn():
    few, many = sample_views(5, (300, 400), seed=7), sample_views(500, (300, 400), seed=7)
    assert torch.equal(few.boxes, many[:5].boxes) and torch.equal(few.flips, many[:5].flips)
    assert not torch.equal(few.boxes, sample_views(5, (300, 400), seed=8).boxes)


def test_boxes_lie_between_pixels():
    views = sample_views(50, (37, 91))
    pixels = views.boxes * torch.tensor([91.0, 37.0, 91.0, 37.0])
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(300, 500), (64, 48), (1200, 900)])
def test_patch_means_of_coordinate_images_are_the_patch_centers(size):
    image, views = coordinate_image(*size), sample_views(24, size, seed=1)
    rendered = render_views(image, views, 112)
    means = torch.nn.functional.avg_pool2d(rendered, 16)  # (V, 3, 7, 7)
    xs, ys = view_axes(views, patch_centers(112, 16, 16))
    sides = views.boxes[:, 2:] - views.boxes[:, :2]
    # In patches of the view: a hundredth inside; at the border resizing repeats the outermost pixels.
    off_x = (means[:, 0] - xs[:, None, :]) / (sides[:, 0, None, None] / 7)
    off_y = (means[:, 1] - ys[:, :, None]) / (sides[:, 1, None, None] / 7)
    assert float(off_x[:, :, 1:-1].abs().max()) < 0.01 and float(off_y[:, 1:-1].abs().max()) < 0.01
    assert float(off_x.abs().max()) < 0.1 and float(off_y.abs().max()) < 0.1


def test_rendering_agrees_with_pillow():
    image = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    views = sample_views(6, (90, 120), seed=2)
    rendered = render_views(image, views, 32)
    for index, (box, flip) in enumerate(zip(views.boxes, views.flips)):
        pixels = [round(v) for v in (box * torch.tensor([120.0, 90.0, 120.0, 90.0])).tolist()]
        for channel in range(3):
            plane = Image.fromarray(image[channel].numpy()).crop(pixels).resize((32, 32), Image.BILINEAR)
            if flip:
                plane = plane.transpose(Image.FLIP_LEFT_RIGHT)
            expected = torch.from_numpy(np.array(plane))
            torch.testing.assert_close(rendered[index, channel], expected, rtol=0, atol=1e-5)


def test_dense_strides_have_the_papers_count_and_centers():
    centers = patch_centers(28, 14, 7)
    assert centers.tolist() == [7 / 28, 14 / 28, 21 / 28]


def test_a_flipped_view_runs_from_right_to_left():
    box = torch.tensor([[0.2, 0.1, 0.6, 0.5]], dtype=torch.float64)
    xs, ys = view_axes(Views(box, torch.tensor([True])), patch_centers(64, 16, 16))
    torch.testing.assert_close(xs[0], torch.tensor([0.55, 0.45, 0.35, 0.25], dtype=torch.float64))
    torch.testing.assert_close(ys[0], torch.tensor([0.15, 0.25, 0.35, 0.45], dtype=torch.float64))


def test_huge_images_are_shrunk_without_losing_what_views_show():
    image = coordinate_image(3000, 300)
    small = shrink_for_views(image, 64, (0.1, 0.5), (3 / 4, 4 / 3))
    assert small.shape == (3, 234, 234)
    views = sample_views(8, (234, 234))
    assert shrink_for_views(small, 64, (0.1, 0.5), (3 / 4, 4 / 3)) is small
    difference = render_views(small, views, 64) - render_views(coordinate_image(234, 234), views, 64)
    assert float(difference[..., 4:-4, 4:-4].abs().max()) < 5e-3


def test_the_whole_view_is_the_whole_image():
    image = torch.rand(3, 20, 30)
    torch.testing.assert_close(
        render_views(image, whole_view(), 10),
        torch.nn.functional.interpolate(image[None], (10, 10), mode="bilinear", antialias=True),
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": 0},
        {"area": (0.0, 0.5)},
        {"area": (0.5, 0.1)},
        {"area": (0.5, 1.5)},
        {"aspect": (2, 1)},
        {"flip": 1.5},
    ],
)
def test_impossible_views_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        sample_views(**{"count": 3, "image_size": (10, 10), **arguments})
