"""Images with exact class masks, composed of cut-outs on photographs: python -m training.stamps --out DIR

    DIR/classes.txt                     a class a line; the first is the background
    DIR/settings.json                   what made the folder: images of other settings are refused
    DIR/{train,val}/images/00000.png    RGB, 518 x 518
    DIR/{train,val}/masks/00000.png     8 bits: the class of each pixel
    DIR/{train,val}/objects.json        {"00000": [{"class": 3, "box": [x0, y0, x1, y1]}, ...]}, pixels, x1 and y1
                                        exclusive, around what is visible of each object

Objects are placed uniformly: their place says nothing of their class. With `--places class` it says much, as in a
street, where the sky is above and the road below: each class keeps to a height of its own. There position is of use,
and features that have lost it are at a disadvantage. Photographs, cut-outs and clothing items of the validation split
are in no training image. Every image is a function of seed, split, places and number alone.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.options import at_least
from timm_dvt.shared_folder import OutputError, SettingsDiffer, SharedFolder, write_atomically
from training.common.command import command_parser, whole
from training.common.stamp_sources import CLASSES, SHARE, SPLITS, STAMP_CLASSES, Sources, SourcesMissing, load_sources

PLACES = ("any", "class")
SIZE = 518  # 37 patches of 14 pixels: the grid of the denoisers of DINOv2
_OBJECTS = (2, 5)  # in an image
_LONGER_SIDE = (0.3, 0.8)  # of an object, of the image's side
_TURN = 20.0  # degrees at most
_BAND = 0.06  # standard deviation of the height of a class, of the image's side, with places="class"
_SMALLEST = 0.0017  # of the image, what must be visible of an object that objects.json lists
_CLOTHING = 24  # brightness from which a Fashion-MNIST pixel is clothing; its ground is 0, its noise below 10


@dataclass(frozen=True)
class Stamped:
    """One composed image.

    Attributes:
        image: (S, S, 3) uint8.
        mask: (S, S) uint8, class of each pixel, 0 is background.
        objects: (class, (x0, y0, x1, y1)) of each visible object.
    """

    image: np.ndarray
    mask: np.ndarray
    objects: list[tuple[int, tuple[int, int, int, int]]]


class Composer:
    """Composes the images of a split; `Composer("val")[7]` is always the same image.

    Args:
        split: "train" or "val".
        seed: another seed composes other images of the same sources.
        sources: where they come from; by default the Debian packages' files.
        size: S, side of the images in pixels.
        places: "any", or "class": each class has a height of its own, the first listed at the top.

    Raises:
        SourcesMissing: a package is not installed.
        ValueError: no such places.
    """

    def __init__(
        self, split: str, seed: int = 0, sources: Sources | None = None, size: int = SIZE, places: str = "any"
    ) -> None:
        if places not in PLACES:
            raise UserError(f"places must be one of {PLACES}, got {places!r}")
        self.sources = load_sources(split, size=size) if sources is None else sources
        self.size, self.places = size, places
        self._key = (seed, SPLITS.index(split))

    def __getitem__(self, index: int) -> Stamped:
        draw = np.random.default_rng([*self._key, index])
        image = self._photo(draw)
        owner = np.zeros((self.size, self.size), np.uint8)
        classes = [0]
        for _ in range(draw.integers(*_OBJECTS, endpoint=True)):
            label, item = self._object(draw)
            left, top = (int(draw.integers(self.size)) - side // 2 for side in item.size)
            if self.places == "class":
                height = (label - 0.5) / (len(CLASSES) - 1) + _BAND * draw.standard_normal()
                top = int(np.clip(height, 0, 1) * self.size) - item.height // 2
            image.paste(item, (left, top), item)
            shape = np.asarray(item.getchannel("A")) > 127
            here = owner[max(top, 0) : top + item.height, max(left, 0) : left + item.width]
            shape = shape[max(-top, 0) :, max(-left, 0) :][: here.shape[0], : here.shape[1]]
            here[shape] = len(classes)
            classes.append(label)
        objects = []
        for number, label in enumerate(classes[1:], 1):
            ys, xs = np.nonzero(owner == number)
            if len(ys) >= _SMALLEST * self.size**2:
                box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
                objects.append((label, box))
        return Stamped(np.array(image), np.array(classes, np.uint8)[owner], objects)

    def _photo(self, draw: np.random.Generator) -> Image.Image:
        photo = self.sources.photos[draw.integers(len(self.sources.photos))]
        side = draw.uniform(0.4, 1.0) * min(photo.size)
        left, top = draw.uniform(0, photo.width - side), draw.uniform(0, photo.height - side)
        crop = photo.resize((self.size, self.size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop

    def _object(self, draw: np.random.Generator) -> tuple[int, Image.Image]:
        """A class, all being equally likely, and one of its objects (RGBA), resized, flipped, turned, lit."""
        label = int(draw.integers(1, len(CLASSES)))
        if label <= len(STAMP_CLASSES):
            stamps = self.sources.stamps[label - 1]
            item = stamps[draw.integers(len(stamps))]
        else:
            photos = self.sources.clothes[label - 1 - len(STAMP_CLASSES)]
            item = _tinted(photos[draw.integers(len(photos))], draw.uniform(0.3, 1.0, 3))
        scale = draw.uniform(*_LONGER_SIDE) * self.size / max(item.size)
        item = item.resize(
            (max(round(item.width * scale), 1), max(round(item.height * scale), 1)), Image.Resampling.BICUBIC
        )
        if draw.random() < 0.5 and CLASSES[label] not in ("letter", "sign"):
            item = item.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        item = item.rotate(draw.uniform(-_TURN, _TURN), Image.Resampling.BILINEAR, expand=True)
        return label, ImageEnhance.Brightness(item).enhance(draw.uniform(0.7, 1.2))


def _tinted(photo: np.ndarray, tint: np.ndarray) -> Image.Image:
    """A clothing item (28, 28) in a color, RGBA, its dark ground transparent."""
    rgba = np.empty((28, 28, 4), np.uint8)
    rgba[..., :3] = photo[..., None] * tint
    rgba[..., 3] = 255 * (photo >= _CLOTHING)
    return Image.fromarray(rgba, "RGBA")


def write_split(folder: Path, composer: Composer, count: int) -> None:
    """Write `count` images, their masks and objects.json; what is there already is not made again."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    listed = folder / "objects.json"
    objects = json.loads(listed.read_text()) if listed.exists() else {}  # of more images, maybe
    for index in tqdm(range(count), desc=folder.name, unit=" images"):
        stamped, name = composer[index], f"{index:05d}"
        objects[name] = [{"class": label, "box": list(box)} for label, box in stamped.objects]
        for kind, pixels in (("images", stamped.image), ("masks", stamped.mask)):
            path = folder / kind / f"{name}.png"
            if not path.exists():
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG", compress_level=1)
                write_atomically(path, png.getvalue())
    write_atomically(listed, json.dumps(objects).encode())


