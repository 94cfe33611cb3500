"""Object discovery: Tab. 4, by LOST with the feature norm as indicator.

CorLoc: the share of images, in percent, whose one box has an IoU above 0.5 with a labeled object; images without
a labeled object do not count. On VOC for trainval of each year there is, on COCO for the 20k list of LOST.
Nothing is random: all seeds give the same number.

LOST (Simeoni et al., BMVC 2021): one box an image from patch features, without labels or training.

With features f_p at N patches:

    seed        p* = the patch most prominent. LOST: of least degree, d_p = #{q : f_p . f_q >= 0}; DVT (Sec. 5.2,
                appendix B): of largest norm |f_p|
    expansion   S = {q among the k most prominent patches : f_q . f_p* >= 0}
    mask        m_q = [sum over s in S of f_q . f_s >= 0]
    box         around the connected component of m (4 neighbors) that holds the seed
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

from timm_dvt.errors import UserError
from training.evaluate.features.cached import Features
from training.evaluate.run import Run

KIND = "discovery"
STATES = ("raw", "denoised")
NUMBERS = {"CorLoc/": "CorLoc"}
MEANING = "CorLoc: images of which one object is found without any training, in percent; more is better."


@dataclass(frozen=True)
class Settings:
    """LOST's k of 100 (for maps of about a thousand patches), DVT's indicator; `center` is explained at `lost`."""

    expansion: int = 100
    indicator: str = "norm"
    center: bool = True


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """CorLoc/PART in percent, for each set of images."""
    numbers = {}
    for part, features in data.items():
        features.extract()
        right = counted = 0
        for indices, maps in features.batches(run.state, f"LOST on {part} ({run.state})"):
            for index, image in zip(indices, maps.cpu()):
                boxes = features.split.annotation(index).boxes
                if len(boxes):
                    counted += 1
                    box = lost(image, settings.expansion, settings.indicator, settings.center)
                    right += is_correct(box, boxes)
        if not counted:
            raise UserError(f"no image of {features.split.name} has a labeled object")
        numbers[f"CorLoc/{part}"] = 100 * right / counted
    return numbers


INDICATORS = ("norm", "degree")


def lost(features: Tensor, expansion: int = 100, indicator: str = "norm", center: bool = False) -> Tensor:
    """The box (4,) x0, y0, x1, y1 of an image's most prominent object, as fractions of its sides.

    Args:
        features: (H, W, C) patch features.
        expansion: k, the patches that may join the seed.
        indicator: of prominence: "norm" (DVT's) or "degree" (LOST's).
        center: take products of features minus their mean over the image. LOST's keys have no common offset;
            outputs of a final norm do, and with it nearly all products are positive and the box is the image.
            Norms are of the features as they are.

    Raises:
        ValueError: no such indicator, or features that are no map.
    """
    if indicator not in INDICATORS:
        raise UserError(f"indicator must be one of {INDICATORS}, got {indicator!r}")
    if features.ndim != 3 or expansion < 1:
        shape = tuple(features.shape)
        raise UserError(f"features must be (H, W, C) and expansion 1 or more, got {shape} and {expansion}")
    height, width, _ = features.shape
    tokens = features.flatten(0, 1).double()
    based = tokens - tokens.mean(0) if center else tokens
    similarity = based @ based.T
    prominence = tokens.norm(dim=1) if indicator == "norm" else -(similarity >= 0).sum(1).double()
    order = prominence.argsort(descending=True, stable=True)
    seed, pool = order[0], order[:expansion]
    expanded = pool[similarity[seed, pool] >= 0]
    mask = (similarity[expanded].sum(0) >= 0).reshape(height, width).cpu().numpy()
    # By definition the seed is in its own mask; a sum of products may round to just below 0.
    row, column = divmod(int(seed), width)
    mask[row, column] = True
    labels, _ = ndimage.label(mask)
    rows, columns = np.nonzero(labels == labels[row, column])
    box = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
    return torch.tensor(box, dtype=torch.float64)


def is_correct(box: Tensor, boxes: Tensor) -> bool:
    """CorLoc's criterion: IoU above 0.5 with any of the boxes (N, 4)."""
    return bool((box_iou(box[None].double(), boxes.double())[0] > 0.5).any())
