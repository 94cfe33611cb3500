"""Views of sample images through a model, summed up: what `timm_dvt.calibrate` looks at."""

from collections.abc import Mapping
from typing import Any

import torch

from timm_dvt.bars import tqdm
from timm_dvt.calibration.positions import MOST_GROUPS, Position, PositionSums, Windows
from timm_dvt.calibration.samples import Source, blank, canvas
from timm_dvt.errors import CalibrationError
from timm_dvt.reading import LayerReader

WINDOWS = 8  # views of a canvas


def estimate_positions(
    reader: LayerReader,
    layers: Mapping[int, str],
    samples: list[Source] | None,
    views: int,
    tolerance: float,
    progress: bool,
) -> tuple[int, dict[int, Position]]:
    """Sum up canvases until the error is small enough or the views are spent; their number, and what they told.

    Args:
        layers: blocks, and by what name the reader gives the maps of each that are summed up.
    """
    windows = Windows.whole() if samples is None else Windows.draw(WINDOWS, (reader.grid[0] // 2, reader.grid[1] // 2))
    # Images of one group share no content with those of another. Below 4 images, canvases must do.
    groups = MOST_GROUPS if samples is None or not 4 <= len(samples) < MOST_GROUPS else len(samples)
    most = views // len(windows.places)
    sums = {block: PositionSums(windows, groups) for block in layers}
    check = groups
    with tqdm(total=most, unit="image", desc="calibrate", disable=not progress) as bar:
        for visit in range(most):
            image, inputs = view_inputs(reader, windows, samples, visit)
            for block, maps in read_blocks(reader, layers, inputs).items():
                sums[block].add(maps, image % groups)
            bar.update()
            if visit + 1 == check and visit + 1 < most:
                error = max(total.estimate().error for total in sums.values())
                bar.set_postfix_str(f"error {error:.0%}")
                if error <= tolerance:
                    break
                check += check
    return visit + 1, {block: total.estimate() for block, total in sums.items()}


def read_blocks(reader: LayerReader, layers: Mapping[int, str], inputs: torch.Tensor) -> dict[int, torch.Tensor]:
    """Maps (V, H, W, C) of inputs (V, channels, *size) by block; `layers` are the reader's names of them."""
    maps = reader(inputs)
    # In memory as (V, C, H, W), so that sums over places round alike, however the features of a family lie.
    return {block: maps[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for block, name in layers.items()}


def view_inputs(reader: Any, windows: Windows, samples: list[Source] | None, visit: int) -> tuple[int, torch.Tensor]:
    """The number by which an image is grouped, and its windows as the model's input (V, channels, *size)."""
    if samples is None:  # by turns of two kinds: two in a row make a fair sample of blank images
        return visit // 2, blank(reader.channels, reader.size, visit)[None]
    if reader.channels != 3:
        raise CalibrationError(f"The model takes images of {reader.channels} channels; use blank ones (no images).")
    height, width = (side + more * patch for side, more, patch in zip(reader.size, windows.margin, reader.patch))
    image = visit % len(samples) if len(samples) >= 4 else visit
    part = reader.normalized(canvas(samples[visit % len(samples)], (height, width), visit))
    return image, torch.stack([_cut(part, place, reader) for place in windows.places])


def _cut(part: torch.Tensor, place: tuple[int, int, tuple[int, ...]], reader: Any) -> torch.Tensor:
    y, x = place[0] * reader.patch[0], place[1] * reader.patch[1]
    return part[:, y : y + reader.size[0], x : x + reader.size[1]].flip([axis - 2 for axis in place[2]])