def main(argv: list[str] | None = None) -> int:
    """Write the dataset; returns 0, or 1 with a line that says what to do."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.size > 4096:
        parser.error("--size must be from 32 to 4096")
    try:
        sources = [load_sources(split, args.share, args.size) for split in SPLITS]
        with SharedFolder(args.out) as folder:  # more images may follow, of the same settings
            folder.settle({"seed": args.seed, "size": args.size, "places": args.places}, begun=SPLITS[0])
        for split, count, split_sources in zip(SPLITS, (args.train, args.val), sources):
            write_split(args.out / split, Composer(split, args.seed, split_sources, args.size, args.places), count)
        write_atomically(args.out / "classes.txt", "".join(f"{name}\n" for name in CLASSES).encode())
    except (SourcesMissing, SettingsDiffer, OutputError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = command_parser("stamps", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--train", type=whole, default=2000, metavar="N", help="training images (%(default)s)")
    parser.add_argument("--val", type=whole, default=500, metavar="N", help="validation images (%(default)s)")
    parser.add_argument("--seed", type=whole, default=0, help="another seed, other images of the same sources")
    parser.add_argument(
        "--size", type=at_least(32), default=SIZE, metavar="PX", help="side of the images (%(default)s)"
    )
    parser.add_argument(
        "--places", choices=PLACES, default="any", help="class: the height of an object tells its class (%(default)s)"
    )
    parser.add_argument("--share", default=SHARE, metavar="DIR", help="where the packages are installed (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
