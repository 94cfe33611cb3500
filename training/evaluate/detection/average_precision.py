"""VOC's mean average precision of detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from timm_dvt.errors import UserError
from training.evaluate.data.splits import Boxes


class Detections(NamedTuple):
    """Of one image: boxes (N, 4) as `Boxes` has them, classes (N,) and scores (N,)."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor


def voc_map(
    detections: Sequence[Detections], true: Sequence[Boxes], classes: int, iou: float = 0.5
) -> dict[str, float]:
    """mAP in percent by the rules of the VOC devkit, over the classes that have objects.

    In the order of their scores, detections of a class are hits if the true box of that class with which their
    IoU is largest reaches `iou` and was not hit before; a second hit is a miss; one on a difficult object does
    not count either way.

    Returns:
        mAP: area under the precision-recall curve, precision made monotonous (the devkit from 2010 on), and
        mAP_11: mean of 11 points of it (the devkit of 2007).
    """
    areas, points = [], []
    for label in range(classes):
        hits, scores, objects = [], [], 0
        for detected, boxes in zip(detections, true):
            predicted = detected.classes == label
            mine = boxes.classes == label
            objects += int((~boxes.difficult[mine]).sum())
            ranking = detected.scores[predicted].argsort(descending=True, stable=True)
            outcome = _match(detected.boxes[predicted][ranking], boxes.boxes[mine], boxes.difficult[mine], iou)
            hits.extend(outcome)
            scores.extend(detected.scores[predicted][ranking].tolist())
        if not objects:
            continue
        kept = [(score, hit) for score, hit in zip(scores, hits) if hit is not None]
        kept.sort(key=lambda pair: -pair[0])
        area, eleven = _average_precision(np.array([hit for _, hit in kept], dtype=bool), objects)
        areas.append(area)
        points.append(eleven)
    if not areas:
        raise UserError("there is no object to detect in any image")
    return {"mAP": 100 * float(np.mean(areas)), "mAP_11": 100 * float(np.mean(points))}


def _match(detected: Tensor, true: Tensor, difficult: Tensor, threshold: float) -> list[bool | None]:
    """For each detection of one image and class, best first: hit, miss, or None where it does not count."""
    if not len(true):
        return [False] * len(detected)
    outcome: list[bool | None] = []
    taken = torch.zeros(len(true), dtype=torch.bool)
    for overlaps in box_iou(detected.double(), true.double()):
        best = int(overlaps.argmax())
        if overlaps[best] < threshold:
            outcome.append(False)
        elif difficult[best]:
            outcome.append(None)
        else:
            outcome.append(not bool(taken[best]))
            taken[best] = True
    return outcome


def _average_precision(hits: np.ndarray, objects: int) -> tuple[float, float]:
    """Area and 11-point mean of the curve of detections in order."""
    right = np.cumsum(hits)
    recall = np.concatenate([[0.0], right / objects])
    precision = np.concatenate([[0.0], right / np.arange(1, len(hits) + 1)])
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    area = float((np.diff(recall) * best_from_here[1:]).sum())
    levels = np.linspace(0, 1, 11)
    # 1e-12: a recall of 3/10 must reach the level 0.3.
    eleven = [best_from_here[recall >= level - 1e-12].max(initial=0.0) for level in levels]
    return area, float(np.mean(eleven))
