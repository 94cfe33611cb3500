"""How two maps of one image are shown beside each other: the look of the demo's picture and of the page."""

from collections.abc import Sequence

import numpy as np

from timm_dvt.viewer.colors import PALETTE, Projection, cluster_labels, fit_projection, heat, norms, similarity

Pair = tuple[np.ndarray, np.ndarray]  # denoiser off and on
Scale = tuple[float, float]  # the values at the two ends of the color scale
ROUNDING = 1e-4  # of float32's forward passes
CLUSTERS = 4
AGREEING = 0.95  # of the patches in the same group from whatever seed, or groups are not shown
WORDS = {
    "groups": "Features in groups",
    "lengths": "Length of the features",
    "similarities": "Similarity",
    "removed": "What the denoiser removed",
}


def colors(off: np.ndarray, on: np.ndarray) -> Pair:
    """Two (H, W, C) maps as colors (H, W, 3) in [0, 1], by one projection that is fitted on both together.

    So equal features have equal colors, and a map that hardly varies, of a plain wall say, is not stretched to full
    colors. The mean of each map is taken off first: what all of its patches share says nothing of where they are.
    """
    both = np.stack(centered(off, on))
    first, second = fit_projection(both).colors(both)
    return first, second


def patterns(maps: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[Projection]]:
    """Maps (H, W, C), each without its mean, and their colors' projections, so that equal patterns look equal.

    The components are those of the first two, at equal weight, for the question is what these have in common; the
    contrast of each projection is stretched to its map.
    """
    centered = [features - features.mean(axis=(0, 1)) for features in maps]
    projection = fit_projection(np.stack([features / max(features.std(), 1e-12) for features in centered[:2]]))
    return centered, [projection.ranged_on(features) for features in centered]


def groups(off: np.ndarray, on: np.ndarray, clusters: int = CLUSTERS) -> tuple[Pair, float]:
    """k-means of the patches of both maps together, as colors (H, W, 3): a color is the same group in both.

    The second value is how far runs from eight seeds agree; below `AGREEING` the groups are chance, and no evidence.

    Raises:
        UserError: not between 1 and 10 clusters.
    """
    (first, second), agreement = cluster_labels(np.stack(centered(off, on)), clusters)
    return (PALETTE[first], PALETTE[second]), agreement


def centered(off: np.ndarray, on: np.ndarray) -> Pair:
    """Both maps, the mean over its patches taken off each."""
    return off - off.mean((0, 1)), on - on.mean((0, 1))


def lengths(off: np.ndarray, on: np.ndarray) -> tuple[Pair, Scale]:
    """The norms of both maps as colors (H, W, 3) on one scale."""
    return _heated(norms(off), norms(on))


def have_one_length(off: np.ndarray, on: np.ndarray) -> bool:
    """Whether the tokens of both maps are as long as each other, as far as can be seen: a denoiser that keeps lengths.

    To a hundredth in 95 of 100 places; some outlier tokens may differ.
    """
    return float(np.percentile(np.abs(norms(on) / np.maximum(norms(off), 1e-12) - 1), 95)) < 0.01


def similarities(off: np.ndarray, on: np.ndarray, patch: tuple[int, int]) -> tuple[Pair, Scale]:
    """The cosine similarity of every patch to one (row, column), as colors (H, W, 3) on one scale.

    The mean over its patches is taken off each map first. A large part of a token is the same everywhere in an image,
    and more so behind a denoiser, which takes out what differs by place: of the tokens as they are all cosines are
    high, and their map is flat. Nearest neighbors are told apart by what is left after the mean.
    """
    first, second = (
        np.ones(m.shape[:2]) if _is_flat(m, whole) else similarity(m, patch)
        for m, whole in zip(centered(off, on), (off, on))
    )
    return _heated(first, second)


def _is_flat(map_: np.ndarray, whole: np.ndarray) -> bool:
    """Whether what is left of a map after its mean is rounding: all patches are alike."""
    return bool(norms(map_).max() < ROUNDING * norms(whole).mean())


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

    A few outlier tokens must not decide the contrast of all others, nor rounding that of values that are all the same,
    as lengths behind a new norm are.
    """
    low, high = np.percentile(np.concatenate([v.ravel() for v in values]), (1, 99))
    return float(low), float(high if high - low > ROUNDING * max(abs(low), abs(high)) else low)
