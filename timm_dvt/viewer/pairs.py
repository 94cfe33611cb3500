"""How two maps of one image are shown beside each other: the look of the demo's picture and of the page."""

from collections.abc import Sequence

import numpy as np

from timm_dvt.viewer.colors import PALETTE, cluster_labels, fit_projection, heat, matched_labels, norms, similarity

Pair = tuple[np.ndarray, np.ndarray]  # denoiser off and on
Scale = tuple[float, float]  # the values at the two ends of the color scale
CLUSTERS = 6
FLAT = 0.2  # of the other map's contrast, below which a map shows its own on that scale, and no groups
WORDS = {
    "colors": ("features as colors", "their three principal components"),
    "groups": ("features in groups", "{clusters} clusters (k-means)"),
    "lengths": ("length of the features", "their norm"),
    "similarities": ("similarity", "to the patch with the red frame"),
    "removed": ("what the denoiser removed", "off minus on: colors, length"),
}


def colors(off: np.ndarray, on: np.ndarray) -> Pair:
    """Two (H, W, C) maps as colors (H, W, 3) in [0, 1], each by its own three principal components.

    On a common projection a pattern that one of them has and the other has not would be hidden. Those of the denoised
    map take the order and signs of the raw ones that they are most alike. A map with little contrast of its own, of a
    plain wall say, is not stretched to full colors.
    """
    first = fit_projection(off)
    second = fit_projection(on).matched_to(first, on, off)
    return (
        first.no_narrower_than(second, FLAT).colors(off),
        second.no_narrower_than(first, FLAT).colors(on),
    )


def groups(off: np.ndarray, on: np.ndarray, clusters: int = CLUSTERS) -> Pair:
    """The k-means clusters of each map as colors (H, W, 3), named so that most patches keep their color.

    Raises:
        ValueError: not between 1 and 10 clusters.
    """
    spreads = [float((one - one.mean((0, 1))).std()) for one in (off, on)]
    counts = [clusters if spread > FLAT * max(spreads) else 1 for spread in spreads]
    first = cluster_labels(off, counts[0])
    return PALETTE[first], PALETTE[matched_labels(cluster_labels(on, counts[1]), first)]


def lengths(off: np.ndarray, on: np.ndarray) -> tuple[Pair, Scale]:
    """The norms of both maps as colors (H, W, 3) on one scale."""
    return _heated(norms(off), norms(on))


def have_one_length(off: np.ndarray, on: np.ndarray) -> bool:
    """Whether the tokens of both maps are as long as each other, to a thousandth: a denoiser that keeps lengths."""
    return np.allclose(norms(off), norms(on), rtol=1e-3)


def similarities(off: np.ndarray, on: np.ndarray, patch: tuple[int, int]) -> tuple[Pair, Scale]:
    """The cosine similarity of every patch to one (row, column), as colors (H, W, 3) on one scale."""
    return _heated(similarity(off, patch), similarity(on, patch))


def removed(off: np.ndarray, on: np.ndarray) -> tuple[Pair, Scale]:
    """Off minus on, as colors of its three principal components and by its length: two pictures (H, W, 3)."""
    difference = off - on
    scale = scale_of([norms(difference)])
    return (fit_projection(difference).colors(difference), heat(norms(difference), *scale)), scale


def center(features: np.ndarray) -> tuple[int, int]:
    """Row and column of the patch in the middle of a (H, W, C) map."""
    return features.shape[0] // 2, features.shape[1] // 2


def _heated(off: np.ndarray, on: np.ndarray) -> tuple[Pair, Scale]:
    scale = scale_of([off, on])
    return (heat(off, *scale), heat(on, *scale)), scale


def scale_of(values: Sequence[np.ndarray]) -> Scale:
    """What the ends of a color scale stand for: the first and last percentile of all values.

    A few outlier tokens must not decide the contrast of all others.
    """
    low, high = np.percentile(np.concatenate([v.ravel() for v in values]), (1, 99))
    return float(low), float(high)
