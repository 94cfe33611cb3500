"""Feature maps as pictures: three principal components as colors, of one basis over all images or frames."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from timm_dvt.bars import tqdm
from timm_dvt.extraction.basis import Basis
from timm_dvt.extraction.formats import Record, file_of
from timm_dvt.extraction.reader import open_features
from timm_dvt.extraction.video import video_rate
from timm_dvt.extraction.video import write_video as encode
from timm_dvt.image_files import PICTURES
from timm_dvt.shared_folder import write_atomically
from timm_dvt.viewer.colors import Projection
from timm_dvt.weights.files import write_whole

VIDEO = "pictures.mp4"
SIDE = 448  # pixels of the longer side, about


def picture(colors: Mapping[str, Projection], maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Maps (H, W, C) by variable, side by side: (h, w, 3) uint8, patches unsmoothed, sides even."""
    drawn = [(colors[key].colors(features) * 255).round().astype(np.uint8) for key, features in maps.items()]
    times = 2 * max(1, SIDE // max(drawn[0].shape[:2]) // 2)
    return np.concatenate(drawn, axis=1).repeat(times, 0).repeat(times, 1)


def write_pictures(
    out: Path, records: Sequence[Record], values: Mapping[str, Mapping[int, np.ndarray]], basis: Basis, default: str
) -> None:
    """Write a picture of each image of a shard: the variables that begin with `default`, on and off side by side."""
    keys = shown(basis, default)
    for place, record in enumerate(records):
        path = out / PICTURES / file_of(record["name"], ".png")
        if place not in values[default]:
            path.unlink(missing_ok=True)  # of what the image was before
            continue
        buffer = io.BytesIO()
        Image.fromarray(picture(basis.colors, {key: values[key][place] for key in keys})).save(buffer, "PNG")
        write_atomically(path, buffer.getvalue())


def write_video(out: Path, source: Path, basis: Basis, default: str, progress: bool) -> None:
    """Write the video of a video's maps, once."""
    if (out / VIDEO).exists():
        return
    maps = {key: open_features(out, key) for key in shown(basis, default)}

    def frames() -> Iterator[np.ndarray]:
        for name in tqdm(maps[default], desc="video", unit="frame", leave=False, disable=not progress):
            yield picture(basis.colors, {key: features[name] for key, features in maps.items()})

    unfinished = out / f".unfinished-{VIDEO}"  # of the suffix by which the format is known
    write_whole(out / VIDEO, lambda _: encode(unfinished, frames(), video_rate(source)), unfinished)


def shown(basis: Basis, default: str) -> list[str]:
    """The variables of a picture: the default one, and the same with the denoiser off."""
    return [key for key in basis.colors if key in (default, f"{default}_raw")]
