"""The paper's figures of features: stage 1 of images (Figs. 5, S4 to S10), and what position does (3, S1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from timm_dvt.colors import (
    PALETTE,
    centre_similarity,
    cluster_labels,
    fit_projection,
    map_correlation,
    matched_labels,
    norms,
)

CELL, GAP, GROUP_GAP, ROW_GAP = 1.35, 0.06, 0.28, 0.26  # inches
LEFT, TOP, RIGHT, BOTTOM = 0.40, 0.72, 0.12, 0.12
DPI = 110
Maps = Mapping[int, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One row of the stage 1 panel: an image, square, and its maps at one block.

    Attributes:
        label: stands at the left of the row.
        image: (H, W, 3) in [0, 1], as the model saw it.
        raw, artifacts, residual: (K, K, C). clean: the same, or F at another resolution (R, R, C).
    """

    label: str
    image: np.ndarray
    raw: np.ndarray
    clean: np.ndarray
    artifacts: np.ndarray
    residual: np.ndarray


def draw_stage1(rows: Sequence[Row], clusters: int = 6, seed: int = 0) -> Figure:
    """One row for each of `rows`, with the columns of the paper's Figs. S4 to S10.

    Each map is coloured by its own principal components and clusters, as in the paper; F's take the order,
    signs and colours of the raw ones that they are most alike. Numbers below a map are the ends of its colour
    scale. The red dot is the patch that the others are compared with.
    """
    titles = ["image"] + ["PCA", "k-means", "norm", "similarity"] * 2 + ["G", "‖residual‖", "G + residual"]
    groups = [(1, 4, "raw features"), (5, 8, "denoised features F"), (9, 11, "removed")]
    sheet = Sheet(len(rows), titles, groups)
    for i, row in enumerate(rows):
        sheet.label_row(i, row.label)
        sheet.picture(i, 0, row.image)
        sheet.dot(i, 0, row.raw.shape[0])
        resolution = row.clean.shape[0]
        raw_colors, clean_colors = _alike(_repeated(row.raw, resolution), row.clean)
        raw_labels = cluster_labels(row.raw, clusters, seed)
        clean_labels = matched_labels(cluster_labels(row.clean, clusters, seed), _repeated(raw_labels, resolution))
        for column, features, colors, labels in (
            (1, row.raw, raw_colors, raw_labels),
            (5, row.clean, clean_colors, clean_labels),
        ):
            sheet.picture(i, column, colors)
            sheet.picture(i, column + 1, PALETTE[labels])
            sheet.heat(i, column + 2, norms(features), "viridis")
            sheet.heat(i, column + 3, centre_similarity(features), "magma")
            sheet.dot(i, column + 3, features.shape[0])
        artifact_colors, removed_colors = _alike(row.artifacts, row.artifacts + row.residual)
        sheet.picture(i, 9, artifact_colors)
        sheet.heat(i, 10, norms(row.residual), "viridis")
        sheet.picture(i, 11, removed_colors)
    return sheet.figure


def draw_positional(layers: Sequence[int], images: int, zero: Maps, mean: Maps, one: Maps) -> Figure:
    """One column a block: features of an empty image, of many images on average, of one (Figs. 3a and S1).

    In a column all maps share one set of principal components, each map's mean taken off, so that equal
    patterns look equal. Below the mean map stands its correlation with the empty image's: 1 where
    position alone explains it.

    Args:
        layers: the blocks.
        images: how many there were.
        zero, mean, one: a (K, K, C) map for each block: of a zero tensor, of the images' mean, of the first.
    """
    sheet = Sheet(4, [f"block {layer}" for layer in layers], [])
    plural = "" if images == 1 else "s"
    for i, label in enumerate(["zero image", "its norm", f"mean of {images} image{plural}", "first image"]):
        sheet.label_row(i, label)
    for column, layer in enumerate(layers):
        maps = [m - m.mean(axis=(0, 1)) for m in (zero[layer], mean[layer], one[layer])]
        # The components of the first two, at equal weight: the question is what they have in common.
        projection = fit_projection(np.stack([m / max(m.std(), 1e-12) for m in maps[:2]]))
        for i, centred in zip((0, 2, 3), maps):
            sheet.picture(i, column, projection.ranged_on(centred).colors(centred))
        sheet.heat(1, column, norms(zero[layer]), "viridis")
        sheet.note(2, column, f"r = {map_correlation(zero[layer], mean[layer]):.2f}")
    return sheet.figure


