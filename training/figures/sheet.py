"""A figure of equal square cells with titles, scales and frames: what the panels are drawn on."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from timm_dvt.errors import UserError
from timm_dvt.viewer.colors import heat
from timm_dvt.viewer.pairs import Scale
from timm_dvt.viewer.panel import FAINT, INK, MARK

CELL, GAP, ROW_GAP = 1.42, 0.09, 0.42  # inches
LARGE = 2.1  # a cell of few columns
LEFT, TITLES, RIGHT, BOTTOM = 0.42, 0.44, 0.16, 0.36
BAR = 0.055  # height of a color scale
HEAD, LINE, LETTER = 0.42, 0.18, 0.078  # a heading, a line of words below it, and the width of a letter of these
NARROWEST = 4.9  # a figure of one column has words above it too
DPI = 110
_INK, _FAINT, _MARK = (tuple(part / 255 for part in color) for color in (INK, FAINT, MARK))


class Sheet:
    """Cells placed by the inch, so that no text moves or cuts them."""

    def __init__(
        self,
        rows: Sequence[str],
        columns: Sequence[tuple[str, str]],
        title: str,
        words: str,
        cell: float = CELL,
    ) -> None:
        """
        Args:
            rows: a label at the left of each; a long one is shortened in its middle.
            columns: a title above each, and a line below it that explains it.
            title, words: above all of them.
            cell: side of a cell, in inches.
        """
        self.cell = cell
        self._x = [LEFT + column * (cell + GAP) for column in range(len(columns))]
        self.width = max(self._x[-1] + self.cell + RIGHT, NARROWEST)
        heads = textwrap.wrap(title, max(int((self.width - LEFT) / (1.5 * LETTER)), 8))
        lines = textwrap.wrap(words, max(int((self.width - LEFT) / LETTER), 12))
        explained = any(below for _, below in columns)
        above = TITLES if explained else TITLES - 0.17
        head = 0.14 + HEAD * len(heads) * 0.7 + LINE * len(lines) + 0.16
        self.height = head + above + len(rows) * self.cell + (len(rows) - 1) * ROW_GAP + BOTTOM
        top = self.height - head - above
        self._y = [top - (row + 1) * self.cell - row * ROW_GAP for row in range(len(rows))]
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor="white")

        down = self.height - 0.14
        for text in heads:
            self._text(LEFT, down, text, 14, ha="left", va="top")
            down -= HEAD * 0.7
        for text in lines:
            self._text(LEFT, down, text, 9, ha="left", va="top", color=_FAINT)
            down -= LINE
        for x, (name, below) in zip(self._x, columns):
            self._text(x, top + (0.25 if explained else 0.08), name, 10, ha="left", va="bottom")
            self._text(x, top + 0.08, below, 8, ha="left", va="bottom", color=_FAINT)
        for y, label in zip(self._y, rows):
            self._text(LEFT - 0.12, y + self.cell / 2, shortened(label, 22), 9, ha="right", va="center", rotation=90)

    def picture(self, row: int, column: int, colors: np.ndarray, scale: Scale | None = None) -> None:
        """Draw (H, W, 3) colors in [0, 1], patches as squares; below them what the ends of their scale stand for."""
        self._axes(row, column, self.cell).imshow(colors, interpolation="nearest", aspect="auto")
        if scale is None:
            return
        ramp = heat(np.linspace(0, 1, 256)[None], 0.0, 1.0)
        self._axes(row, column, BAR, -0.06 - BAR).imshow(ramp, interpolation="nearest", aspect="auto")
        for value, x, ha in zip(scale, (0, self.cell), ("left", "right")):
            at = self._x[column] + x, self._y[row] - 0.08 - BAR
            self._text(*at, f"{value:.3g}", 7.5, ha=ha, va="top", color=_FAINT)

    def frame(self, row: int, column: int, grid: int) -> None:
        """Frame the middle patch of a map of grid x grid patches, or of the image that it is of."""
        axes = self._axes(row, column, self.cell)
        axes.set(xlim=(0, grid), ylim=(grid, 0), facecolor="none")
        corner = (grid // 2, grid // 2)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=2.4, alpha=0.8))
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_MARK, linewidth=1.4))

    def note(self, row: int, column: int, text: str) -> None:
        """Write a small note below a cell."""
        self._text(self._x[column], self._y[row] - 0.06, text, 8, ha="left", va="top", color=_FAINT)

    def _axes(self, row: int, column: int, height: float, above: float = 0.0) -> Axes:
        """Axes without marks, as wide as a cell, from so far above its lower edge."""
        x, y = self._x[column] / self.width, (self._y[row] + above) / self.height
        axes = self.figure.add_axes((x, y, self.cell / self.width, height / self.height))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def _text(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        if text:
            self.figure.text(x / self.width, y / self.height, text, fontsize=size, **({"color": _INK} | style))


def shortened(label: str, most: int) -> str:
    """A label of at most so many letters, its middle left out; the end tells files apart."""
    return label if len(label) <= most else f"{label[: most - 10]}…{label[-9:]}"


def check_picture(path: str | Path) -> None:
    """Raise UserError for a name whose suffix says no kind of picture."""
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if (suffix := Path(path).suffix[1:].lower()) and suffix not in kinds:
        raise UserError(f"{path}: a picture's name ends in one of {' '.join(kinds)}")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as its name's suffix says (png, pdf, svg, jpg, ...); makes missing folders."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
