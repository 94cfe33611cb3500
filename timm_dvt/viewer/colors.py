"""Feature maps as colors: principal components, clusters, norms and similarities. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from timm_dvt.errors import UserError

SEEDS, STARTS, COMPONENTS = 8, 16, 16  # of k-means
PERCENTILES = (1.0, 99.0)  # a few outlier tokens must not decide the contrast of all others

# Ten colors that are told apart easily, by color-blind readers too (Paul Tol's, muted).
PALETTE = (
    np.array(
        [
            (51, 34, 136),
            (136, 204, 238),
            (68, 170, 153),
            (17, 119, 51),
            (153, 153, 51),
            (221, 204, 119),
            (204, 102, 119),
            (136, 34, 85),
            (170, 68, 153),
            (221, 221, 221),
        ]
    )
    / 255
)


# Dark blue over green to yellow, rising in lightness all the way: readable in gray and by color-blind readers.
SCALE = np.array([(24, 15, 61), (48, 60, 130), (33, 113, 142), (38, 160, 124), (122, 199, 77), (253, 231, 55)]) / 255


@dataclass(frozen=True)
class Projection:
    """Three principal components as red, green and blue, with the range of values that fills each color.

    Attributes:
        mean: (C,) what is subtracted first.
        axes: (C, 3), of `principal_axes`, so that the same features always get the same colors.
        low, high: (3,) values that become 0 and 1.
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def components(self, features: np.ndarray) -> np.ndarray:
        """(..., C) features to their (..., 3) principal components."""
        return (np.asarray(features, dtype=np.float64) - self.mean) @ self.axes

    def colors(self, features: np.ndarray) -> np.ndarray:
        """(..., C) features to (..., 3) colors in [0, 1]; gray where a component does not vary."""
        span = self.high - self.low
        flat = span <= 1e-12 * (np.abs(self.high) + np.abs(self.low)) + 1e-30
        scaled = (self.components(features) - self.low) / np.where(flat, 1, span)
        return np.where(flat, 0.5, scaled.clip(0, 1))

    def ranged_on(self, features: np.ndarray) -> Projection:
        """The same axes, with the contrast stretched to other features."""
        values = self.components(features).reshape(-1, 3)
        low, high = np.percentile(values, PERCENTILES, axis=0)
        return replace(self, low=low, high=high)


