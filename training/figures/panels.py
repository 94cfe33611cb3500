"""The paper's figures of features: stage 1 of images (Figs. 5, S4 to S10), and what position does (3, S1).

Colors, scales and marks are those of the demo's picture and of the page (`timm_dvt.viewer`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from timm_dvt.viewer import pairs
from timm_dvt.viewer.colors import heat, map_correlation, norms
from training.figures.sheet import CELL, LARGE, Sheet, shortened

Maps = Mapping[int, np.ndarray]
MOST_LARGE = 8  # rows with large cells: a picture of more would not open everywhere
STAGE1 = (
    "What stage 1 makes of an image",
    "Each square is one patch of the image. Raw features, as the model gives them, are taken apart into clean features "
    "F, which stay with the image wherever a crop puts it; artifacts G, which stay with the place whatever is there; "
    "and a rest. Raw and clean features share colors, groups and scales. F is shorter where crops differ; at borders "
    "that no crop reached it is the raw features.",
)
POSITION = (
    "What position does to features",
    "A blank image shows nothing: its features are position alone. In a column colors are comparable.",
)


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


def draw_stage1(rows: Sequence[Row], clusters: int = pairs.CLUSTERS) -> Figure:
    """Three lines for each of `rows`: raw features, F, and what lies between, as in the paper's Figs. S4 to S10.

    Principal components and clusters are of the raw features and F together (the paper's are of each map alone), so
    that a color means the same in both. The framed patch is the one that the others are compared with.
    """
    columns = [
        ("image", ""),
        ("as colors", "3 main components"),
        ("in groups", f"{clusters}, by k-means"),
        ("length", "of a patch's vector"),
        ("similarity", "to the framed patch"),
    ]
    lines = ["raw features", "clean features F", "taken off"]
    sheet = Sheet(lines * len(rows), columns, *STAGE1, cell=LARGE if len(rows) <= MOST_LARGE else CELL)
    for i, row in enumerate(rows):
        above, below, removed = range(3 * i, 3 * i + 3)
        sheet.picture(above, 0, row.image)
        sheet.frame(above, 0, len(row.raw))
        sheet.note(above, 0, shortened(row.label, 36))
        raw = _repeated(row.raw, len(row.clean))
        maps = [
            (pairs.colors(raw, row.clean), None),
            (pairs.groups(raw, row.clean, clusters)[0], None),
            pairs.lengths(raw, row.clean),
            pairs.similarities(raw, row.clean, pairs.center(row.clean)),
        ]
        for column, (pair, scale) in enumerate(maps, start=1):
            for line, colors in zip((above, below), pair):
                sheet.picture(line, column, colors, scale)
        sheet.frame(above, 4, len(row.raw))
        sheet.frame(below, 4, len(row.clean))
        artifacts, both = pairs.colors(row.artifacts, row.artifacts + row.residual)
        sheet.picture(removed, 1, artifacts)
        sheet.note(removed, 1, "artifacts G")
        sheet.picture(removed, 2, both)
        sheet.note(removed, 2, "raw - F: G and a rest")
        sheet.picture(removed, 3, *_length(row.residual))
        sheet.note(removed, 4, "to the left: length of the rest")
    return sheet.figure


def draw_positional(layers: Sequence[int], images: int, zero: Maps, mean: Maps, first: Maps) -> Figure:
    """One column a block: features of an empty image, of many images on average, of one (Figs. 3a and S1).

    In a column all maps share one set of principal components, each map's mean taken off, so that equal
    patterns look equal. Below the mean map stands its correlation with the empty image's: 1 where
    position alone explains it.

    Args:
        layers: the blocks.
        images: how many there were.
        zero, mean, first: a (K, K, C) map for each block: of a zero tensor, of the images' mean, of the first.
    """
    plural = "" if images == 1 else "s"
    labels = ["a blank image", "the same, length", f"mean of {images} image{plural}", "one of them"]
    words = f"{POSITION[1]} Below the mean: its correlation with the blank image, 1 where it is position alone."
    sheet = Sheet(labels, [(f"block {layer}", "") for layer in layers], POSITION[0], words)
    for column, layer in enumerate(layers):
        for i, centered, projection in zip((0, 2, 3), *pairs.patterns([zero[layer], mean[layer], first[layer]])):
            sheet.picture(i, column, projection.colors(centered))
        sheet.picture(1, column, *_length(zero[layer]))
        sheet.note(2, column, f"correlation {map_correlation(zero[layer], mean[layer]):.2f}")
    return sheet.figure


def _length(features: np.ndarray) -> tuple[np.ndarray, pairs.Scale]:
    """The lengths of a map as colors, and the scale that they are on."""
    scale = pairs.scale_of([norms(features)])
    return heat(norms(features), *scale), scale


def _repeated(patches: np.ndarray, resolution: int) -> np.ndarray:
    """Patches (K, K, ...) at so many places either way, each place that of the patch it lies in."""
    places = (np.arange(resolution) + 0.5) * len(patches) / resolution
    return patches[places.astype(int)][:, places.astype(int)]
