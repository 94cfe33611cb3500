"""training.denoise_images as tests of it call it: images, small settings, and what it leaves in its folder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from training import denoise_images

SMALL = ["--model", "test_vit", "--no-pretrained", "--input-size", "64", "--views", "24"]
SLOW = [*SMALL[:-1], "200"]  # long enough to be killed in the middle


def draw_images(folder: Path) -> Path:
    """Six images in two folders, names repeated."""
    generator = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png", "c.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(path)
    return folder


def run(images: Path, out: Path, *options: str) -> int:
    """The command in this process; returns its exit code."""
    return denoise_images.main([*SMALL, "--images", str(images), "--out", str(out), *options])


def contents(out: Path) -> dict[str, bytes]:
    """All files of an output folder; the index sorted, because its lines are in the order of finishing."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files["index.jsonl"] = b"".join(sorted(files["index.jsonl"].splitlines(keepends=True)))
    return files


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
