"""Maps of several images side by side, as trainings keep them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from timm_dvt.viewer.colors import fit_projection

CELL = 160  # pixels of one map


def draw_rows(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray | None:
    """Each row's (K, K, C) maps beside each other, colored by the last one's components: (H, W, 3) uint8.

    So raw | predicted | target differ in color where, and only where, they differ. Rows with a value that is not
    finite are left out; None if no row is left, or maps have too few channels for colors.
    """
    drawn = []
    for maps in rows:
        if maps[-1].shape[-1] < 3 or not all(np.isfinite(features).all() for features in maps):
            continue
        projection = fit_projection(maps[-1])
        cells = [(projection.colors(features) * 255).round().astype(np.uint8) for features in maps]
        drawn.append(np.concatenate([_enlarged(cell) for cell in cells], axis=1))
    return np.concatenate(drawn, axis=0) if drawn else None


def _enlarged(cell: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(cell).resize((CELL, CELL), Image.Resampling.NEAREST))
