"""The demo's picture: for each photograph a row with the denoiser off and one with it on, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from timm_dvt.colors import (
    PALETTE,
    centre_similarity,
    cluster_labels,
    fit_projection,
    heat,
    matched_labels,
    norms,
)

CELL_AREA = 300 * 300  # pixels of one map, about, whatever its aspect ratio
MIN_PITCH = 244  # a column is wide enough for its title
MARGIN, GAP, HEAD, TITLE, LINE, BAR = 28, 16, 116, 44, 30, 10
INK, FAINT, PAPER, MARK, WARNING = (20, 22, 26), (100, 105, 112), (255, 255, 255), (235, 45, 60), (176, 60, 0)
CLUSTERS = 6
COLUMNS = (
    ("photograph", "as the model sees it"),
    ("features as colours", "their three principal components"),
    ("features in groups", f"{CLUSTERS} clusters (k-means)"),
    ("length of the features", "their norm"),
    ("similarity", "to the patch with the red frame"),
    ("what the denoiser removed", "off minus on: colours, length"),
)


@dataclass(frozen=True)
class Shown:
    """A photograph as the model saw it, and its patch tokens (H, W, C) with the denoiser off and on.

    Attributes:
        remarks: two, that stand beside "denoiser off" and "denoiser on".
    """

    image: Image.Image
    off: np.ndarray
    on: np.ndarray
    remarks: tuple[str, str]


def draw(shown: Sequence[Shown], title: str, lines: Sequence[str], note: str = "") -> Image.Image:
    """Two rows for each photograph: its features with the denoiser off, and on.

    Each map has the colours of its own components and clusters: on a common projection a pattern that one of them has
    and the other has not would be hidden. Those of the denoised map take the order, signs and names of the raw ones
    that they are most alike. Norms are on one scale a photograph, similarities too.

    Args:
        shown: of one grid or of several.
        title, lines: above the rows. note: a warning, above them too.
    """
    blocks = [_block(one) for one in shown]
    width = max(block.width for block in blocks)
    sheet = Image.new("RGB", (width, HEAD + sum(block.height for block in blocks)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 18), _fitting(pen, title, 24, width - 2 * MARGIN), fill=INK, font=_font(24))
    inks = [FAINT] * len(lines) + [WARNING]
    for y, text, ink in zip((52, 74, 96), [*lines, note], inks):
        pen.text((MARGIN, y), _fitting(pen, text, 16, width - 2 * MARGIN), fill=ink, font=_font(16))
    top = HEAD
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def _block(shown: Shown) -> Image.Image:
    """A photograph's two rows, with the columns' titles above and scales below."""
    rows, columns = shown.off.shape[:2]
    patch = max(1, round((CELL_AREA / (rows * columns)) ** 0.5))  # whole pixels: all patches are drawn alike
    width, height = patch * columns, patch * rows
    pitch = max(width, MIN_PITCH) + GAP
    size = (2 * MARGIN + len(COLUMNS) * pitch - GAP, TITLE + 2 * (LINE + height) + LINE + 2 * BAR)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, (name, explained) in enumerate(COLUMNS):
        pen.text((MARGIN + column * pitch, 4), name, fill=INK, font=_font(17))
        pen.text((MARGIN + column * pitch, 25), explained, fill=FAINT, font=_font(14))

    maps = (shown.off, shown.on)
    lengths, alike = [norms(m) for m in maps], [centre_similarity(m) for m in maps]
    removed = shown.off - shown.on
    scales = {3: _range(lengths), 4: _range(alike), 5: _range([norms(removed)])}
    projections = [fit_projection(m) for m in maps]
    projections[1] = projections[1].matched_to(projections[0], shown.on, shown.off)
    groups = [cluster_labels(m, CLUSTERS) for m in maps]
    groups[1] = matched_labels(groups[1], groups[0])
    last = (fit_projection(removed).colors(removed), heat(norms(removed), *scales[5]))
    for row, (state, remark) in enumerate(zip(("denoiser off", "denoiser on"), shown.remarks)):
        top = TITLE + row * (LINE + height) + LINE
        pen.text((MARGIN, top - 24), state, fill=INK, font=_font(17))
        pen.text((MARGIN + pen.textlength(state, _font(17)) + 10, top - 22), remark, fill=FAINT, font=_font(15))
        cells = (
            projections[row].colors(maps[row]), PALETTE[groups[row]], heat(lengths[row], *scales[3]),
            heat(alike[row], *scales[4]), last[row],
        )
        sheet.paste(shown.image.resize((width, height), Image.Resampling.LANCZOS), (MARGIN, top))
        for column, cell in enumerate(cells, start=1):
            pixels = Image.fromarray((cell * 255).round().astype(np.uint8))
            sheet.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (MARGIN + column * pitch, top))
        for column in (0, 4):
            _mark_centre(pen, (MARGIN + column * pitch, top), patch, (rows, columns))
    for column, ends in scales.items():
        _scale(sheet, pen, (MARGIN + column * pitch, size[1] - LINE - BAR), width, ends)
    return sheet


def _range(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The first and last percentile: a few outlier tokens must not decide the contrast of all others."""
    low, high = np.percentile(np.concatenate([v.ravel() for v in values]), (1, 99))
    return float(low), float(high)


def _mark_centre(pen: ImageDraw.ImageDraw, corner: tuple[int, int], patch: int, grid: tuple[int, int]) -> None:
    """A frame around the patch in the middle of a cell."""
    x, y = corner[0] + grid[1] // 2 * patch, corner[1] + grid[0] // 2 * patch
    pen.rectangle([x - 2, y - 2, x + patch + 1, y + patch + 1], outline=MARK, width=2)


def _scale(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], width: int, ends: tuple[float, float]
) -> None:
    """A colour bar with the values of its ends."""
    ramp = heat(np.broadcast_to(np.linspace(0, 1, width), (BAR, width)), 0.0, 1.0)
    sheet.paste(Image.fromarray((ramp * 255).round().astype(np.uint8)), at)
    low, high = (f"{end:.3g}" for end in ends)
    y = at[1] + BAR + 3
    pen.text((at[0], y), low, fill=FAINT, font=_font(14))
    pen.text((at[0] + width - pen.textlength(high, _font(14)), y), high, fill=FAINT, font=_font(14))


def _fitting(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """The text, its middle left out where it is wider than `width` pixels."""
    kept = len(text)
    shown = text
    while kept > 8 and pen.textlength(shown, _font(size)) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - kept // 2 :]}"
    return shown


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
