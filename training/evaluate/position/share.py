"""How much position explains of patch features, and what a zero image shows of it: Figs. 3, 5 and S1.

share: of the variance of patch features within images, how much the mean over images at each place explains,
in percent, beyond the 1 / images that it would by chance.

zero_correlation: Pearson correlation of that mean map with the raw map of a zero tensor (an input that is zero
after normalization, so that the model sees position alone), over all places and channels, each channel
centered over the places. What the raw zero image shows is the artifact, so every state is held against it: near
1 for raw features, the artifacts are what the position embedding makes of no image at all; near 0 for denoised
ones, nothing of that is left; near 1 for what was removed, it was that.

share/pixels: the share of the images' own patch colors. Where places do mean something (sky above, road below;
objects that are cut off at the edges) it is above 0, and so may be that of clean features.

All for the last block; of a model's raw features also for each block, as share/block00 and so on (Figs. 5 and S1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from timm_dvt.bars import tqdm
from timm_dvt.calibration.positions import without_noise
from timm_dvt.errors import UserError
from timm_dvt.viewer.colors import map_correlation
from training.common.backbone import FeatureReader
from training.evaluate.features.cached import Features
from training.evaluate.run import Run

KIND = "images"
STATES = ("raw", "denoised", "artifacts")
PAIRS = True
NUMBERS = {"share": "position %", "zero_correlation": "zero-image corr."}
MEANING = (
    "position %: share of the variance that the place of a patch explains. zero-image corr.: how alike the mean map is "
    "to that of a blank image, from -1 to 1. Both are near 0 where features do not know their place."
)


@dataclass(frozen=True)
class Settings:
    """images: drawn at random from the validation images; all of them if there are fewer."""

    images: int = 1_000


SMALL = Settings(images=400)


class PositionStatistics:
    """Sums over images from which the share and the mean map follow; maps need not be kept."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.squares = 0.0

    def add(self, maps: Tensor) -> None:
        """Count a batch of maps (B, K, K, C)."""
        tokens = maps.flatten(1, 2).double()
        centered = tokens - tokens.mean(1, keepdim=True)
        self.total = centered.sum(0) + (0 if self.total is None else self.total)
        self.squares += float(centered.square().sum())
        self.count += len(maps)

    def mean_map(self) -> Tensor:
        """(K*K, C), each channel centered over the places."""
        assert self.total is not None
        return self.total / self.count

    def share(self) -> float:
        """The fraction explained: 0 by chance, 1 if all images' maps are equal up to a constant."""
        if self.count < 2:
            raise UserError(f"position's share needs 2 images or more, got {self.count}")
        if self.squares == 0:
            return 0.0
        square, squares = float(self.mean_map().square().sum()), self.squares / self.count**2
        return without_noise(square, squares, 1 / self.count) * self.count / self.squares


def position_share(maps: Tensor) -> float:
    """Share of the variance of (images, K, K, C) that the place explains, beyond the 1 / images of chance."""
    statistics = PositionStatistics()
    statistics.add(maps)
    return statistics.share()


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """share in percent and zero_correlation of the last block, and of each block for raw features."""
    features = data["val"]
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(run.seed))
    chosen = order[: settings.images].tolist()
    extractor = features.extractor
    size = extractor.reader.input_size
    zero = extractor.reader.mean.cpu().expand(1, 3, size, size)
    pixels = PositionStatistics()
    every_block = run.state == "raw" and isinstance(features, Features)
    if every_block:
        reader = FeatureReader(extractor.model, range(extractor.reader.depth), input_size=size, dtype=extractor.dtype)
        read_raw = reader.patch_features
    else:
        last = extractor.reader.depth - 1
        read_raw = extractor.reader.patch_features

    zeros = {layer: maps[0].flatten(0, 1).cpu() for layer, maps in read_raw(zero).items()}
    statistics = {layer: PositionStatistics() for layer in zeros}
    for start in tqdm(range(0, len(chosen), features.batch_size), desc=f"position ({run.state})", leave=False):
        indices = chosen[start : start + features.batch_size]
        if every_block:
            images = features.images(indices)
            pixels.add(adaptive_avg_pool2d(images, features.grid).permute(0, 2, 3, 1))
            layers = reader.patch_features(images)
        else:
            layers = {last: features.maps(indices, run.state)}
        for layer, maps in layers.items():
            statistics[layer].add(maps.cpu())
    last = max(zeros)
    numbers = {
        "share": 100 * statistics[last].share(),
        "zero_correlation": map_correlation(zeros[last].numpy(), statistics[last].mean_map().numpy()),
    }
    if every_block:
        numbers["share/pixels"] = 100 * pixels.share()
        for layer in zeros:
            numbers[f"share/block{layer:02d}"] = 100 * statistics[layer].share()
            numbers[f"zero_correlation/block{layer:02d}"] = map_correlation(
                zeros[layer].numpy(), statistics[layer].mean_map().numpy()
            )
    return numbers
