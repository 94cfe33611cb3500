"""Segmentation where place and class are tied in what is labeled: each class is labeled on one side alone.

The classes are two groups of patches by color (k-means of the mean colors of 3 x 3 patches): no annotation is needed,
and none comes from features. Of one group the patches in the left half are labeled, of the other those in the right
half. Every other patch gets the class most frequent among its 5 nearest labeled patches, by cosine. A patch that knows
its place is nearest to patches of its own side, whatever it shows.

    wrong        of the patches whose class is labeled on the other side, those that get the wrong one, in percent: the
                 mean over both ways round and over images
    wrong/even   the same with every other patch labeled, as on a chessboard: what features do not tell of color
    images       that count: each group has 15% or more of the patches of either half

Nothing is random: all seeds give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, normalize

from timm_dvt.errors import UserError
from training.evaluate.features.cached import Features
from training.evaluate.run import Run
from training.evaluate.segmentation.knn import nearest_class

KIND = "images"
STATES = ("raw", "denoised")
NUMBERS = {"wrong": "one-sided labels, wrong %"}
MEANING = (
    "one-sided labels, wrong %: patches that get the wrong one of two classes from labels of each class on one side of "
    "the image alone; less is better."
)
LEAST = 0.15  # of a half, for a group to count there


@dataclass(frozen=True)
class Settings:
    """neighbors: of a patch among those labeled."""

    neighbors: int = 5


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """The numbers above."""
    features = data["val"]
    features.extract()
    wrong, even = [], []
    for indices, maps in features.batches(run.state, f"one-sided labels ({run.state})"):
        for image, tokens in zip(features.images(indices), maps.cpu()):
            groups = color_groups(image, features.grid)
            if counts(groups):
                wrong += wrong_shares(tokens, groups, settings.neighbors)
                even.append(even_share(tokens, groups, settings.neighbors))
    if not wrong:
        raise UserError(
            f"no image of {features.split.name} has two groups of color on both sides, {LEAST:.0%} of a half each"
        )
    return {"wrong": 100 * fmean(wrong), "wrong/even": 100 * fmean(even), "images": len(even)}


def color_groups(image: Tensor, grid: int) -> Tensor:
    """Two groups of the patches of an image (3, S, S) in [0, 1] by color: (K, K) of 0 and 1."""
    from sklearn.cluster import KMeans

    patches = avg_pool2d(adaptive_avg_pool2d(image[None], grid), 3, 1, 1, count_include_pad=False)[0]
    colors = patches.flatten(1).T.double().cpu().numpy().round(6)
    if (colors == colors[0]).all():
        return torch.zeros(grid, grid, dtype=torch.long)
    return torch.from_numpy(KMeans(2, n_init=4, random_state=0).fit_predict(colors)).long().reshape(grid, grid)


def counts(groups: Tensor) -> bool:
    """Whether both groups (K, K) lie in both halves."""
    return all(LEAST <= half.float().mean() <= 1 - LEAST for half in _halves(groups))


def labeled_patches(groups: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Masks (K, K): what is labeled, group `first` on the left and the other on the right, and what is asked for."""
    labeled, asked = torch.zeros(2, *groups.shape, dtype=torch.bool)
    for side, group in enumerate((first, 1 - first)):
        half = _halves(groups)[side]
        _halves(labeled)[side].copy_(half == group)
        _halves(asked)[side].copy_(half != group)
    return labeled, asked


def spread_labels(tokens: Tensor, groups: Tensor, labeled: Tensor, neighbors: int = 5) -> Tensor:
    """The group (K, K) of each patch of tokens (K, K, C): given where labeled, else of its nearest labeled patches."""
    bank = normalize(tokens[labeled].float())
    predicted = groups.clone()
    predicted[~labeled] = nearest_class(tokens[~labeled].float(), bank, groups[labeled], neighbors, 2)
    return predicted


def wrong_share(tokens: Tensor, groups: Tensor, first: int, neighbors: int = 5) -> float:
    """Of the patches asked for, the share that gets the wrong group."""
    labeled, asked = labeled_patches(groups, first)
    return float((spread_labels(tokens, groups, labeled, neighbors) != groups)[asked].float().mean())


def wrong_shares(tokens: Tensor, groups: Tensor, neighbors: int = 5) -> list[float]:
    """The same, both ways round."""
    return [wrong_share(tokens, groups, first, neighbors) for first in (0, 1)]


def even_share(tokens: Tensor, groups: Tensor, neighbors: int = 5) -> float:
    """The share that gets the wrong group where every other patch is labeled, as on a chessboard."""
    rows, columns = (torch.arange(side) for side in groups.shape)
    labeled = (rows[:, None] + columns) % 2 == 1
    return float((spread_labels(tokens, groups, labeled, neighbors) != groups)[~labeled].float().mean())


def _halves(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the left and the right columns; the middle one of an odd number is in neither."""
    columns = patches.shape[1] // 2
    return patches[:, :columns], patches[:, -columns:]
