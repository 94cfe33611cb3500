"""LOST (Simeoni et al., BMVC 2021): one box an image from patch features, without labels or training.

With features f_p at N patches:

    seed        p* = the patch most prominent. LOST: of least degree, d_p = #{q : f_p . f_q >= 0}; DVT (Sec. 5.2,
                appendix B): of largest norm |f_p|
    expansion   S = {q among the k most prominent patches : f_q . f_p* >= 0}
    mask        m_q = [sum over s in S of f_q . f_s >= 0]
    box         around the connected component of m (4 neighbours) that holds the seed
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from timm_dvt.errors import UserError

INDICATORS = ("norm", "degree")


def lost(features: Tensor, expansion: int = 100, indicator: str = "norm", centre: bool = False) -> Tensor:
    """The box (4,) x0, y0, x1, y1 of an image's most prominent object, as fractions of its sides.

    Args:
        features: (H, W, C) patch features.
        expansion: k, the patches that may join the seed.
        indicator: of prominence: "norm" (DVT's) or "degree" (LOST's).
        centre: take products of features minus their mean over the image. LOST's keys have no common offset;
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
    based = tokens - tokens.mean(0) if centre else tokens
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
    return bool((pairwise_iou(box[None], boxes)[0] > 0.5).any())


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU (N, M) of boxes (N, 4) and (M, 4), x1 and y1 exclusive."""
    first, second = first.double(), second.double()
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)
