"""Draws the picture at the head of the README: what position alone does to features, with the denoiser off and on.

    python -m training.picture --images photos --examples more --out hub_cards/off_and_on.png

Two things show position and nothing else: an image of one color, and the mean map of many photographs, of whose windows
half are mirrored and half upside down, so that what photographs have in common at a place cancels
(`timm_dvt.inspect`). They are the first of the folder by name, none is chosen. Both states of a map have
one projection to colors, fitted on both together, and one scale: a map without a pattern is of one color.

Below them one photograph of --examples, segmented from labels on one side (`training.evaluate one-sided`): of those
whose two classes features tell apart, the one in which the denoiser helps most, with the mean over all beside it.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import timm_dvt
from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.image_files import list_images, load_image
from timm_dvt.options import at_least
from timm_dvt.variants import DEFAULT_MODEL
from timm_dvt.viewer.demo import load_denoised
from timm_dvt.weights.files import write_whole
from training.common.command import command_parser, complain
from training.evaluate.features.extractor import Extractor
from training.evaluate.segmentation.one_sided import (
    color_groups,
    counts,
    even_share,
    labeled_patches,
    spread_labels,
    wrong_shares,
)

SCALE = 2  # pixels of the file a pixel of a repository's page, for screens of twice the density
WIDTH, TILE, GAP, MARGIN = 838, 190, 8, 15
REACH = 2.5  # deviations from the middle of a color's range to its end
INK, FAINT, PAPER = (20, 22, 26), (95, 100, 108), (255, 255, 255)
CLASSES = np.array([(214, 94, 0), (0, 114, 178)], np.uint8)  # orange and blue, told apart by everyone
STATES = "DINOv2", "with timm-dvt"
APART = 0.05  # of patches that get the wrong class from even labels, at most, for classes that features tell apart
Pair = tuple[np.ndarray, np.ndarray]  # with the denoiser off and on


@dataclass
class Example:
    """A photograph segmented from labels on one side.

    Attributes:
        name: of its file.
        photograph: as the model sees it, (S, S, 3) bytes.
        labels: (K, K, 3) bytes, white where there is none.
        predicted: (K, K, 3) bytes each.
        wrong: shares of the patches asked for, off and on.
        means: the same over all photographs, and its gain's standard error.
        count: of those.
    """

    name: str
    photograph: np.ndarray
    labels: np.ndarray
    predicted: Pair
    wrong: tuple[float, float]
    means: tuple[float, float, float]
    count: int


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        files = [source.path for source in list_images(args.images, args.number)]
        model: Any = load_denoised(args.model)
        report = timm_dvt.inspect(model, files, blocks=[-1], views=8 * args.number, progress=True)
        off, on, maps = report.layer(denoised=False), report.layer(denoised=True), report.pictures
        captions = (
            ("A plain gray wall", f"pattern left: {max(0, on.flat.pattern.value / off.flat.pattern.value):.2%}"),
            ("The mean of many photographs", f"position explains {off.share.value:.1%}, then {on.share.value:.1%}"),
        )
        pairs = (maps.flat[off.name], maps.flat[on.name]), (maps.means[off.name], maps.means[on.name])
        sheet = draw_row(2 * STATES, [tile for pair in pairs for tile in in_colors(*pair)], captions)
        if args.examples:
            example = find_example(Extractor(model), [source.path for source in list_images(args.examples)])
            sheet = below(sheet, draw_example(example))
            off_mean, on_mean, error_of_gain = example.means
            print(
                f"labels on one side, {example.count} photographs: {off_mean:.2%} wrong off, {on_mean:.2%} on, a gain "
                f"of {off_mean - on_mean:.2%} +- {error_of_gain:.2%}; {example.name} is drawn"
            )
        content = io.BytesIO()
        sheet.save(content, format="PNG", optimize=True)
        write_whole(Path(args.out), lambda path: path.write_bytes(content.getvalue()))
    except (UserError, OSError) as error:
        return complain(2, error)
    print(f"wrote {args.out}; position explains {off.share.value:.2%} off, {on.share.value:.2%} on")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("picture", __doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="photographs of many kinds")
    parser.add_argument("--number", type=at_least(4), default=32, metavar="N", help="of them (default: %(default)s)")
    parser.add_argument("--examples", metavar="DIR", help="photographs, of which one is shown (default: none)")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="a variant (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="a PNG")
    return parser


def draw_row(
    headings: Sequence[str],
    tiles: Sequence[np.ndarray],
    captions: Sequence[tuple[str, str]],
    framed: bool = False,
) -> Image.Image:
    """Two pairs of tiles (H, W, 3) of bytes under their headings, over a title and a line of numbers for each pair."""
    side, gap, margin = SCALE * TILE, SCALE * GAP, SCALE * MARGIN
    head, foot = SCALE * 34, SCALE * 64
    sheet = Image.new("RGB", (SCALE * WIDTH, head + side + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    pairs = margin, SCALE * WIDTH - margin - 2 * side - gap
    places = [x for left in pairs for x in (left, left + side + gap)]
    for x, heading, tile in zip(places, headings, tiles, strict=True):
        pen.text((x, SCALE * 4), heading, fill=INK, font=_font(21))
        how = Image.Resampling.NEAREST if len(tile) < side else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(tile).resize((side, side), how), (x, head))
        if framed:
            pen.rectangle((x, head, x + side - 1, head + side - 1), outline=FAINT)
    for x, (title, numbers) in zip(pairs, captions, strict=True):
        pen.text((x, head + side + SCALE * 6), title, fill=INK, font=_font(22))
        pen.text((x, head + side + SCALE * 34), numbers, fill=FAINT, font=_font(20))
    return sheet


def find_example(extractor: Extractor, files: Sequence[Path]) -> Example:
    """The photograph of the rule above, and the mean over all that count.

    Raises:
        UserError: there is none.
    """
    best: Any = None
    most, shares = -np.inf, []
    for path in tqdm(files, "examples", unit=" photographs"):
        image = extractor.resize(load_image(path))
        groups = color_groups(image, extractor.reader.grid)
        if not counts(groups):
            continue
        raw = extractor.backbone(image[None])["raw"].cpu()
        states = raw[0], extractor.denoise(raw, image[None])[0].cpu()
        off, on = (np.array(wrong_shares(state, groups)) for state in states)
        shares.append((off.mean(), on.mean()))
        first = int((off - on).argmax())
        if off[first] - on[first] > most and all(even_share(state, groups) <= APART for state in states):
            most, best = off[first] - on[first], (path, image, groups, states, first, (off[first], on[first]))
    if best is None:
        raise UserError("none of the --examples has two groups of color on both sides that features tell apart")
    path, image, groups, states, first, shown = best
    means, gains = np.mean(shares, 0), -np.diff(shares)
    labeled, _ = labeled_patches(groups, first)
    off_map, on_map = (in_classes(spread_labels(state, groups, labeled)) for state in states)
    return Example(
        name=path.name,
        photograph=(255 * image).round().byte().permute(1, 2, 0).numpy(),
        labels=np.where(labeled[..., None], in_classes(groups), 255).astype(np.uint8),
        predicted=(off_map, on_map),
        wrong=shown,
        means=(*means, float(gains.std() / len(gains) ** 0.5)),
        count=len(shares),
    )


def in_classes(groups: Tensor) -> np.ndarray:
    """Groups (H, W) as bytes (H, W, 3)."""
    return CLASSES[groups.numpy()]


def draw_example(example: Example) -> Image.Image:
    """Photograph, labels, and what becomes of them off and on."""
    (off, on), (off_mean, on_mean, _) = example.wrong, example.means
    return draw_row(
        ("A photograph", "Labels given", *STATES),
        (example.photograph, example.labels, *example.predicted),
        (
            ("Each class labeled on one side", f"the best of {example.count} photographs"),
            (f"wrong patches: {off:.0%}, then {on:.0%}", f"mean of all: {off_mean:.1%}, then {on_mean:.1%}"),
        ),
        framed=True,
    )


def below(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Two sheets of one width as one."""
    between = SCALE * 14
    sheet = Image.new("RGB", (upper.width, upper.height + between + lower.height), PAPER)
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height + between))
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
