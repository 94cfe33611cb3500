"""The demo's picture: for each photograph a row with the denoiser off and one with it on, drawn with Pillow.

It is drawn twice as large as a repository's page shows it (838 pixels wide), and its words can be read at half of that.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from timm_dvt.viewer import pairs
from timm_dvt.viewer.colors import heat

WIDTH, MARGIN, GAP, BAR = 2 * 838, 28, 20, 18
TALLEST = 1.4  # of a cell's width: a portrait's maps are narrower, so that both states are seen at once
TITLE, TEXT, LINE = 50, 40, 52  # pixels: sizes of type, and from line to line
INK, FAINT, PAPER, MARK, WARNING = (20, 22, 26), (86, 91, 98), (255, 255, 255), (235, 45, 60), (176, 60, 0)
TITLES = {"colors": "colors", "similarities": "similarity", "groups": "groups", "lengths": "length"}
LEGEND = (
    "Colors: principal components of both maps together. Similarity: to the patch in the red frame, the mean of each "
    "map taken off. Groups: k-means of both maps. Removed: off minus on, and its size beside the features' own."
)


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
    clusters: int = pairs.CLUSTERS


def draw(shown: Sequence[Shown], title: str, lines: Sequence[str], note: str = "") -> Image.Image:
    """Two rows for each photograph: its features with the denoiser off, and on; beside them, once, the photograph.

    Both states have one projection, one scale and one set of groups (`timm_dvt.viewer.pairs`). Groups are left out
    where k-means finds others from other seeds, lengths where the denoiser keeps them.

    Args:
        shown: of one grid or of several.
        title, lines: above the rows, wrapped to the width. note: a warning, above them too.
    """
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [(line, TITLE, INK) for line in _wrapped(pen, title, TITLE)] if title else []
    texts += [(line, TEXT, FAINT) for line in _wrapped(pen, " ".join(lines), TEXT)]
    texts += [(line, TEXT, WARNING) for line in _wrapped(pen, note, TEXT)]
    legend = [(line, TEXT, FAINT) for line in _wrapped(pen, LEGEND, TEXT)]
    parts = [_words(texts), *(_block(example) for example in shown), _words(legend)]
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts) + MARGIN), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _block(shown: Shown) -> Image.Image:
    """A photograph, what was removed of its features below it, and the maps of both states."""
    rows, columns = shown.off.shape[:2]
    maps, patch = (shown.off, shown.on), shown.patch or pairs.center(shown.off)
    drawn: dict[str, tuple[pairs.Pair, pairs.Scale | None]] = {
        "colors": (pairs.colors(*maps), None),
        "similarities": pairs.similarities(*maps, patch),
    }
    groups, agreement = pairs.groups(*maps, shown.clusters)
    if agreement >= pairs.AGREEING:
        drawn["groups"] = groups, None
    if not pairs.have_one_length(*maps):  # two maps alike would say nothing
        drawn["lengths"] = pairs.lengths(*maps)
    pitch = (WIDTH - 2 * MARGIN + GAP) // (1 + len(drawn))
    side = max(1, min((pitch - GAP) // columns, int((pitch - GAP) * TALLEST) // rows))  # all patches are drawn alike
    width, height = side * columns, side * rows
    tops = 2 * LINE, 3 * LINE + height
    sheet = Image.new("RGB", (WIDTH, tops[1] + height + LINE + 2 * BAR), PAPER)
    pen = ImageDraw.Draw(sheet)
    removed = as_image(pairs.removed(*maps)[0][0]).resize((width, height), Image.Resampling.NEAREST)
    first = shown.image.resize((width, height), Image.Resampling.LANCZOS), removed
    lefts = [MARGIN + i * pitch for i in range(1 + len(drawn))]
    off, on = pairs.centered(*maps)
    share = float(((off - on) ** 2).sum() / max((off**2).sum(), 1e-30)) ** 0.5
    states = zip(("denoiser off", "denoiser on"), shown.remarks)
    for row, (top, words, (state, remark)) in enumerate(zip(tops, ("photograph", f"removed {share:.0%}"), states)):
        pen.text((lefts[0], top - LINE), words, fill=FAINT, font=_font(TEXT))
        sheet.paste(first[row], (lefts[0], top))
        pen.text((lefts[1], top - LINE), state, fill=INK, font=_font(TEXT))
        pen.text(
            (lefts[1] + pen.textlength(f"{state}  ", _font(TEXT)), top - LINE), remark, fill=FAINT, font=_font(TEXT)
        )
        for left, (name, (pair, _)) in zip(lefts[1:], drawn.items()):
            sheet.paste(as_image(pair[row]).resize((width, height), Image.Resampling.NEAREST), (left, top))
            if name == "similarities":
                _mark(pen, (left, top), side, patch)
    _mark(pen, (lefts[0], tops[0]), side, patch)
    for left, (name, (_, ends)) in zip(lefts[1:], drawn.items()):
        pen.text((left, 0), TITLES[name], fill=INK, font=_font(TEXT))
        if ends is not None:
            _scale(sheet, pen, (left, tops[1] + height + BAR // 2), width, ends)
    return sheet


def as_image(colors: np.ndarray) -> Image.Image:
    """Colors (H, W, 3) in [0, 1] as an image of as many pixels."""
    return Image.fromarray((colors * 255).round().astype(np.uint8))


def _mark(pen: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, patch: tuple[int, int]) -> None:
    """A frame around a patch (row, column) of a cell."""
    x, y = corner[0] + patch[1] * side, corner[1] + patch[0] * side
    pen.rectangle([x - 5, y - 5, x + side + 4, y + side + 4], outline=MARK, width=5)


def _scale(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int], width: int, ends: tuple[float, float]
) -> None:
    """A color bar with the values of its ends."""
    sheet.paste(as_image(heat(np.broadcast_to(np.linspace(0, 1, width), (BAR, width)), 0.0, 1.0)), at)
    low, high = (f"{end:.2g}" for end in ends)
    y = at[1] + BAR
    pen.text((at[0], y), low, fill=FAINT, font=_font(TEXT))
    pen.text((at[0] + width - pen.textlength(high, _font(TEXT)), y), high, fill=FAINT, font=_font(TEXT))


def _words(lines: Sequence[tuple[str, int, tuple[int, int, int]]]) -> Image.Image:
    """Lines of text, their sizes and colors, as a part of the sheet."""
    part = Image.new("RGB", (WIDTH, MARGIN + sum(size + 12 for _, size, _ in lines)), PAPER)
    pen, top = ImageDraw.Draw(part), MARGIN // 2
    for text, size, ink in lines:
        pen.text((MARGIN, top), plain(text), fill=ink, font=_font(size))
        top += size + 12
    return part


def _wrapped(pen: ImageDraw.ImageDraw, text: str, size: int) -> list[str]:
    """The text in lines that fit the width; of a word that alone does not, the middle is left out."""
    lines: list[str] = []
    for word in text.split():
        whole = word
        while pen.textlength(word, _font(size)) > WIDTH - 2 * MARGIN:
            half = (len(word) - 4) // 2
            word = f"{whole[:half]}...{whole[len(whole) - half :]}"
        if lines and pen.textlength(f"{lines[-1]} {word}", _font(size)) <= WIDTH - 2 * MARGIN:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def plain(text: str) -> str:
    """The text in letters of the font that comes with Pillow: Zurich of Zürich, and ? of what has no such."""
    apart = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if c.isascii() else "?" for c in apart)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