def _alike(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours of two maps of the same patches by their own components, the second matched to the first."""
    reference, own = fit_projection(first), fit_projection(second)
    return reference.colors(first), own.matched_to(reference, second, first).colors(second)


def _repeated(patches: np.ndarray, resolution: int) -> np.ndarray:
    """Patches (K, K, ...) at so many places either way, each place that of the patch it lies in."""
    places = (np.arange(resolution) + 0.5) * len(patches) / resolution
    return patches[places.astype(int)][:, places.astype(int)]


class Sheet:
    """A figure of equal square cells, placed by the inch so that no text moves or cuts them."""

    def __init__(self, rows: int, titles: Sequence[str], groups: Sequence[tuple[int, int, str]]) -> None:
        """
        Args:
            rows: number of rows.
            titles: one above each column.
            groups: (first column, last column, title) of columns that belong together.
        """
        starts = {first for first, _, _ in groups}
        self._x = [LEFT]
        for column in range(1, len(titles)):
            self._x.append(self._x[-1] + CELL + (GROUP_GAP if column in starts else GAP))
        top = TOP if groups else TOP - 0.3
        self.width = self._x[-1] + CELL + RIGHT
        self.height = top + rows * CELL + (rows - 1) * ROW_GAP + BOTTOM + 0.12
        self._y = [self.height - top - (row + 1) * CELL - row * ROW_GAP for row in range(rows)]
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")
        for column, title in enumerate(titles):
            self._text(self._x[column] + CELL / 2, self.height - top + 0.08, title, 10, va="bottom")
        for first, last, title in groups:
            left, right = self._x[first], self._x[last] + CELL
            self._text((left + right) / 2, self.height - top + 0.40, title, 11, va="bottom", weight="bold")
            line = Rectangle(
                (left / self.width, (self.height - top + 0.34) / self.height),
                (right - left) / self.width,
                0.012 / self.height,
                facecolor="0.4",
                transform=self.figure.transFigure,
            )
            self.figure.add_artist(line)

    def label_row(self, row: int, label: str) -> None:
        """Write a label at the left of a row, shortened in its middle if it is long."""
        if len(label) > 22:
            label = f"{label[:12]}…{label[-9:]}"
        self._text(LEFT - 0.12, self._y[row] + CELL / 2, label, 9, ha="right", va="center", rotation=90)

    def picture(self, row: int, column: int, colors: np.ndarray) -> None:
        """Draw (H, W, 3) colours in [0, 1]; patches stay squares."""
        self._cell(row, column).imshow(colors, interpolation="nearest", aspect="auto")

    def heat(self, row: int, column: int, values: np.ndarray, colormap: str) -> None:
        """Draw (K, K) values, and the ends of their colour scale below."""
        low, high = float(values.min()), float(values.max())
        self._cell(row, column).imshow(values, cmap=colormap, interpolation="nearest", aspect="auto")
        self.note(row, column, f"{low:.4g} to {high:.4g}")

    def dot(self, row: int, column: int, grid: int) -> None:
        """Mark the middle patch of a K x K map, or of the image below it."""
        place = (grid // 2 + 0.5) / grid
        axes = self.figure.add_axes(self._box(row, column), frameon=False)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
        axes.plot([place], [place], "o", color="red", markersize=4.5, markeredgecolor="white", mew=0.6)

    def note(self, row: int, column: int, text: str) -> None:
        """Write a small note below a cell."""
        self._text(self._x[column] + CELL / 2, self._y[row] - 0.04, text, 7.5, va="top", color="0.35")

    def _cell(self, row: int, column: int) -> Axes:
        axes = self.figure.add_axes(self._box(row, column))
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(linewidth=0.4, color="0.6")
        return axes

    def _box(self, row: int, column: int) -> tuple[float, float, float, float]:
        x, y = self._x[column] / self.width, self._y[row] / self.height
        return x, y, CELL / self.width, CELL / self.height

    def _text(self, x: float, y: float, text: str, size: float, ha: str = "center", **style: Any) -> None:
        self.figure.text(x / self.width, y / self.height, text, fontsize=size, ha=ha, **style)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as its name's suffix says (png, pdf, svg, jpg, ...); makes missing folders."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
