"""Outlier tokens: norms that stand out, by a cut in their histogram and without one, and where they lie."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch

from timm_dvt.calibration.positions import PositionSums, Windows
from timm_dvt.inspection.estimates import jackknife, position_share, products_of
from timm_dvt.inspection.results import Estimate, Outliers

BIN = 0.05  # of the logarithm of norms
LEAST_MODE = 3  # tokens above an empty bin that make a second mode of the histogram
TINY = 1e-12  # a norm below it is taken for it
DRAWS = 10  # of log-normal norms, for what chance gives


def histogram(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts over the logarithms of norms."""
    logs = np.log(np.maximum(norms, TINY))
    low, high = np.floor(logs.min() / BIN), np.floor(logs.max() / BIN) + 1
    edges = np.arange(low, high + 1) * BIN
    return np.exp(edges), np.histogram(logs, edges)[0]


def cut_of(norms: np.ndarray) -> float | None:
    """The emptiest place of the histogram of (N,) norms above its mode, with a second mode behind it; else None.

    The valley is the lowest bin that a mode of twice its height, and of more than its noise, lies above; of several,
    the middle one of the widest row of them.
    """
    edges, counts = histogram(norms)
    behind = np.maximum.accumulate(counts[::-1])[::-1]  # the largest count from here on
    valley = (behind >= 2 * counts) & (behind - counts >= LEAST_MODE * np.sqrt(counts + 1))
    valley[: int(counts.argmax()) + 1] = False
    if not valley.any():
        return None
    lowest = valley & (counts == counts[valley].min())
    starts = np.flatnonzero(np.diff(np.concatenate([[0], lowest.astype(int), [0]])))
    first, last = max(zip(starts[::2], starts[1::2]), key=lambda run: run[1] - run[0])
    return float((edges[first] * edges[last]) ** 0.5)


def robust_cut_of(norms: np.ndarray) -> float:
    """Where of (N,) norms, log-normal as by median and median absolute deviation, one would lie beyond by chance."""
    logs = np.log(norms)
    median = np.median(logs)
    spread = np.median(np.abs(logs - median)) / NormalDist().inv_cdf(0.75)
    return float(np.exp(median + spread * NormalDist().inv_cdf(1 - 1 / max(len(norms), 2))))


def outliers_of(norms: np.ndarray, content: np.ndarray, images: Sequence[int]) -> tuple[Outliers, np.ndarray]:
    """What there is to tell, and how often each place held one, (H, W).

    Args:
        norms: (V, H, W) of tokens. content: (V, H, W) how much the pixels of a patch vary.
        images: (V,) numbers of the images that the views are of.
    """
    norms = np.maximum(norms.astype(np.float64), TINY)
    cut, robust = cut_of(norms.ravel()), robust_cut_of(norms.ravel())
    above = norms > (cut if cut is not None else np.inf)
    beyond = norms > robust
    group = np.unique(np.asarray(images), return_inverse=True)[1]
    by_chance = _by_chance(norms)
    chosen = above if above.any() else beyond
    where = _where(chosen, content, group) if len(set(group[chosen.any((1, 2))])) > 1 else None
    outliers = Outliers(
        share=_mean(above, group, by_chance),
        cut=cut,
        robust_share=_mean(beyond, group, 1 / norms.size),
        robust_cut=robust,
        count=int(above.sum()),
        robust_count=int(beyond.sum()),
        patches=norms.size,
        ratio=float(np.median(norms[above]) / np.median(norms)) if above.any() else 1.0,
        border=where[0] if where else None,
        place=where[1] if where else None,
        low_content=where[2] if where else None,
    )
    return outliers, chosen.mean(0)


def _by_chance(norms: np.ndarray) -> float:
    """The largest share that `cut_of` finds in log-normal norms of the same number, median and spread."""
    logs = np.log(norms)
    median, spread = np.median(logs), np.median(np.abs(logs - np.median(logs))) / NormalDist().inv_cdf(0.75)
    draw, shares = np.random.default_rng(0), [0.0]
    for _ in range(DRAWS):
        drawn = np.exp(median + spread * draw.standard_normal(min(norms.size, 50_000)))
        cut = cut_of(drawn)
        shares.append(float((drawn > cut).mean()) if cut is not None else 0.0)
    return max(shares)


def _mean(mask: np.ndarray, group: np.ndarray, chance: float) -> Estimate:
    """The mean of a (V, H, W) mask, with its error from image to image."""
    shares = mask.mean((1, 2))

    def mean(kept: Sequence[int]) -> float:
        return float(shares[np.isin(group, kept)].mean())

    return Estimate(*jackknife(mean, int(group.max()) + 1), chance)


def _where(
    mask: np.ndarray, content: np.ndarray, group: np.ndarray
) -> tuple[Estimate, Estimate | None, Estimate | None]:
    """Border, place and low content of `Outliers`."""
    groups = int(group.max()) + 1
    ring = np.ones(mask.shape[1:], bool)
    ring[1:-1, 1:-1] = False
    parts = [(mask[group == index] & ring).sum() for index in range(groups)]
    wholes = [mask[group == index].sum() for index in range(groups)]

    def fraction(kept: Sequence[int]) -> float:
        whole = sum(wholes[index] for index in kept)
        return float(sum(parts[index] for index in kept) / whole) if whole else 0.0

    border = Estimate(*jackknife(fraction, groups), float(ring.mean()))
    place = _place(mask, group) if groups > 2 else None  # an error is estimated by leaving one out
    return border, place, _low_content(mask, content, group)


def _place(mask: np.ndarray, group: np.ndarray) -> Estimate | None:
    folds = min(8, int(group.max()) + 1)
    sums = PositionSums(Windows.whole(), folds, directions=False)
    for view, image in zip(torch.from_numpy(mask.astype(np.float32)), group):
        sums.add(view[None, ..., None], int(image) % folds)
    maps, weights, variances = sums.of_groups()
    return position_share(products_of(maps), weights, variances)


def _low_content(mask: np.ndarray, content: np.ndarray, group: np.ndarray) -> Estimate | None:
    """Mann and Whitney's probability, of views that have both kinds of patches."""
    wins, weights, of = [], [], []
    for view, varies, image in zip(mask, content, group):
        inside, outside = varies[view], np.sort(varies[~view])
        if len(inside) and len(outside):
            less = 1 - np.searchsorted(outside, inside, "right") / len(outside)
            tied = (np.searchsorted(outside, inside, "right") - np.searchsorted(outside, inside, "left")) / len(outside)
            wins.append(float((less + tied / 2).sum()))
            weights.append(len(inside))
            of.append(int(image))
    places = sorted(set(of))
    if len(places) < 2:
        return None

    def probability(kept: Sequence[int]) -> float:
        images = {places[index] for index in kept}
        some = [view for view, image in enumerate(of) if image in images]
        return sum(wins[view] for view in some) / sum(weights[view] for view in some)

    return Estimate(*jackknife(probability, len(places)), 0.5)
