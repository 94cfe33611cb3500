"""The files that stamps are composed of, in the layout of the Debian packages, made up."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from training.common.stamp_sources import STAMP_CLASSES


def fabricate(root: Path) -> Path:
    """Fill a folder like /usr/share: gray photographs, cut-outs of one color a class, squares of clothing."""
    noise = np.random.default_rng(0)
    for number in range(8):
        path = root / "wallpapers" / f"Photo{number}" / "contents" / "images" / "500x400.png"
        path.parent.mkdir(parents=True)
        gray = noise.integers(0, 255, (400, 500, 1), np.uint8)
        Image.fromarray(np.repeat(gray, 3, 2)).save(path)
    (root / "backgrounds").mkdir()
    for label, folders in enumerate(STAMP_CLASSES.values(), 1):
        folder = root / "tuxpaint" / "stamps" / folders[0] / "deeper"
        folder.mkdir(parents=True)
        for number in range(8):
            # The class in red, the source in green, so that a pixel says what it is a picture of.
            stamp = np.zeros((40, 60, 4), np.uint8)
            stamp[5:35, 5:55] = (10 * label, 30 * number, 100, 255)
            Image.fromarray(stamp).save(folder / f"{label}_{number}.png")
    clothes = root / "datasets" / "fashion-mnist"
    clothes.mkdir(parents=True)
    for split, value in (("train", 100), ("t10k", 200)):
        images = np.zeros((20, 28, 28), np.uint8)
        images[:, 4:24, 6:22] = value
        with gzip.open(clothes / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.tobytes())
        with gzip.open(clothes / f"{split}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + bytes(range(10)) * 2)
    return root
