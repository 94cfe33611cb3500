"""Monocular depth by a linear probe: Tab. 2 (NYUv2); protocol of appendix B, after DINOv2.

The class token is appended to every patch token (a model without one has patch tokens alone), the maps are
upsampled by 4, and a linear layer gives 256 logits a place, one a uniform bin of the depth range. Linear layer and
bilinear interpolation commute, so the layer comes first. Trained as classification: cross-entropy against the bin
that the true depth falls in; the prediction is the mean of the bins' centers under the softmax, upsampled to the
image. AdamW at 5e-3, weight decay 0.01, 38,400 steps of 16 images, 12,800 of them warm-up, then cosine: as in the
authors' repository (evaluation/configs/vitb_nyu_linear_config.py), whose loss is on the depth itself and which crops,
rotates and flips images (repository.py, --protocol repository); here nothing is augmented.

Test: depth from 1 mm to 10 m, within the border that Eigen et al. crop of NYU's 480 x 640 (of one's own folder: of the
whole image); numbers are means over images of AbsRel = mean |d* - d| / d, RMSE in meters, and delta_i = percent of
pixels with max(d*/d, d/d*) < 1.25^i.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from timm_dvt.errors import UserError
from training.evaluate.features.cached import Features
from training.evaluate.probe import train
from training.evaluate.run import Run
from training.evaluate.segmentation.score import upsample
from training.loop.schedule import cosine

KIND = "depth"
STATES = ("raw", "denoised")
NUMBERS = {"delta1": "delta1", "AbsRel": "AbsRel", "RMSE": "RMSE"}
MEANING = "delta1 (percent, more is better), AbsRel and RMSE (less is better): depth by one linear layer."
# Rows and columns that Eigen's crop keeps, as fractions of 480 x 640: rows 45 to 470, columns 41 to 600.
CROP_ROWS, CROP_COLUMNS = (45 / 480, 471 / 480), (41 / 640, 601 / 640)


@dataclass(frozen=True)
class Settings:
    """The paper's and its repository's.

    Attributes:
        least, most: the range of depths in meters.
        upsampling: of the maps before the loss.
        eigen_crop: whether only pixels within NYU's border count.
    """

    steps: int = 38_400
    batch_size: int = 16
    lr: float = 5e-3
    weight_decay: float = 0.01
    warmup: int = 12_800
    bins: int = 256
    least: float = 1e-3
    most: float = 10.0
    upsampling: int = 4
    eigen_crop: bool = True

    def __post_init__(self) -> None:
        if self.least >= self.most:
            raise UserError(f"least must be below most, got {self.least} and {self.most} m")


SMALL = Settings(steps=1_500, warmup=500, upsampling=1, eigen_crop=False)


class DepthHead(nn.Module):
    """Depth logits of patch tokens with the class token appended."""

    def __init__(self, channels: int, settings: Settings) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, settings.bins, 1)
        self.upsampling = settings.upsampling
        width = (settings.most - settings.least) / settings.bins
        self.register_buffer("centers", settings.least + width * (torch.arange(settings.bins) + 0.5))

    def forward(self, maps: Tensor, class_tokens: Tensor) -> Tensor:
        """Logits (B, bins, 4K, 4K), 4 being the settings' upsampling, of maps (B, K, K, C) and class tokens (B, C)."""
        grid = maps.shape[1]
        whole = torch.cat([maps, class_tokens[:, None, None].expand(-1, grid, grid, -1)], -1)
        return upsample(self.linear(whole.permute(0, 3, 1, 2)), (self.upsampling * grid,) * 2)

    def depth(self, logits: Tensor) -> Tensor:
        """Meters (B, h, w)."""
        return torch.einsum("bnhw,n->bhw", logits.softmax(1), self.centers)


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """AbsRel, RMSE (m), delta1, delta2, delta3 (percent)."""
    training, val = data["train"], data["val"]
    training.extract()
    val.extract()

    def logits(features: Features, indices: list[int]) -> Tensor:
        return head(features.maps(indices, run.state), features.class_tokens(indices))

    @lru_cache(maxsize=1024)  # decoded once where there are not many
    def bins_of(i: int) -> Tensor:
        true = training.split.annotation(i)[None, None]
        size = (settings.upsampling * training.grid,) * 2
        return depth_bins(interpolate(true, size, mode="nearest-exact")[0, 0], settings)

    def loss(indices: list[int]) -> Tensor:
        predicted = logits(training, indices)
        bins = torch.stack([bins_of(i) for i in indices]).to(run.device)
        return cross_entropy(predicted, bins, ignore_index=-1, reduction="sum") / max(1, int((bins >= 0).sum()))

    torch.manual_seed(run.seed)
    channels = training.channels + training.class_tokens([0]).shape[1]
    head = DepthHead(channels, settings).to(run.device)
    train(head, loss, len(training), run, settings, settings.steps, cosine, "depth")

    def per_image() -> Iterator[dict[str, float] | None]:
        for indices, _ in val.batches(run.state, f"depth ({run.state})"):
            for index, depth in zip(indices, head.depth(logits(val, indices)).cpu()):
                true = val.split.annotation(index)
                yield depth_numbers(upsample(depth[None, None], tuple(true.shape))[0, 0], true, settings)

    with torch.no_grad():
        return mean_numbers(per_image(), val.split.name)


def depth_bins(depth: Tensor, settings: Settings) -> Tensor:
    """The bin that each depth falls in, -1 outside of the range; shapes are kept."""
    fraction = (depth - settings.least) / (settings.most - settings.least)
    known = (depth >= settings.least) & (depth <= settings.most)
    return torch.where(known, (fraction * settings.bins).long().clamp(0, settings.bins - 1), -1)


def depth_numbers(predicted: Tensor, true: Tensor, settings: Settings) -> dict[str, float] | None:
    """Numbers of one image, both (h, w) in meters; None if no pixel counts."""
    height, width = true.shape
    crop = torch.full_like(true, not settings.eigen_crop, dtype=torch.bool)
    rows, columns = ([round(f * n) for f in part] for part, n in ((CROP_ROWS, height), (CROP_COLUMNS, width)))
    crop[rows[0] : rows[1], columns[0] : columns[1]] = True
    counted = crop & (true > settings.least) & (true < settings.most)
    if not counted.any():
        return None
    guess = predicted[counted].double().clamp(settings.least, settings.most)
    truth = true[counted].double()
    ratio = torch.maximum(guess / truth, truth / guess)
    return {
        "AbsRel": float(((guess - truth).abs() / truth).mean()),
        "RMSE": float((guess - truth).square().mean().sqrt()),
        **{f"delta{i}": 100 * float((ratio < 1.25**i).double().mean()) for i in (1, 2, 3)},
    }


def mean_numbers(per_image: Iterable[dict[str, float] | None], name: str) -> dict[str, float]:
    """The mean over a split's images of `depth_numbers`. Raises UserError if no pixel of any counts."""
    counted = [numbers for numbers in per_image if numbers]
    if not counted:
        raise UserError(f"no image of {name} has a depth within the range and crop")
    return {key: sum(numbers[key] for numbers in counted) / len(counted) for key in counted[0]}
