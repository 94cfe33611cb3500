"""Semantic correspondence by nearest neighbors, without any training: PCK@0.10, as for SPair-71k (Min et al., 2019).

A point of the source image takes the place of the target image whose features are nearest to its own by cosine, both
maps interpolated bilinearly between patches. It is right within alpha times the longer side of the target's object
(SPair-71k), or of the target image (PF-Pascal):

    |found - true| <= alpha max(h, w)

PCK per image is the mean over pairs of the share of their points that are right, PCK per point the share of all points,
in percent. Images are resized to a square, as in all of these tasks; distances are of the target's own pixels. Nothing
is random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from timm_dvt.bars import tqdm
from training.evaluate.data.keypoints import PointPair
from training.evaluate.data.splits import Split
from training.evaluate.features.cached import Features
from training.evaluate.run import Run
from training.evaluate.segmentation.score import upsample

KIND = "points"
STATES = ("raw", "denoised")
NUMBERS = {"PCK/image": "PCK per image", "PCK/point": "PCK per point"}
MEANING = "PCK@0.10: points of one image found in another by the nearest features, in percent; more is better."


@dataclass(frozen=True)
class Settings:
    """The field's protocol.

    Attributes:
        alpha: how far off a point may be, as a part of the object's or image's longer side.
        search_size: side of the grid of places of the target that are looked at; 0 for every pixel.
    """

    alpha: float = 0.1
    search_size: int = 0


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """PCK/image, PCK/point, and PCK/image/CLASS of each class, in percent."""
    sources = data["val"]
    pairs = [sources.split.annotation(i) for i in range(len(sources))]
    images = dict.fromkeys([*sources.split.images, *(pair.target for pair in pairs)])
    every = Split(f"images of {sources.split.name}", list(images), (), lambda i: None)
    features = Features(sources.extractor, every, sources.cache, sources.batch_size)
    features.extract()
    place = {path: number for number, path in enumerate(images)}
    right = []
    for path, pair in zip(tqdm(sources.split.images, desc=f"pairs ({run.state})", leave=False), pairs):
        first, second = features.maps([place[path], place[pair.target]], run.state)
        predicted = nearest_places(first, second, pair, settings.search_size).cpu()
        distance = (predicted - pair.target_points).norm(dim=1)
        right.append((distance <= settings.alpha * pair.extent).double())
    shares: dict[str, list[float]] = {}
    for pair, hits in zip(pairs, right):
        shares.setdefault(pair.category, []).append(100 * float(hits.mean()))
    every_share = sum(shares.values(), [])
    return {
        "PCK/image": sum(every_share) / len(every_share),
        "PCK/point": 100 * float(torch.cat(right).mean()),
        **{f"PCK/image/{name}": sum(values) / len(values) for name, values in sorted(shares.items())},
    }


def nearest_places(source: Tensor, target: Tensor, pair: PointPair, search_size: int = 0) -> Tensor:
    """Where the points of a pair are in its target: (N, 2) x, y in pixels.

    Args:
        source, target: features (K, K, C) of the two images.
        pair: of them.
        search_size: as in `Settings`.
    """
    maps = [features.permute(2, 0, 1)[None] for features in (source, target)]
    # A pixel's center is half a pixel from its corner, for the points as for the upsampled map.
    places = (pair.points.to(source) + 0.5) / torch.tensor(pair.size).to(source) * 2 - 1
    tokens = grid_sample(maps[0], places[None, None], padding_mode="border", align_corners=False)[0, :, 0].T
    width, height = (search_size, search_size) if search_size else pair.target_size
    pixels = upsample(maps[1], (height, width))[0].flatten(1)
    best = (normalize(tokens) @ normalize(pixels, dim=0)).argmax(1)
    predicted = torch.stack([best % width, best // width], 1) + 0.5
    return predicted / torch.tensor([width, height]).to(predicted) * torch.tensor(pair.target_size).to(predicted) - 0.5
