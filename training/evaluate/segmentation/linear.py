"""Linear segmentation: Tab. 2 (VOC2012, ADE20k); protocol of appendix B, after DINOv2.

The paper resizes feature maps to the image and trains one linear layer on them. A linear layer and bilinear
interpolation commute (the weights of an interpolation sum to one), so the layer is applied to the K x K maps
and its logits are resized: the same numbers at a hundredth of the cost.

As in the authors' repository (evaluation/configs/vitb_voc2012_linear_config.py, DINOv2's protocol) the features pass
through a batch norm first (its statistics are those of the patch tokens; frozen, it is part of the linear layer), with
AdamW at 1e-3, weight decay 1e-4, 1,500 steps of warm-up, linear decay, batches of 16, cross-entropy. In difference to
it nothing is augmented, and no window slides over the image: features are extracted once, from the whole image resized
to a square. The other way: repository.py, --protocol repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.evaluate.data.splits import IGNORE
from training.evaluate.features.cached import Features
from training.evaluate.probe import train
from training.evaluate.run import Run
from training.evaluate.segmentation.score import SegmentationScore, resize_mask, upsample
from training.loop.schedule import straight

KIND = "masks"
STATES = ("raw", "denoised")
PAIRS = True
NUMBERS = {"mIoU": "mIoU", "mAcc": "mAcc"}
MEANING = "mIoU, mAcc: segmentation by one linear layer on the patches, in percent; more is better."


@dataclass(frozen=True)
class Settings:
    """The paper's and its repository's.

    Attributes:
        label_size: side of the square that logits and masks are resized to in training; 0 for the input size.
            Validation is at each mask's own size.
        batch_norm: in front of the linear layer.
    """

    steps: int = 40_000
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 1_500
    label_size: int = 0
    batch_norm: bool = True


SMALL = Settings(steps=1_500, warmup=100, label_size=48)


class LinearHead(nn.Module):
    """Batch norm, if any, and one linear layer on patch features."""

    def __init__(self, channels: int, classes: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.linear = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01)

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, classes, *size) of maps (B, K, K, C)."""
        return upsample(self.linear(self.norm(maps.permute(0, 3, 1, 2))), size)


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mIoU, mAcc and aAcc in percent."""
    training, val = data["train"], data["val"]
    training.extract()
    val.extract()
    classes = len(val.split.classes)
    size = settings.label_size or training.extractor.reader.input_size
    masks: dict[int, Tensor] = {}

    def mask(index: int) -> Tensor:
        if index not in masks:
            masks[index] = resize_mask(training.split.annotation(index), size)
        return masks[index]

    def loss(indices: list[int]) -> Tensor:
        labels = torch.stack([mask(i) for i in indices]).to(run.device).long()
        logits = head(training.maps(indices, run.state), (size, size))
        labeled = max(1, int((labels != IGNORE).sum()))  # a batch might have none
        return cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / labeled

    torch.manual_seed(run.seed)
    head = LinearHead(training.channels, classes, settings.batch_norm).to(run.device)
    train(head, loss, len(training), run, settings, settings.steps, straight, "linear-seg")
    score = SegmentationScore(classes)
    with torch.no_grad():
        for indices, maps in val.batches(run.state, f"linear-seg ({run.state})"):
            for index, features in zip(indices, maps):
                mask_ = val.split.annotation(index)
                logits = head(features[None], tuple(mask_.shape))
                score.add(logits[0].argmax(0), mask_)
    return score.numbers()
