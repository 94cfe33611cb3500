"""Views of sample images through a model, summed up: what `timm_dvt.calibrate` looks at."""

from typing import Any

import torch
from timm.data import resolve_model_data_config

from timm_dvt.bars import tqdm
from timm_dvt.calibration.positions import MOST_GROUPS, Position, PositionSums, Windows
from timm_dvt.calibration.samples import Source, blank, canvas
from timm_dvt.errors import CalibrationError
from timm_dvt.layouts import meant_size

WINDOWS = 8  # views of a canvas


class ViewReader:
    """Reads what the denoisers of a model give; new static ones, which are the identity, give what they see.

    Attributes:
        size: (height, width) of an input, in pixels.
        grid: (H, W) of the maps.
        views: how many were read.
    """

    def __init__(self, model: Any, batch_size: int, size: tuple[int, int] | None = None) -> None:
        """
        Args:
            size: of an input; default what the model is meant for.
        """
        self.model, self.batch_size, self.views = model, batch_size, 0
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        config = resolve_model_data_config(model)
        self.size = size or meant_size(model)
        self.channels = getattr(model, "in_chans", 3)
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.blocks = sorted(model.denoisers())
        zeros = torch.zeros(1, self.channels, *self.size)
        rows, columns = self(zeros)[self.blocks[-1]].shape[1:3]
        self.grid = (rows, columns)
        self.views = 0  # the one of zeros was to learn the grid
        self.patch = tuple(side // count for side, count in zip(self.size, self.grid))

    def normalized(self, image: torch.Tensor) -> torch.Tensor:
        """An RGB image (3, h, w) in [0, 1] as the model takes it."""
        return (image - self.mean) / self.std

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> dict[int, torch.Tensor]:
        """Inputs (V, channels, *size), normalized, to maps (V, H, W, C) by block, float32."""
        read = []
        # Inner blocks are read as they leave them. The last one's is normed in any case, but with norm=True it is timm
        # that norms, prefix tokens and all, as in forward_features.
        norm = self.blocks == [self.model.final_block]
        for batch in inputs.split(self.batch_size):
            batch = batch.to(self.device, self.dtype)
            maps = self.model.forward_intermediates(batch, indices=self.blocks, norm=norm, intermediates_only=True)
            read.append(maps)
        self.views += len(inputs)
        layers = {block: torch.cat(parts).permute(0, 2, 3, 1).float() for block, parts in zip(self.blocks, zip(*read))}
        for block, tokens in layers.items():
            if not torch.isfinite(tokens).all():
                raise CalibrationError(
                    f"Features of block {block} are not finite, in {self.dtype}; calibrate in float32 and convert then."
                )
        return layers


def estimate_positions(
    reader: ViewReader, samples: list[Source] | None, views: int, tolerance: float, progress: bool
) -> tuple[int, dict[int, Position]]:
    """Sum up canvases until the error is small enough or the views are spent; their number, and what they told."""
    windows = Windows.whole() if samples is None else Windows.draw(WINDOWS, (reader.grid[0] // 2, reader.grid[1] // 2))
    # Images of one group share no content with those of another. Below 4 images, canvases must do.
    groups = MOST_GROUPS if samples is None or not 4 <= len(samples) < MOST_GROUPS else len(samples)
    most = views // len(windows.places)
    sums = {block: PositionSums(windows, groups) for block in reader.blocks}
    check = groups
    with tqdm(total=most, unit="image", desc="calibrate", disable=not progress) as bar:
        for visit in range(most):
            image, inputs = view_inputs(reader, windows, samples, visit)
            for block, maps in reader(inputs).items():
                sums[block].add(maps, image % groups)
            bar.update()
            if visit + 1 == check and visit + 1 < most:
                error = max(total.estimate().error for total in sums.values())
                bar.set_postfix_str(f"error {error:.0%}")
                if error <= tolerance:
                    break
                check += check
    return visit + 1, {block: total.estimate() for block, total in sums.items()}


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
