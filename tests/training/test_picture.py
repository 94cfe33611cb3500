"""The picture of the README, through its command: its size, and the example by the rule that it states."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot

from tests.helpers import small_datasets
from training import picture

ARGS = {"img_size": 64, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 0}


def photograph(seed, horizon=0.5):
    """Sky above land, with things in both."""
    draw = np.random.default_rng(seed)
    image = draw.integers(0, 40, (16, 16, 3)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
    image[: int(64 * horizon), :, 2] += 200
    image[int(64 * horizon) :, :, 1] += 150
    return Image.fromarray(image)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        photograph(seed, 0.3 + 0.1 * seed).save(tmp_path / "photos" / f"{seed}.png")
    return tmp_path / "photos"


def test_the_command_draws_both_rows_and_prints_what_they_say(folder, tmp_path, capsys):
    model = small_datasets.saved_model(tmp_path / "model", ARGS)
    words = ["--images", str(folder), "--number", "4", "--model", model]
    assert picture.main([*words, "--out", str(tmp_path / "one.png")]) == 0
    assert picture.main([*words, "--examples", str(folder), "--out", str(tmp_path / "two.png")]) == 0
    printed = capsys.readouterr().out
    assert "labels on one side, 4 photographs:" in printed and ".png is drawn" in printed
    one, two = (Image.open(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert one.width == two.width == 2 * 838 and two.height > 1.9 * one.height
    assert np.array_equal(np.asarray(one), np.asarray(two)[: one.height])


class Extractor:
    """Features by the file: raw ones know the place to a degree, denoised ones the content alone."""

    class reader:
        grid = 8

    def __init__(self, leaks):
        self.leaks = iter(leaks)

    def resize(self, image):
        return image

    def backbone(self, images):
        groups = picture.color_groups(images[0], 8)
        content = one_hot(groups, 2).float()
        columns = torch.linspace(0, 3, 8).expand(8, 8)
        place = torch.stack([columns.cos(), columns.sin()], -1)
        self.content = torch.cat([content, torch.zeros(8, 8, 2)], -1)
        return {"raw": (self.content + next(self.leaks) * torch.cat([torch.zeros(8, 8, 2), place], -1))[None]}

    def denoise(self, raw, images):
        return self.content[None]


def test_the_example_is_where_the_gain_is_largest_and_the_mean_is_over_all(tmp_path):
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for seed, path in enumerate(files):
        photograph(seed).save(path)
    # b knows its place best, and still tells colors apart.
    found = picture.find_example(Extractor([0.2, 1.2, 0.1]), files)
    assert (found.name, found.count, found.wrong[1]) == ("b.png", 3, 0.0) and found.wrong[0] > 0
    assert found.means[:2] == pytest.approx((found.wrong[0] / 3, 0), abs=0.02)
    given = (found.labels != 255).any(-1)
    sides = (
        {tuple(color) for color in found.labels[:, :4][given[:, :4]]},
        {tuple(color) for color in found.labels[:, 4:][given[:, 4:]]},
    )
    assert all(len(colors) == 1 for colors in sides) and sides[0] != sides[1]
