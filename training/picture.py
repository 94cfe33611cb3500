"""Draws the picture at the head of the README: what position alone does to features, with the denoiser off and on.

    python -m training.picture --images photos --out hub_cards/off_and_on.png

Two things show position and nothing else: an image of one color, and the mean map of many photographs, of whose windows
half are mirrored and half upside down, so that what photographs have in common at a place cancels
(`timm_dvt.inspect`). They are the first of the folder by name, none is chosen. Both states of a map have
one projection to colors, fitted on both together, and one scale: a map without a pattern is of one color.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import timm_dvt
from timm_dvt.errors import UserError
from timm_dvt.image_files import list_images
from timm_dvt.variants import DEFAULT_MODEL
from timm_dvt.viewer.demo import load_denoised
from timm_dvt.weights.files import write_whole
from training.common.command import command_parser, complain, positive

SCALE = 2  # pixels of the file a pixel of a repository's page, for screens of twice the density
WIDTH, TILE, GAP, MARGIN = 838, 190, 8, 15
REACH = 2.5  # deviations from the middle of a color's range to its end
INK, FAINT, PAPER = (20, 22, 26), (95, 100, 108), (255, 255, 255)
STATES = "DINOv2", "with timm-dvt"
Pair = tuple[np.ndarray, np.ndarray]  # with the denoiser off and on


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        files = [source.path for source in list_images(args.images, args.number)]
        model: Any = load_denoised(args.model)
        report = timm_dvt.inspect(model, files, blocks=[-1], views=8 * args.number, progress=True)
        off, on, maps = report.layer(denoised=False), report.layer(denoised=True), report.pictures
        captions = (
            ("A plain gray wall", f"pattern left: {on.flat.pattern.value / off.flat.pattern.value:.2%}"),
            ("The mean of many photographs", f"position explains {off.share.value:.1%}, then {on.share.value:.1%}"),
        )
        pairs = (maps.flat[off.name], maps.flat[on.name]), (maps.means[off.name], maps.means[on.name])
        content = io.BytesIO()
        draw(captions, [in_colors(*pair) for pair in pairs]).save(content, format="PNG", optimize=True)
        write_whole(Path(args.out), lambda path: path.write_bytes(content.getvalue()))
    except (UserError, OSError) as error:
        return complain(2, error)
    print(f"wrote {args.out}; position explains {off.share.value:.2%} off, {on.share.value:.2%} on")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("picture", __doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="photographs of many kinds")
    parser.add_argument("--number", type=positive, default=32, metavar="N", help="of them (default: %(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="a variant (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="a PNG")
    return parser


def draw(captions: Sequence[tuple[str, str]], tiles: Sequence[Pair]) -> Image.Image:
    """Pairs of tiles (H, W, 3) of bytes side by side, off and on, over a title and a line of numbers for each pair."""
    side, gap, margin = SCALE * TILE, SCALE * GAP, SCALE * MARGIN
    head, foot = SCALE * 34, SCALE * 64
    sheet = Image.new("RGB", (SCALE * WIDTH, head + side + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    between = SCALE * WIDTH - 2 * margin - 4 * side - 2 * gap
    for number, ((title, numbers), pair) in enumerate(zip(captions, tiles, strict=True)):
        left = margin + number * (2 * side + gap + between)
        for place, (state, tile) in enumerate(zip(STATES, pair)):
            x = left + place * (side + gap)
            pen.text((x, SCALE * 4), state, fill=INK, font=_font(21))
            sheet.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST), (x, head))
        pen.text((left, head + side + SCALE * 6), title, fill=INK, font=_font(22))
        pen.text((left, head + side + SCALE * 34), numbers, fill=FAINT, font=_font(20))
    return sheet


def in_colors(*pair: np.ndarray) -> Pair:
    """Both maps (H, W, C) as bytes (H, W, 3): three principal components of both together, about each one's mean."""
    flat = [(state - state.mean((0, 1))).reshape(-1, state.shape[-1]).astype(np.float64) for state in pair]
    both = np.concatenate(flat)
    _, vectors = np.linalg.eigh(both.T @ both)
    axes = vectors[:, :-4:-1]
    reach = REACH * max(float(np.sqrt(np.square(rows @ axes).mean())) for rows in flat)
    colors = [((rows @ axes / reach + 1) / 2).clip(0, 1) for rows in flat]
    first, second = ((255 * color).round().astype(np.uint8).reshape(*pair[0].shape[:2], 3) for color in colors)
    return first, second


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=SCALE * size)


if __name__ == "__main__":
    raise SystemExit(main())
