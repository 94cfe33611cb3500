"""INSID3's positional debiasing (CVPR 2026; visinf/INSID3): the subspace of an image without content, projected out.

    E = [x_p / |x_p|] - mean over places          the black image's patch tokens, of length 1 and centered
    E = U S V^T,  F = (I - U_r U_r^T) y           the r first left singular vectors taken off every token

Theirs: the black image, lengths of 1 before the SVD, no mean put back, r = 500 of the 1,024 channels of DINOv3-L at
1,024 px for segmentation, and 20 of the 768 of DINOv3-B at 768 px for correspondence. They bring y to length 1 before
the projection and F after it; cosines of F are the same without.

Ours: of another C those shares of the channels are taken, 500 / 1,024 C (`insid3`) and 20 / 768 C (`insid3-matching`);
for other sizes of DINOv3 their code has 500 too, which is more than a ViT-S has channels. And F keeps the length that
the projection leaves, for tasks that read lengths.

`insid3-energy` is the same with our choice of r: the fewest directions that hold `ENERGY` of the square of E.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from timm_dvt.attach import attach_denoiser
from timm_dvt.calibration.linear import projecting_out
from training.rivals.sample import Sample

SEGMENTATION, MATCHING = 500 / 1024, 20 / 768
ENERGY = 0.9


def directions(blank: Tensor, channels: float = SEGMENTATION, energy: float | None = None) -> Tensor:
    """Orthonormal directions (C, r) of position in the patch tokens (K, K, C) of an image without content.

    Args:
        channels: r / C.
        energy: the share of the square of E that they hold, which gives r instead.
    """
    tokens = normalize(blank.flatten(0, 1).double(), dim=-1)
    left, values, _ = torch.linalg.svd((tokens - tokens.mean(0)).T, full_matrices=False)
    if energy is None:
        return left[:, : round(channels * len(left))]
    share = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    # Rounding must not ask for one direction more than there are.
    return left[:, : int((share < energy - 1e-9).sum()) + 1]


def fit(model: Any, sample: Sample, channels: float = SEGMENTATION, energy: float | None = None) -> str:
    """Give the model the denoiser, in place; returns what was learned, in words."""
    basis = directions(sample.black, channels, energy)
    attach_denoiser(model, projecting_out(basis, sample.reader.grid))
    return f"{basis.shape[1]} of {basis.shape[0]} directions, of a black image"
