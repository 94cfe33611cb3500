"""k-NN segmentation without any training: Tab. 5.

Memory bank: for each training image and each class in it, the mean of the image's features over the class's
pixels (masked pooling on the patch grid: a patch weighs as many of its pixels as are of the class). A pixel of
a validation image, with features interpolated bilinearly, gets the class most frequent among its 20 nearest
bank entries by cosine; where two are equally frequent, the one with the greater sum of cosines.

Nothing is random but the bank: with `bank_share` below 1 a seed draws the training images that fill it, and
the spread over seeds says how far the number hangs on that choice. With the whole training set, as in the
paper, all seeds give the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from training.evaluate.data.splits import IGNORE
from training.evaluate.features.cached import Features
from training.evaluate.run import Run
from training.evaluate.segmentation.score import SegmentationScore, upsample
from training.evaluate.segmentation.windows import resize_labels

KIND = "masks"
STATES = ("raw", "denoised")
PAIRS = True
NUMBERS = {"mIoU": "k-NN mIoU"}
MEANING = "k-NN mIoU: segmentation by the nearest labeled patches, in percent; more is better."


@dataclass(frozen=True)
class Settings:
    """Tab. 5's protocol.

    Attributes:
        neighbors: k.
        bank_share: of the training images; below 1 the seed draws them.
        query_size: side of the grid of pixels that are classified, which gives the mask by nearest neighbor;
            0 for every pixel of the mask.
    """

    neighbors: int = 20
    bank_share: float = 1.0
    query_size: int = 0


SMALL = Settings(bank_share=0.5, query_size=48)


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mIoU, mAcc and aAcc in percent."""
    if not 0 < settings.bank_share <= 1:
        raise UserError(f"bank_share must be in (0, 1], got {settings.bank_share}")
    train, val = data["train"], data["val"]
    train.extract()
    val.extract()
    classes = len(val.split.classes)
    bank, labels = memory_bank(train, settings, run, classes)
    score = SegmentationScore(classes)
    for indices, maps in val.batches(run.state, f"k-NN ({run.state})"):
        for index, features in zip(indices, maps):
            mask = val.split.annotation(index)
            size = (settings.query_size,) * 2 if settings.query_size else tuple(mask.shape)
            pixels = upsample(features.permute(2, 0, 1)[None], size)[0].flatten(1).T
            predicted = nearest_class(pixels, bank, labels, settings.neighbors, classes).reshape(size)
            if settings.query_size:
                predicted = resize_labels(predicted.cpu(), tuple(mask.shape))
            score.add(predicted, mask)
    return score.numbers()


def memory_bank(train: Features, settings: Settings, run: Run, classes: int) -> tuple[Tensor, Tensor]:
    """Normed centroids (M, C) of the classes of each image in the bank, and their classes (M,)."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))
    chosen = sorted(order[: max(1, round(settings.bank_share * len(train)))].tolist())
    centroids, labels = [], []
    for start in tqdm(range(0, len(chosen), train.batch_size), desc=f"bank ({run.state})", leave=False):
        indices = chosen[start : start + train.batch_size]
        for index, features in zip(indices, train.maps(indices, run.state)):
            weights = class_weights(train.split.annotation(index), train.grid, classes)
            present = weights.sum(1) > 0
            pooled = weights[present] @ features.flatten(0, 1).cpu() / weights[present].sum(1, keepdim=True)
            centroids.append(pooled)
            labels.append(present.nonzero()[:, 0])
    if not sum(map(len, labels)):
        raise UserError(
            f"no patch of the {len(chosen)} images in the bank of seed {run.seed} is labeled; a larger bank_share "
            "takes more of them"
        )
    return normalize(torch.cat(centroids)).to(run.device), torch.cat(labels).to(run.device)


def class_weights(mask: Tensor, grid: int, classes: int) -> Tensor:
    """(classes, K*K): how many pixels of each class each patch holds; a mask (h, w) of any size."""
    rows, columns = (torch.arange(n) * grid // n for n in mask.shape)
    patch = rows[:, None] * grid + columns
    labeled = mask != IGNORE
    index = mask[labeled].long() * grid**2 + patch[labeled]
    return torch.bincount(index, minlength=classes * grid**2).reshape(classes, grid**2).float()


def nearest_class(queries: Tensor, bank: Tensor, labels: Tensor, neighbors: int, classes: int) -> Tensor:
    """The class (N,) most frequent among the nearest bank entries (M, C) of queries (N, C), by cosine."""
    predicted = []
    for part in normalize(queries).split(16384):
        cosine, index = (part @ bank.T).topk(min(neighbors, len(bank)))
        # A neighbor is one vote; cosines only part classes with equally many votes.
        votes = 1 + cosine / (4 * neighbors)
        tally = votes.new_zeros(len(part), classes).scatter_add_(1, labels[index], votes)
        predicted.append(tally.argmax(1))
    return torch.cat(predicted)
