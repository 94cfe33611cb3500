"""Semantic correspondence: PCK against a float64 loop, places of known maps, and what its readers refuse."""

import json

import numpy as np
import pytest
import torch

from tests.helpers import small_datasets
from training.evaluate import correspondence
from training.evaluate.correspondence import Settings
from training.evaluate.data.datasets import open_dataset
from training.evaluate.data.keypoints import PointPair
from training.evaluate.run import Run


def bilinear(maps, x, y):
    """maps (K, K, C) at fractions x, y of the image's width and height, patches' centers at their middles."""
    grid = len(maps)
    (x, y) = (min(max(v * grid - 0.5, 0), grid - 1) for v in (x, y))
    x0, y0 = min(int(x), grid - 2), min(int(y), grid - 2)
    upper = (1 - x + x0) * maps[y0, x0] + (x - x0) * maps[y0, x0 + 1]
    lower = (1 - x + x0) * maps[y0 + 1, x0] + (x - x0) * maps[y0 + 1, x0 + 1]
    return (1 - y + y0) * upper + (y - y0) * lower


def loop(source, target, pair):
    """The pixel of the target nearest to each point, pixel by pixel in float64."""
    (width, height), (wide, high), found = pair.size, pair.target_size, []
    for x, y in pair.points.tolist():
        token = bilinear(source, (x + 0.5) / width, (y + 0.5) / height)
        similar = {}
        for row in range(high):
            for column in range(wide):
                other = bilinear(target, (column + 0.5) / wide, (row + 0.5) / high)
                similar[column, row] = token @ other / np.linalg.norm(token) / np.linalg.norm(other)
        found.append(max(similar, key=similar.get))
    return np.array(found, float)


def pair_of(points, target_points, size=(20, 14), target_size=(13, 18), extent=10.0, category="bird"):
    points, target_points = (torch.tensor(p).float() for p in (points, target_points))
    return PointPair("target", points, target_points, size, target_size, extent, category)


def test_points_go_to_the_pixel_that_a_loop_over_pixels_says():
    source, target = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    pair = pair_of([[0, 0], [19, 13], [7, 5], [10.5, 3.25]], torch.zeros(4, 2).tolist())
    found = correspondence.nearest_places(source, target, pair)
    assert np.allclose(found, loop(source.double().numpy(), target.double().numpy(), pair), atol=1e-4)


def test_a_map_is_found_in_itself_at_any_size_of_the_search_grid():
    maps = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(0))
    points = [[10.0, 30.0], [40.0, 3.0], [33.0, 17.0]]
    pair = pair_of(points, points, (64, 40), (64, 40))
    assert torch.equal(correspondence.nearest_places(maps, maps, pair), pair.points)
    coarse = correspondence.nearest_places(maps, maps, pair, 32)
    assert (coarse - pair.points).abs().max() <= 1.0


class Planted:
    """In place of Features: maps by the names of images."""

    def __init__(self, extractor, split, cache, batch_size):
        self.split, self.extractor, self.cache, self.batch_size = split, extractor, cache, batch_size

    def __len__(self):
        return len(self.split)

    def extract(self):
        pass

    def maps(self, indices, state):
        draws = [torch.Generator().manual_seed(len(str(self.split.images[i])) + i) for i in indices]
        return torch.stack([torch.randn(8, 8, 12, generator=draw) for draw in draws])


