"""Frames of video files, read and written by imageio, of the extra extract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from timm_dvt.errors import UserError, printable

SUFFIXES = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv".split())


def video_frames(source: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, (H, W, 3) uint8, one at a time: those it holds, however long each is shown.

    Raises:
        UserError: it is none that can be read, or imageio is not installed.
    """
    try:
        reader = _reader(source)
    except ImportError:
        raise UserError(f"{source} needs the package imageio: pip install 'imageio[ffmpeg]'") from None
    except Exception as error:  # imageio's plugins each raise their own kinds
        said = printable((str(error).strip().splitlines() or [type(error).__name__])[-1])  # ffmpeg says much before
        raise UserError(f"{source} is no folder of frames and no video that can be read: {said}") from error
    with reader:
        for frame in reader:
            yield np.asarray(Image.fromarray(np.asarray(frame)).convert("RGB"))


def _reader(source: str | Path) -> Any:
    """A reader of imageio. Left alone, ffmpeg repeats and drops frames of a variable rate to make it a constant one."""
    import imageio.v2

    reader: Any = imageio.v2.get_reader(source)
    if not type(reader).__module__.endswith(".ffmpeg"):  # the others, of GIF say, take no options of ffmpeg
        return reader
    reader.close()
    try:
        return imageio.v2.get_reader(source, output_params=["-fps_mode", "passthrough"])
    except OSError as error:
        if "Unrecognized option 'fps_mode'" not in str(error):
            raise
        return imageio.v2.get_reader(source, output_params=["-vsync", "0"])  # its name before ffmpeg 5.1


def video_rate(source: str | Path, default: float = 10.0) -> float:
    """Frames a second of a video file, the mean of a variable rate; the default where it does not say."""
    import imageio.v2

    reader: Any = imageio.v2.get_reader(source)
    with reader:
        meta = reader.get_meta_data()
    milliseconds = meta.get("duration") if str(source).lower().endswith(".gif") else None
    return float(meta.get("fps") or (1000 / milliseconds if milliseconds else default))


def write_video(path: Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    """Write pictures (H, W, 3) uint8, of even sides, as a .gif or, by ffmpeg, as any other kind."""
    if path.suffix.lower() == ".gif":
        first, rest = Image.fromarray(next(pictures)), (Image.fromarray(picture) for picture in pictures)
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    import imageio.v2

    writer: Any = imageio.v2.get_writer(path, format="FFMPEG", fps=fps, quality=8, macro_block_size=2)
    with writer:
        for picture in pictures:
            writer.append_data(picture)