def fit_projection(features: np.ndarray) -> Projection:
    """The principal components of (..., C) features, C >= 3, and color ranges from percentiles 1 to 99.

    Raises:
        ValueError: fewer than 3 channels, or a value that is not finite.
    """
    rows = np.asarray(features, dtype=np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.shape[1] < 3:
        raise UserError(f"features must have 3 channels or more, got {rows.shape[1]}")
    if not np.isfinite(rows).all():
        raise UserError("features must be finite, got NaN or infinity")
    mean, axes = principal_axes(rows, 3)
    nothing = np.zeros(3)
    return Projection(mean, axes, nothing, nothing).ranged_on(rows)


def principal_axes(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean (C,) of (N, C) rows, and their first principal axes (C, count), orthonormal, by falling variance.

    The largest entry of each is positive, so that equal rows give equal axes; there are no more of them than channels.
    """
    mean = rows.mean(axis=0)
    centered = rows - mean
    _, vectors = np.linalg.eigh(centered.T @ centered)
    axes = vectors[:, : -count - 1 : -1]
    return mean, axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], 0) < 0, -1, 1)


def principal_colors(features: np.ndarray) -> np.ndarray:
    """(..., C) features colored by their own three principal components: (..., 3) in [0, 1]."""
    return fit_projection(features).colors(features)


def cluster_labels(features: np.ndarray, clusters: int = 6) -> tuple[np.ndarray, float]:
    """k-means of (..., C) features in their first 16 principal components, with many starts.

    k-means stops at whichever solution is near its start. So that chance is not shown as a finding, it is run from
    `SEEDS` seeds, each with the best of `STARTS` starts, and what is shown should be what all of them find.

    Returns:
        labels (...) by falling size, so that equal maps get equal ones, and the agreement: the share of places that
        keep their label in the seed that differs most, 1 where all find the same.

    Raises:
        UserError: not between 1 and 10 clusters.
    """
    if not 1 <= clusters <= len(PALETTE):
        raise UserError(f"clusters must be from 1 to {len(PALETTE)}, got {clusters}")
    rows = np.asarray(features, dtype=np.float64).reshape(-1, features.shape[-1])
    mean, axes = principal_axes(rows, COMPONENTS)
    rows = (rows - mean) @ axes
    clusters = min(clusters, len(np.unique(rows.round(9), axis=0)))
    solutions = [_lloyd(rows, clusters, np.random.default_rng([0, i])) for i in range(SEEDS)]
    labels, _ = min(solutions, key=lambda solution: solution[1])
    agreement = min(float((matched_labels(other, labels) == labels).mean()) for other, _ in solutions)
    by_size = np.argsort(-np.bincount(labels, minlength=clusters), kind="stable")
    return np.argsort(by_size)[labels].reshape(features.shape[:-1]), agreement


def _lloyd(rows: np.ndarray, clusters: int, draw: np.random.Generator) -> tuple[np.ndarray, float]:
    """The best of `STARTS` k-means of (N, C) rows: labels (N,), and the sum of squared distances to the means."""
    squares = (rows**2).sum(1)[:, None]

    def distances(means: np.ndarray) -> np.ndarray:  # (S, K, C) to (S, N, K)
        return (squares - 2 * rows @ means.swapaxes(1, 2) + (means**2).sum(2)[:, None]).clip(0)

    means = rows[draw.integers(len(rows), size=STARTS)][:, None]
    for _ in range(clusters - 1):  # k-means++: each further start is drawn by its squared distance to those there are
        mass = distances(means).min(2).cumsum(1)
        places = (mass < draw.random((STARTS, 1)) * mass[:, -1:]).sum(1).clip(max=len(rows) - 1)
        means = np.concatenate([means, rows[places][:, None]], axis=1)
    labels = np.full((STARTS, len(rows)), -1)
    for _ in range(100):
        to_means = distances(means)
        before, labels = labels, to_means.argmin(2)
        if (before == labels).all():
            break
        members = (labels[:, None] == np.arange(clusters)[:, None]).astype(float)
        sizes = members.sum(2, keepdims=True)
        means = np.where(sizes > 0, members @ rows / sizes.clip(1), means)
    costs = to_means.min(2).sum(1)
    return labels[costs.argmin()], float(costs.min())


def matched_labels(labels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Labels renamed so that as many patches as can be agree with another clustering of the same patches."""
    count = int(max(labels.max(), reference.max())) + 1
    overlap = np.zeros((count, count))
    np.add.at(overlap, (labels.ravel(), reference.ravel()), 1)
    new = np.empty(count, int)
    for old, name in _best_pairs(overlap):
        new[old] = name
    return new[labels]


def _best_pairs(score: np.ndarray) -> Iterator[tuple[int, int]]:
    """Row and column of each pair of a square table, the highest score first, no row or column twice."""
    score = np.array(score, float)
    for _ in range(len(score)):
        row, column = np.unravel_index(score.argmax(), score.shape)
        yield int(row), int(column)
        score[row], score[:, column] = -1, -1


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (H, W) on `SCALE`, which stands for `low` to `high`: colors (H, W, 3) in [0, 1]."""
    place = ((np.asarray(values, float) - low) / (high - low if high > low else 1)).clip(0, 1) * (len(SCALE) - 1)
    return np.stack([np.interp(place, np.arange(len(SCALE)), SCALE[:, c]) for c in range(3)], axis=-1)


def norms(features: np.ndarray) -> np.ndarray:
    """(..., C) features to their L2 norms (...)."""
    return np.linalg.norm(np.asarray(features, dtype=np.float64), axis=-1)


def similarity(features: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """Cosine similarity (H, W) of every patch of a (H, W, C) map to one of them, at (row, column)."""
    rows = np.asarray(features, dtype=np.float64)
    unit = rows / np.maximum(norms(rows)[..., None], 1e-12)
    return unit @ unit[patch]


def map_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation of two (K, K, C) maps over patches and channels, means taken off."""
    a, b = (np.asarray(x, dtype=np.float64).reshape(-1, x.shape[-1]) for x in (first, second))
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-30))