@pytest.mark.parametrize("dataset", ["spair", "pfpascal"])
def test_pck_is_that_of_a_loop_over_pairs_and_points(dataset, tmp_path, monkeypatch):
    getattr(small_datasets, dataset)(tmp_path, train=0, val=4)
    split = open_dataset(dataset, tmp_path, "points")["val"]
    monkeypatch.setattr(correspondence, "Features", Planted)
    places = []
    original = correspondence.nearest_places

    def record(*args):
        places.append(original(*args))
        return places[-1]

    monkeypatch.setattr(correspondence, "nearest_places", record)
    settings = Settings(alpha=0.6, search_size=16)
    found = correspondence.run({"val": Planted(None, split, None, 4)}, settings, Run("raw"))
    per_image, points = [], []
    for i, predicted in enumerate(places):
        pair = split.annotation(i)
        if dataset == "spair":
            record = json.loads((tmp_path / f"PairAnnotation/test/{i:06d}-{i}s-{i}t:bird.json").read_text())
            x0, y0, x1, y1 = record["trg_bndbox"]
            extent = max(x1 - x0, y1 - y0)
        else:
            extent = small_datasets.SIZE
        right = []
        for (x, y), (true_x, true_y) in zip(predicted.double().tolist(), pair.target_points.tolist()):
            right.append(((x - true_x) ** 2 + (y - true_y) ** 2) ** 0.5 <= 0.6 * extent)
        per_image.append(sum(right) / len(right))
        points += right
    assert len(places) == 4 and 0 < sum(points) < len(points)
    assert found["PCK/image"] == pytest.approx(100 * sum(per_image) / 4)
    assert found["PCK/point"] == pytest.approx(100 * sum(points) / len(points))
    assert found[f"PCK/image/{'bird' if dataset == 'spair' else 3}"] == pytest.approx(found["PCK/image"])


def test_per_image_and_per_point_differ_where_pairs_have_more_points_or_fewer(monkeypatch):
    maps = torch.eye(64).reshape(8, 8, 64)
    spots = [[4.0, 4.0], [12.0, 4.0], [4.0, 12.0], [60.0, 60.0]]
    pairs = [
        pair_of(spots, spots, (64, 64), (64, 64)),
        pair_of(spots[:1], [[60.0, 60.0]], (64, 64), (64, 64), category="cat"),
    ]
    monkeypatch.setattr(Planted, "maps", lambda self, indices, state: torch.stack([maps] * len(indices)))
    monkeypatch.setattr(correspondence, "Features", Planted)
    split = correspondence.Split("planted", ["a", "b"], (), pairs.__getitem__)
    found = correspondence.run({"val": Planted(None, split, None, 1)}, Settings(), Run("raw"))
    assert found == {"PCK/image": 50.0, "PCK/point": 80.0, "PCK/image/bird": 100.0, "PCK/image/cat": 0.0}


def test_the_layout_says_which_pairs_and_without_it_all_are_taken(tmp_path):
    small_datasets.spair(tmp_path / "SPair-71k", train=0, val=3)
    listing = tmp_path / "SPair-71k/Layout/large/test.txt"
    listing.write_text(listing.read_text().splitlines()[1])
    assert [p.name for p in open_dataset("spair", tmp_path, "points")["val"].images] == ["1s.jpg"]
    assert len(open_dataset("spair", tmp_path, "images")["val"]) == 2
    listing.unlink()
    assert len(open_dataset("spair", tmp_path, "points")["val"]) == 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"src_kps": [[1, 2]]}, "must have the same points .N, 2., got .1, 2. and .5, 2."),
        ({"trg_bndbox": [1, 2, 3]}, "the points or the box of 0s.jpg and 0t.jpg"),
        ({"src_kps": [], "trg_kps": []}, "must have the same points"),
        ({"trg_imname": "none.jpg"}, "no file .*none.jpg.*\nExpected layout"),
    ],
)
def test_an_annotation_that_cannot_be_is_named(change, message, tmp_path):
    small_datasets.spair(tmp_path, train=0, val=1)
    path = tmp_path / "PairAnnotation/test/000000-0s-0t:bird.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        open_dataset("spair", tmp_path, "points")
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not an annotation of SPair-71k"):
        open_dataset("spair", tmp_path, "points")


def test_a_list_of_other_columns_is_named(tmp_path):
    small_datasets.pfpascal(tmp_path, train=0, val=1)
    path = tmp_path / "PF-dataset-PASCAL/test_pairs_pf_pascal.csv"
    path.write_text(path.read_text().replace("XA", "X1"))
    with pytest.raises(ValueError, match="is not a list of source_image,.*KeyError: 'XA'"):
        open_dataset("pfpascal", tmp_path, "points")
