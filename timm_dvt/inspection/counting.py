"""Views of photographs and blank images through a model, summed up layer by layer; memory does not grow with them."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from timm_dvt.bars import tqdm
from timm_dvt.calibration.blanks import draw_blank
from timm_dvt.calibration.positions import MOST_GROUPS, PositionSums, Windows
from timm_dvt.calibration.samples import Source
from timm_dvt.calibration.views import WINDOWS, view_inputs
from timm_dvt.errors import InspectionError
from timm_dvt.inspection.estimates import position_share, products_of
from timm_dvt.inspection.findings import duration
from timm_dvt.inspection.probe import PlaceProbe
from timm_dvt.inspection.reader import LayerReader
from timm_dvt.inspection.results import Estimate

BLANKS = 16  # of one color, and as many of noise
PROBED = 4  # windows of a canvas that a linear map reads; all turns are among them, so that a sky tells no place
MOST_NORMS = 512  # views whose norms are kept, at the most
SOLVING = 30  # canvases that could be counted in the time in which the sums are solved

OfGroups = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # `PositionSums.of_groups`


@dataclass
class LayerSums:
    """Of one layer, over all photographs; `norms` are (V, H, W) a canvas."""

    position: PositionSums
    probe: PlaceProbe = field(default_factory=PlaceProbe)
    norms: list[np.ndarray] = field(default_factory=list)


class Count:
    """Windows of canvases, read and summed up.

    Attributes:
        layers: sums by the layers' names.
        views: how many were read. seconds: that each takes.
        images: the number of the image of each view whose norms were kept.
        content: how much the pixels of these views' patches vary, (V, H, W) a canvas, by grid.
    """

    def __init__(self, reader: LayerReader, shown: list[Source] | None, count: int) -> None:
        """
        Args:
            shown: photographs; None for blank and noise images.
            count: canvases.
        """
        self.reader, self.shown, self.count = reader, shown, count
        margin = (reader.grid[0] // 2, reader.grid[1] // 2)
        self.windows = Windows.whole() if shown is None else Windows.draw(WINDOWS, margin)
        self.each = len(self.windows.places)
        self.groups = min(count // 2 if shown is None else len(shown), MOST_GROUPS)
        self.views = 0
        self.images: list[int] = []
        self.content: dict[tuple[int, ...], list[np.ndarray]] = {}
        start = time.perf_counter()
        self._first = reader(self.inputs(1))  # not the first forward pass, which warms up
        self.seconds = (time.perf_counter() - start) / self.each
        self.layers = self._empty()

    def inputs(self, visit: int) -> torch.Tensor:
        """The windows of a canvas, (V, channels, h, w)."""
        return view_inputs(self.reader, self.windows, self.shown, visit)[1]

    def cost(self, more: int) -> str:
        """What it will take, in words, from a timed canvas; `more` are forward passes to be made besides."""
        start = time.perf_counter()
        for name, layer in self._empty().items():
            layer.position.add(self._first[name], 0)
            layer.probe.add(self._first[name][:PROBED])
        beside = time.perf_counter() - start
        passes = self.count * self.each + more
        space = sum(self.groups * maps[0].numel() * 4 for maps in self._first.values()) / 1e9
        return (
            f"inspect: {passes} forward passes at {self.seconds:.2g} s (timed), all in all about "
            f"{duration(passes * self.seconds + (self.count + SOLVING) * beside)}; sums take {max(space, 0.1):.1f} GB"
        )

    def run(self, progress: bool) -> None:
        """Read all canvases."""
        kept = self._kept()
        # Those that a linear map is fitted to come first; no image is on both sides.
        order = sorted(range(self.count), key=lambda visit: self._image(visit) % 2)
        for visit in tqdm(order, "inspect", unit="image", disable=not progress):
            inputs, image = self.inputs(visit), self._image(visit)
            maps = self.reader(inputs)
            for name, layer in self.layers.items():
                layer.position.add(maps[name], image % self.groups)
                probed = maps[name][:PROBED]
                layer.probe.test(probed, image) if image % 2 else layer.probe.add(probed)
                if visit in kept:
                    layer.norms.append(maps[name].norm(dim=-1).cpu().numpy())
            if visit in kept:
                self.images += [image] * self.each
                for grid in {tuple(features.shape[1:3]) for features in maps.values()}:
                    self.content.setdefault(grid, []).append(_content(inputs, grid))
            self.views += self.each

    def _kept(self) -> set[int]:
        """The visits whose norms are kept: as many of each image, and where there are too many evenly spread images."""
        most, once = MOST_NORMS // self.each, self.count if self.shown is None else len(self.shown)
        return {number * once // most for number in range(most)} if once > most else set(range(most))

    def _image(self, visit: int) -> int:
        return visit // 2 if self.shown is None else visit % len(self.shown)

    def _empty(self) -> dict[str, LayerSums]:
        return {
            name: LayerSums(PositionSums(self._scaled(maps), self.groups, directions=False))
            for name, maps in self._first.items()
        }

    def _scaled(self, maps: torch.Tensor) -> Windows:
        """The windows on the grid of a layer that may be a finer one."""
        grid = (maps.shape[1], maps.shape[2])
        rows, columns = (side // whole for side, whole in zip(grid, self.reader.grid))
        if (rows * self.reader.grid[0], columns * self.reader.grid[1]) != grid:
            raise InspectionError(
                f"A block's grid of {grid} is no multiple of the features', {self.reader.grid}; name blocks without it."
            )
        places = tuple((y * rows, x * columns, turned) for y, x, turned in self.windows.places)
        return Windows(places, (self.windows.margin[0] * rows, self.windows.margin[1] * columns))


def count_blanks(reader: LayerReader, kind: str, progress: bool) -> dict[str, OfGroups]:
    """By layer what groups of images of one color ("flat"), or of noise, tell."""
    sums: dict[str, PositionSums] = {}
    seeds = range(kind == "noise", 2 * BLANKS, 2)  # as `draw_blank` turns them out
    for turn, seed in enumerate(tqdm(seeds, f"{kind} images", leave=False, disable=not progress)):
        image = reader.normalized(draw_blank(reader.channels, reader.size, seed))
        for name, maps in reader(image[None]).items():
            sums.setdefault(name, PositionSums(Windows.whole(), MOST_GROUPS, directions=False))
            sums[name].add(maps, turn % MOST_GROUPS)
    return {name: position.of_groups() for name, position in sums.items()}


def features_share(reader: LayerReader, shown: list[Source], count: int) -> Estimate:
    """Position's share of the features, behind the denoiser if there is one, and nothing else."""
    counted = Count(reader, shown, count)
    counted.run(progress=False)
    estimates, weights, variances = list(counted.layers.values())[-1].position.of_groups()
    return position_share(products_of(estimates), weights, variances)


def _content(inputs: torch.Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """(V, H, W): the variance of the pixels in each patch."""
    mean, square = (adaptive_avg_pool2d(pixels, (grid[0], grid[1])) for pixels in (inputs, inputs.square()))
    return (square - mean.square()).sum(1).cpu().numpy()
