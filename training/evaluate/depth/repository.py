"""Monocular depth as the authors' repository has it: Tab. 2 and the README's tables (NYUv2).

evaluation/configs/vitb_nyu_linear_config.py, after DINOv2 and the Monocular-Depth-Estimation-Toolbox. Training images
are cropped of NYU's border, turned by up to 2.5 degrees and mirrored, each one time in two, cropped to 416 x 544 and
recolored; ImageNet's mean and standard deviation; padded to multiples of the patch. A linear layer on patch tokens
with the class token appended, upsampled by 4, gives 256 numbers a place; max(0, number) + 0.1, divided by their sum,
weigh depths that are evenly spaced from 1 mm to 10 m, both included (bin edges, where the form that the paper's text
names, --protocol fast, has centers under a softmax). AdamW at 5e-3, gradients clipped at 35, first beta by a OneCycle
policy, 38,400 steps of 16 images, 12,800 of them warm-up, cosine.

The loss of g = log(d + 0.001) - log(d* + 0.001) over pixels of known depth is Eigen's scale-invariant one,

    sqrt(var(g) + 0.15 mean(g)^2), in the first 100 steps sqrt(0.15) |mean(g)|, of two images at a time,

plus `gradient_weight` times MegaDepth's, differences of g two pixels apart along rows and columns at four scales. Their
config gives that a weight of 0.5, but their code (evaluation/depth/models/losses/gradientloss.py) takes the first two
dimensions of (B, 1, h, w) for rows and columns, and with two images a GPU nothing is left: it adds 0. So does the
default here; 0.5 makes it what it is meant to be.

Test: whole images, padded, and mirrored; the two depths, clamped to the range and resized to the image, are averaged.
Range, crop and numbers as in linear.py. Validated every 800 steps; the best delta1 counts, as
dvt/utils/collect_results.py picks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from timm_dvt.bars import tqdm
from training.evaluate.data.augment import flip, normalize, one_cycle, random_place, recolor, turn
from training.evaluate.depth import linear as paper
from training.evaluate.depth.linear import depth_numbers, mean_numbers
from training.evaluate.features.cached import Features
from training.evaluate.features.live import LiveFeatures
from training.evaluate.probe import Validations, train
from training.evaluate.run import Run
from training.evaluate.segmentation.score import upsample
from training.evaluate.segmentation.windows import pad_below
from training.loop.schedule import cosine

KIND = "depth"
STATES = ("raw", "denoised")
# Rows and columns that training keeps of 480 x 640 (NYUCrop), as fractions.
NYU_ROWS, NYU_COLUMNS = (45 / 480, 472 / 480), (43 / 640, 608 / 640)
EPSILON = 1e-3  # of logarithms
TOGETHER = 2  # images whose pixels one loss is of: those of one of the authors' eight GPUs


@dataclass(frozen=True)
class Settings(paper.Settings):
    """The repository's.

    Attributes:
        eigen_crop: False also trains on the border, which is NYU's.
        bins: depths that are mixed. least, most: the first and the last of them, and the range of depths, in meters.
        crop: height and width of training images.
        clip: the largest norm of the gradients.
        gradient_weight: of the gradient loss; see the head of this module.
        loss_warmup: steps in which the loss sees the mean alone.
        validate_every: steps.
    """

    crop: tuple[int, ...] = (416, 544)
    clip: float = 35.0
    gradient_weight: float = 0.0
    loss_warmup: int = 100
    validate_every: int = 800


class DepthHead(nn.Module):
    """Depths of patch tokens with the class token appended, as a mixture of evenly spaced ones."""

    depths: Tensor

    def __init__(self, channels: int, settings: Settings) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, settings.bins, 1)
        self.upsampling = settings.upsampling
        self.register_buffer("depths", torch.linspace(settings.least, settings.most, settings.bins))

    def forward(self, maps: Tensor, class_tokens: Tensor) -> Tensor:
        """Meters (B, 1, 4H, 4W), 4 being the settings' upsampling, of maps (B, H, W, C) and class tokens (B, C)."""
        rows, columns = maps.shape[1:3]
        whole = torch.cat([maps, class_tokens[:, None, None].expand(-1, rows, columns, -1)], -1)
        # A linear layer and an interpolation commute.
        size = (self.upsampling * rows, self.upsampling * columns)
        weights = upsample(self.linear(whole.permute(0, 3, 1, 2)), size).relu() + 0.1
        return torch.einsum("bnhw,n->bhw", weights / weights.sum(1, keepdim=True), self.depths)[:, None]


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """AbsRel, RMSE (m), delta1, delta2, delta3 (percent) of the validation with the best delta1."""
    training, val = data["train"].split, data["val"].split
    live = LiveFeatures(data["val"].extractor)

    def crop(image: Tensor, depth: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        return training_crop(image, depth, settings, draw)

    def read(indices: Sequence[int], draws: Sequence[np.random.Generator], step: int) -> tuple[Tensor, Tensor, int]:
        return *training.crops(indices, draws, crop), step

    def depths(images: Tensor) -> Tensor:
        return head(*live(images, run.state))

    def loss(batch: tuple[Tensor, Tensor, int]) -> Tensor:
        images, true, step = batch
        true = true.to(run.device)
        predicted = upsample(depths(images), (true.shape[-2], true.shape[-1]))[:, 0]
        losses = []
        for d, t in zip(predicted.split(TOGETHER), true.split(TOGETHER)):
            losses.append(scale_invariant_loss(d, t, warming=step < settings.loss_warmup))
            if settings.gradient_weight:
                losses[-1] = losses[-1] + settings.gradient_weight * gradient_loss(d, t)
        return torch.stack(losses).mean()

    def adjust(optimizer: torch.optim.Optimizer, step: int) -> None:
        nn.utils.clip_grad_norm_(head.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["betas"] = (one_cycle(step, settings.steps), 0.999)

    def validate() -> dict[str, float]:
        indices = tqdm(range(len(val)), desc=f"validation ({run.state})", unit="image", leave=False)
        predicted = (predict(val.image(i), depths, settings).cpu() for i in indices)
        numbers = (depth_numbers(depth, val.annotation(i), settings) for i, depth in enumerate(predicted))
        return mean_numbers(numbers, val.name)

    torch.manual_seed(run.seed)
    head = DepthHead(live.channels * (2 if live.prefix else 1), settings).to(run.device)
    validations = Validations(head, run, settings.validate_every, validate)
    train(
        head,
        loss,
        len(training),
        run,
        settings,
        settings.steps,
        cosine,
        "depth",
        read=read,
        adjust=adjust,
        validations=validations,
    )
    return validations.best("delta1")


def training_crop(image: Tensor, depth: Tensor, settings: Settings, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """An image (3, h, w) in [0, 1] and its depth (h, w) as trained on: (3, *crop) normalized, and (*crop)."""
    border = (NYU_ROWS, NYU_COLUMNS) if settings.eigen_crop else ((0, 1), (0, 1))
    kept = [slice(round(low * side), round(high * side)) for (low, high), side in zip(border, depth.shape)]
    image, depth = flip(draw, *turn(image[:, kept[0], kept[1]], depth[kept[0], kept[1]], draw))
    height, width = settings.crop
    rows, columns = random_place((depth.shape[0], depth.shape[1]), (height, width), draw)
    image = normalize(recolor(image[:, rows, columns], draw))
    return pad_below(image, (height, width), 0), pad_below(depth[rows, columns], (height, width), 0)


@torch.no_grad()
def predict(image: Tensor, depths: Callable[[Tensor], Tensor], settings: Settings) -> Tensor:
    """Meters (h, w) of an image (3, h, w) in [0, 1]: the mean of its own and of its mirror image's."""
    size = (image.shape[-2], image.shape[-1])
    both = torch.stack([image, image.flip(-1)])
    direct, mirrored = interpolate(
        depths(normalize(both)).clamp(settings.least, settings.most), size, mode="bilinear", align_corners=False
    )[:, 0]
    return (direct + mirrored.flip(-1)) / 2


def scale_invariant_loss(predicted: Tensor, true: Tensor, warming: bool = False) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) of the log ratio g over known depths, both (B, h, w) in meters; see above."""
    known = true > 0
    if int(known.sum()) < 2:
        return 0 * predicted.sum()
    g = (predicted[known] + EPSILON).log() - (true[known] + EPSILON).log()
    mean = 0.15 * g.mean().square()
    return (mean if warming else g.var() + mean).sqrt()


def gradient_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """MegaDepth's: |differences of g two pixels apart| between known depths, at every, 2nd, 4th and 6th pixel.

    Each scale's sum is divided by its number of known depths. Both (B, h, w) in meters.
    """
    total = predicted.new_zeros(())
    for stride in (1, 2, 4, 6):
        d, t = predicted[:, ::stride, ::stride], true[:, ::stride, ::stride]
        known = t > 0
        g = torch.where(known, (d + EPSILON).log() - (t + EPSILON).log(), 0)
        rows = (g[:, 2:] - g[:, :-2]).abs() * (known[:, 2:] & known[:, :-2])
        columns = (g[:, :, 2:] - g[:, :, :-2]).abs() * (known[:, :, 2:] & known[:, :, :-2])
        total = total + (rows.sum() + columns.sum()) / known.sum().clamp(min=1)
    return total
