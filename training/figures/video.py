"""Videos of features: frame, raw and denoised side by side, in one color projection (paper Fig. 3c)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from timm_dvt.errors import ImageError, UserError
from timm_dvt.extraction.video import video_frames, video_rate, write_video
from timm_dvt.image_files import decode_image, list_images, read_file
from timm_dvt.viewer.colors import fit_projection

FITTED_FRAMES = 8  # as many frames, evenly spread, decide the colors
CAPTIONS = ("frame", "raw features", "denoised")
Maps = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def read_frames(source: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, or the images of a folder sorted by name: (H, W, 3) uint8, one at a time.

    Raises:
        ValueError: neither, or a frame that cannot be read; the message names it.
    """
    if Path(source).is_dir():
        for image in list_images(source):
            try:
                yield to_bytes(decode_image(read_file(image.path)[0]))
            except ImageError as error:
                raise UserError(f"frame {image.name}: {error}") from error
        return
    yield from video_frames(source)


def draw_video(
    source: str | Path,
    out: str | Path,
    maps: Maps,
    *,
    fps: float | None = None,
    count: int | None = None,
    height: int = 320,
    progress: Callable[[float], object] | None = None,
) -> int:
    """Draw a video of frame, raw and denoised features. Frames are streamed: memory does not grow with them.

    Args:
        source: a folder of frames or a video file.
        out: .mp4 or .gif; appears when it is finished.
        maps: gives the raw and the denoised map, (K, K, C) each, of a frame (H, W, 3) uint8.
        fps: frames a second; None is the source's, or 10 of a folder.
        count: only the first so many frames, as `count_frames` counts them; None is all.
        height: of each picture, in pixels; the width follows from the first frame, into which those of another shape
            are fitted, between white bands.
        progress: called with 1 for each finished frame.

    Returns:
        The number of frames.

    Raises:
        ValueError: a source or suffix that cannot be.
    """
    out = check_suffix(out)
    count = count_frames(source) if count is None else count
    chosen = set(np.linspace(0, count - 1, min(count, FITTED_FRAMES)).round().astype(int).tolist())
    known = {i: maps(frame) for i, frame in enumerate(islice(read_frames(source), count)) if i in chosen}
    projection = fit_projection(np.stack([m for pair in known.values() for m in pair]))

    def pictures() -> Iterator[np.ndarray]:
        size = None
        for i, frame in enumerate(islice(read_frames(source), count)):
            raw, clean = known.pop(i) if i in known else maps(frame)
            sheet = Image.fromarray(side_by_side(frame, projection.colors(raw), projection.colors(clean), height))
            size = size or sheet.size
            yield np.asarray(ImageOps.pad(sheet, size, color="white"))
            if progress is not None:
                progress(1)

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.stem}.unfinished{out.suffix}")
    try:
        write_video(unfinished, pictures(), fps or (10.0 if Path(source).is_dir() else video_rate(source)))
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def check_suffix(out: str | Path) -> Path:
    """Where a video goes. Raises ValueError unless it can be written there by its suffix."""
    if Path(out).suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"out must end in .mp4 or .gif, got {out}")
    return Path(out)


def count_frames(source: str | Path, limit: int | None = None) -> int:
    """How many frames there are, by reading them: what a file says of itself is often wrong."""
    if Path(source).is_dir():
        return len(list_images(source, limit))
    count = sum(1 for _ in islice(read_frames(source), limit))
    if count == 0:
        raise UserError(f"{source} has no frames")
    return count


def side_by_side(frame: np.ndarray, raw: np.ndarray, clean: np.ndarray, height: int) -> np.ndarray:
    """Three pictures under their captions: frame (H, W, 3) uint8, colors (K, K, 3) in [0, 1] -> uint8.

    Maps take the frame's shape, patches unsmoothed. Sides are even, as video codecs want them.
    """
    width = 2 * max(1, round(height * frame.shape[1] / frame.shape[0] / 2))
    band, gap = 26, 6
    sheet = Image.new("RGB", (3 * width + 2 * gap, band + height + height % 2), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, picture) in enumerate(zip(CAPTIONS, (frame, to_bytes(raw), to_bytes(clean)))):
        smoothing = Image.Resampling.LANCZOS if i == 0 else Image.Resampling.NEAREST
        left = i * (width + gap)
        sheet.paste(Image.fromarray(picture).resize((width, height), smoothing), (left, band))
        font = ImageFont.load_default(size=15)
        draw.text((left + width / 2, band / 2), caption, fill="black", anchor="mm", font=font)
    return np.asarray(sheet)


def to_bytes(picture: np.ndarray | Tensor) -> np.ndarray:
    """(H, W, 3) array or (3, H, W) tensor in [0, 1] to (H, W, 3) uint8."""
    array = picture.permute(1, 2, 0).numpy() if isinstance(picture, Tensor) else picture
    return (array * 255).round().astype(np.uint8)
