"""The demo's picture: a row for each state of the denoiser, the columns on shared colours, drawn with Pillow."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from timm_dvt.colors import centre_similarity, fit_projection, heat

CELL_AREA = 340 * 240  # pixels of one map, whatever its aspect ratio
MIN_PITCH = 232  # a column is wide enough for its title
MARGIN, GAP, TITLE, LINE, FOOTER = 24, 14, 84, 32, 50
INK, FAINT, PAPER, MARK, WARNING = (20, 22, 26), (100, 105, 112), (255, 255, 255), (235, 45, 60), (176, 60, 0)
COLUMNS = ("image", "PCA colours", "feature norm", "similarity to centre patch")
BAR = 10  # height of a colour bar


@dataclass(frozen=True)
class Row:
    """One state of the denoiser: its name, a remark, and patch tokens (H, W, C)."""

    name: str
    remark: str
    features: torch.Tensor


@dataclass(frozen=True)
class Layout:
    """Where things are, in pixels of the sheet. Cells are `width` x `height`, columns `pitch` apart."""

    width: int
    height: int
    pitch: int
    rows: int

    @property
    def size(self) -> tuple[int, int]:
        width = 2 * MARGIN + len(COLUMNS) * self.pitch + (len(COLUMNS) - 1) * GAP
        return width, TITLE + LINE + self.rows * (LINE + self.height) + FOOTER

    def left(self, column: int) -> int:
        return MARGIN + column * (self.pitch + GAP)

    def top(self, row: int) -> int:
        return TITLE + LINE + (row + 1) * LINE + row * self.height

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a cell."""
        x, y = self.left(column), self.top(row)
        return x, y, x + self.width, y + self.height


def layout(image: Image.Image, rows: int) -> Layout:
    """The layout for an image's aspect ratio and so many rows."""
    zoom = (CELL_AREA / (image.width * image.height)) ** 0.5
    width, height = round(image.width * zoom), round(image.height * zoom)
    return Layout(width, height, max(width, MIN_PITCH), rows)


def draw(image: Image.Image, rows: list[Row], title: str, subtitle: str, note: str = "") -> Image.Image:
    """Image, PCA colours, norms and similarities, a line of them for each row.

    Colours compare between rows: one projection, fitted on the last row; one scale of norms, one of similarities.

    Args:
        image: as the model saw it; rows: states of the denoiser, the denoised one last.
        title, subtitle: two lines on top. note: a warning on the third.
    """
    maps = [row.features for row in rows]
    projection = fit_projection(maps[-1])
    norms = [m.double().norm(dim=-1) for m in maps]
    similarities = [centre_similarity(m) for m in maps]
    place = layout(image, len(rows))
    sheet = Image.new("RGB", place.size, PAPER)
    pen = ImageDraw.Draw(sheet)

    room = place.size[0] - 2 * MARGIN
    for y, text, size, ink in ((14, title, 22, INK), (44, subtitle, 15, FAINT), (66, note, 15, WARNING)):
        pen.text((MARGIN, y), _fitting(pen, text, size, room), fill=ink, font=_font(size))
    for column, name in enumerate(COLUMNS):
        pen.text((place.left(column), TITLE + 14), name, fill=INK, font=_font(16))

    for i, row in enumerate(rows):
        y = place.top(i) - LINE + 10
        pen.text((MARGIN, y), row.name, fill=INK, font=_font(16))
        pen.text((MARGIN + pen.textlength(row.name, _font(16)) + 10, y), row.remark, fill=FAINT, font=_font(16))
        sheet.paste(image.resize((place.width, place.height), Image.Resampling.LANCZOS), place.box(i, 0))
        cells = [projection.colors(maps[i])]
        cells += [heat(values[i], *_range(values)) for values in (norms, similarities)]
        for column, cell in enumerate(cells, start=1):
            patches = Image.fromarray(cell).resize((place.width, place.height), Image.Resampling.NEAREST)
            sheet.paste(patches, place.box(i, column))
        for column in (0, 3):
            _mark_centre(pen, place.box(i, column), maps[i].shape)

    y = place.top(len(rows)) - LINE + 10
    pen.text((place.left(0), y), "red square: the centre patch", fill=FAINT, font=_font(14))
    pen.text((place.left(1), y), f"components of: {rows[-1].name}", fill=FAINT, font=_font(14))
    _scale(sheet, pen, (place.left(2), y), place.width, _range(norms))
    _scale(sheet, pen, (place.left(3), y), place.width, _range(similarities))
    return sheet


def _range(values: list[torch.Tensor]) -> tuple[float, float]:
    return min(float(v.min()) for v in values), max(float(v.max()) for v in values)


def _mark_centre(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], shape: torch.Size) -> None:
    """A frame around the patch in the middle of a cell that shows `shape[:2]` patches."""
    x, y, height, width = box[0], box[1], (box[3] - box[1]) / shape[0], (box[2] - box[0]) / shape[1]
    row, column = shape[0] // 2, shape[1] // 2
    frame = [x + column * width - 2, y + row * height - 2, x + (column + 1) * width + 1, y + (row + 1) * height + 1]
    pen.rectangle(frame, outline=MARK, width=2)


def _scale(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], width: int, ends: tuple[float, float]
) -> None:
    """A colour bar with the values of its ends."""
    ramp = heat(torch.linspace(0, 1, width).expand(BAR, width), 0.0, 1.0)
    sheet.paste(Image.fromarray(np.ascontiguousarray(ramp)), at)
    low, high = (f"{end:.3g}" for end in ends)
    y = at[1] + BAR + 4
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
