"""The demo's picture: for each photograph a row with the denoiser off and one with it on, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from timm_dvt.viewer import pairs as looks
from timm_dvt.viewer.colors import heat

CELL_AREA = 300 * 300  # pixels of one map, about, whatever its aspect ratio
MIN_PITCH = 244  # a column is wide enough for its title
MARGIN, GAP, HEAD, TITLE, LINE, BAR = 28, 16, 116, 44, 30, 10
INK, FAINT, PAPER, MARK, WARNING = (20, 22, 26), (100, 105, 112), (255, 255, 255), (235, 45, 60), (176, 60, 0)


@dataclass(frozen=True)
class Shown:
    """A photograph as the model saw it, and its patch tokens (H, W, C) with the denoiser off and on.

    Attributes:
        remarks: two, that stand beside "denoiser off" and "denoiser on".
        patch: row and column of the one that the similarity is to; default the one in the middle.
        clusters: of k-means.
    """

    image: Image.Image
    off: np.ndarray
    on: np.ndarray
    remarks: tuple[str, str]
    patch: tuple[int, int] | None = None
    clusters: int = looks.CLUSTERS


def draw(shown: Sequence[Shown], title: str, lines: Sequence[str], note: str = "") -> Image.Image:
    """Two rows for each photograph: its features with the denoiser off, and on.

    Each map has the colors of its own components and clusters; norms are on one scale a photograph, similarities too
    (`timm_dvt.viewer.pairs`).

    Args:
        shown: of one grid or of several.
        title, lines: above the rows. note: a warning, above them too.
    """
    blocks = [_block(one) for one in shown]
    width = max(block.width for block in blocks)
    head = HEAD if title or lines else MARGIN // 2
    sheet = Image.new("RGB", (width, head + sum(block.height for block in blocks)), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 18), _fitting(pen, title, 24, width - 2 * MARGIN), fill=INK, font=_font(24))
    inks = [FAINT] * len(lines) + [WARNING]
    for y, text, ink in zip((52, 74, 96), [*lines, note], inks):
        pen.text((MARGIN, y), _fitting(pen, text, 16, width - 2 * MARGIN), fill=ink, font=_font(16))
    top = head
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
    maps, patch_shown = (shown.off, shown.on), shown.patch or looks.center(shown.off)
    drawn = {
        "colors": (looks.colors(*maps), None),
        "groups": (looks.groups(*maps, shown.clusters), None),
        "lengths": looks.lengths(*maps),
        "similarities": looks.similarities(*maps, patch_shown),
        "removed": looks.removed(*maps),
    }
    if looks.have_one_length(*maps):  # two maps alike would say nothing
        del drawn["lengths"]
    titles = [("photograph", "as the model sees it"), *(looks.WORDS[name] for name in drawn)]
    size = (2 * MARGIN + len(titles) * pitch - GAP, TITLE + 2 * (LINE + height) + LINE + 2 * BAR)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, (name, explained) in enumerate(titles):
        pen.text((MARGIN + column * pitch, 4), name, fill=INK, font=_font(17))
        explained = explained.format(clusters=shown.clusters)
        pen.text((MARGIN + column * pitch, 25), explained, fill=FAINT, font=_font(14))
    at_a_patch = (0, 1 + list(drawn).index("similarities"))
    for row, (state, remark) in enumerate(zip(("denoiser off", "denoiser on"), shown.remarks)):
        top = TITLE + row * (LINE + height) + LINE
        pen.text((MARGIN, top - 24), state, fill=INK, font=_font(17))
        pen.text((MARGIN + pen.textlength(state, _font(17)) + 10, top - 22), remark, fill=FAINT, font=_font(15))
        sheet.paste(shown.image.resize((width, height), Image.Resampling.LANCZOS), (MARGIN, top))
        for column, (pair, _) in enumerate(drawn.values(), start=1):
            cell = as_image(pair[row]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(cell, (MARGIN + column * pitch, top))
        for column in at_a_patch:
            _mark(pen, (MARGIN + column * pitch, top), patch, patch_shown)
    for column, (_, ends) in enumerate(drawn.values(), start=1):
        if ends is not None:
            _scale(sheet, pen, (MARGIN + column * pitch, size[1] - LINE - BAR), width, ends)
    return sheet


def as_image(colors: np.ndarray) -> Image.Image:
    """Colors (H, W, 3) in [0, 1] as an image of as many pixels."""
    return Image.fromarray((colors * 255).round().astype(np.uint8))


def _mark(pen: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, patch: tuple[int, int]) -> None:
    """A frame around a patch (row, column) of a cell."""
    x, y = corner[0] + patch[1] * side, corner[1] + patch[0] * side
    pen.rectangle([x - 2, y - 2, x + side + 1, y + side + 1], outline=MARK, width=2)


def _scale(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], width: int, ends: tuple[float, float]
) -> None:
    """A color bar with the values of its ends."""
    sheet.paste(as_image(heat(np.broadcast_to(np.linspace(0, 1, width), (BAR, width)), 0.0, 1.0)), at)
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
