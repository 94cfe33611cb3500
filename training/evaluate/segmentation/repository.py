"""Linear segmentation as the authors' repository has it: Tab. 2 and the README's tables (VOC2012, ADE20k).

evaluation/configs/vitb_{voc2012,ade20k}_linear_config.py, on mmsegmentation. Features come from augmented images: the
short side at 512 (the long one at 2,048 at most) times 0.5 to 2.0, a crop of 512 in which no class has three quarters
of the labeled pixels, flipped one time in two, photometric distortion, ImageNet's mean and standard deviation whatever
the model; what is missing to 512 is zero, and ignored. Batch norm and a linear layer on the patch tokens, whose logits
are resized to the crop; cross-entropy in the mean over all pixels, ignored ones among them. AdamW, batches of 16
(theirs 2 on each of 8 GPUs), polynomial decay of power 1.

Test: aspect kept, short side 512, windows of 512 at stride 341, logits of overlaps averaged and resized to the image's
own size. For patch 14 each window is padded after normalization to 518, 3 pixels on either side, and its 37 x 37
logits resized to 512. Validated every 10,000 steps; the best mIoU counts, as dvt/utils/collect_results.py picks it.

VOC2012 is trained on train.txt (1,464 images). `final_norm=False` gives the raw rows as the repository's code reads
them: timm's get_intermediate_layers leaves the last block's tokens un-normed (its distilled rows too; its denoised
rows, those of Eva, which has no such method, and all of the paper's are normed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from timm_dvt.bars import tqdm
from training.evaluate.data.augment import crop_with_many_classes, flip, normalize, photometric_distortion
from training.evaluate.data.splits import IGNORE
from training.evaluate.features.cached import Features
from training.evaluate.features.live import LiveFeatures
from training.evaluate.probe import Validations, train
from training.evaluate.run import Run
from training.evaluate.segmentation.linear import LinearHead
from training.evaluate.segmentation.score import SegmentationScore, upsample
from training.evaluate.segmentation.windows import pad_below, resize_image, resize_labels, scaled_size, slide
from training.loop.schedule import straight

KIND = "masks"
STATES = ("raw", "denoised")


@dataclass(frozen=True)
class Settings:
    """The repository's.

    Attributes:
        short, longest: sides of a test image in pixels, and of a training image before `scales`.
        scales: from and to which that is multiplied at random in training.
        crop, stride: of training crops and test windows.
        most: share of a crop's labeled pixels that one class may not reach.
        final_norm: of raw features; see the head of this module.
        trainaug: VOC2012's 10,582 images instead of its 1,464.
        validate_every: steps.
    """

    steps: int = 40_000
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 1_500
    short: int = 512
    longest: int = 2048
    scales: tuple[float, ...] = (0.5, 2.0)
    crop: int = 512
    stride: int = 341
    most: float = 0.75
    final_norm: bool = True
    trainaug: bool = False
    validate_every: int = 10_000


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mIoU, mAcc, aAcc, IoU/CLASS and Acc/CLASS in percent, of the validation with the best mIoU."""
    training, val = data["train"].split, data["val"].split
    live = LiveFeatures(data["val"].extractor)

    def crop(image: Tensor, mask: Tensor, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        return training_crop(image, mask, settings, draw)

    def read(indices: Sequence[int], draws: Sequence[np.random.Generator], step: int) -> tuple[Tensor, Tensor]:
        return training.crops(indices, draws, crop)

    def logits(images: Tensor) -> Tensor:
        maps, _ = live(images, run.state, settings.final_norm)
        return head(maps, (images.shape[-2], images.shape[-1]))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, masks = batch
        labels = masks.to(run.device).long()
        return cross_entropy(logits(images), labels, ignore_index=IGNORE, reduction="sum") / labels.numel()

    def validate() -> dict[str, float]:
        score = SegmentationScore(len(val.classes))
        for index in tqdm(range(len(val)), desc=f"validation ({run.state})", unit="image", leave=False):
            mask = val.annotation(index)
            predicted = predict(val.image(index), logits, settings, settings.batch_size)
            score.add(upsample(predicted, (mask.shape[0], mask.shape[1]))[0].argmax(0), mask)
        return {**score.numbers(), **score.class_numbers(val.classes)}

    torch.manual_seed(run.seed)
    head = LinearHead(live.channels, len(val.classes), batch_norm=True).to(run.device)
    nn.init.zeros_(head.linear.bias)  # type: ignore[arg-type]  # nn.Conv2d's may be None
    validations = Validations(head, run, settings.validate_every, validate)
    train(
        head,
        loss,
        len(training),
        run,
        settings,
        settings.steps,
        straight,
        "linear-seg",
        read=read,
        validations=validations,
    )
    return validations.best("mIoU")


def training_crop(image: Tensor, mask: Tensor, settings: Settings, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """An image (3, h, w) in [0, 1] and its mask (h, w) as trained on: normalized, (3, crop, crop) and (crop, crop)."""
    low, high = settings.scales
    ratio = draw.uniform(low, high)
    size = scaled_size((mask.shape[0], mask.shape[1]), int(settings.longest * ratio), int(settings.short * ratio))
    image, mask = resize_image(image, size), resize_labels(mask, size)
    crop = (settings.crop, settings.crop)
    rows, columns = crop_with_many_classes(mask, crop, settings.most, draw)
    image, mask = flip(draw, image[:, rows, columns], mask[rows, columns])
    image = normalize(photometric_distortion(image, draw))
    return pad_below(image, crop, 0), pad_below(mask, crop, IGNORE)


@torch.no_grad()
def predict(image: Tensor, logits: Callable[[Tensor], Tensor], settings: Settings, batch_size: int) -> Tensor:
    """Logits (1, classes, h', w') of an image (3, h, w) in [0, 1], at the size of the test."""
    size = scaled_size((image.shape[-2], image.shape[-1]), settings.longest, settings.short)
    return slide(normalize(resize_image(image, size))[None], logits, settings.crop, settings.stride, batch_size)
