"""Numbers of semantic segmentation, and masks at other sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.functional.classification import multiclass_confusion_matrix

from timm_dvt.errors import UserError
from training.evaluate.data.splits import IGNORE


class SegmentationScore:
    """Confusion of predicted and true classes over many images; pixels whose true class is 255 do not count."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)  # [true, predicted]

    def add(self, predicted: Tensor, true: Tensor) -> None:
        """Count one image's pixels, both (h, w) class indices."""
        self.confusion += multiclass_confusion_matrix(
            predicted.cpu().long(), true.cpu().long(), self.classes, ignore_index=IGNORE
        )

    def numbers(self) -> dict[str, float]:
        """mIoU, mAcc and aAcc in percent.

        IoU of a class is TP / (TP + FP + FN); classes that occur neither as true nor as predicted are left out
        of mIoU, classes that do not occur as true out of mAcc. aAcc is the share of pixels that are right.
        """
        matrix = self.confusion.double()
        right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        if not true.sum():
            raise UserError("there is no labeled pixel in the masks: all are 255")
        union = true + predicted - right
        return {
            "mIoU": 100 * float((right / union)[union > 0].mean()),
            "mAcc": 100 * float((right / true)[true > 0].mean()),
            "aAcc": 100 * float(right.sum() / true.sum()),
        }

    def class_numbers(self, names: Sequence[str]) -> dict[str, float]:
        """IoU/NAME and Acc/NAME in percent of each class that occurs as true."""
        matrix = self.confusion.double()
        right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        numbers = {}
        for i, name in enumerate(names):
            if true[i] > 0:
                numbers[f"IoU/{name}"] = 100 * float(right[i] / (true[i] + predicted[i] - right[i]))
                numbers[f"Acc/{name}"] = 100 * float(right[i] / true[i])
        return numbers


def resize_mask(mask: Tensor, size: int) -> Tensor:
    """A mask (h, w) at (size, size), each pixel the class of the nearest one."""
    return interpolate(mask[None, None].float(), (size, size), mode="nearest-exact")[0, 0].to(mask.dtype)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, K, K) at (B, C, *size), bilinear, patch centers at patch centers."""
    return interpolate(maps, size, mode="bilinear", align_corners=False)
