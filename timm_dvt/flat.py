"""Patches without texture, as of walls and skies: known by their pixels, and given what those like them have in common.

Beside things, a wall's tokens keep the pattern of their places, which no denoiser of tokens takes off: artifacts are
others there than in photographs, and a block cannot tell a wall from what looks like it. Its pixels can.
"""

from statistics import fmean
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch.nn.functional import max_pool2d, normalize, scaled_dot_product_attention, softplus

BELOW = 0.6 / 255  # of an image in [0, 1]: what a plane leaves of a flat patch's cells
LEAST = -30.0  # a logit that leaves a token as it is to the bit, and that half precision can hold


def flat_below(model: Any) -> float:
    """`BELOW` in units of a timm model's input, whose channels are scaled nearly alike."""
    return BELOW / fmean(resolve_model_data_config(model)["std"])


def flat_logits(images: torch.Tensor, grid_size: tuple[int, int], below: torch.Tensor) -> torch.Tensor:
    """Logits (B, H*W) of patches: above 0 where the 4 x 4 cells of a patch are less than `below` from a plane.

    Cells average the noise of a camera out. Of a group of 3 x 3 patches all have to be flat: a single one among
    textured ones, as of a car, is content.

    Args:
        images: (B, channels, h, w), as the model takes them.
        grid_size: H and W.
        below: root mean square, in units of the images; the mean of the channels counts.
    """
    rows, columns = images.shape[2] // grid_size[0], images.shape[3] // grid_size[1]
    used = images.detach()[:, :, : grid_size[0] * rows, : grid_size[1] * columns].float() / below.float().clamp(
        min=1e-6
    )
    patches = used.reshape(used.shape[0], used.shape[1], grid_size[0], rows, grid_size[1], columns)
    # Less their mean before they are multiplied: half precision, where autocast takes it, would round colors.
    patches = (patches - patches.mean((3, 5), keepdim=True)).transpose(3, 4)
    cells = (cell_means(rows).to(patches) @ patches @ cell_means(columns).to(patches).T).float()
    place = torch.arange(4, device=cells.device, dtype=cells.dtype) - 1.5
    for slope in (place, place[:, None]):
        cells = cells - (cells * slope).sum((-2, -1), keepdim=True) / (4 * place.square().sum()) * slope
    roughness = cells.square().mean((-2, -1)).sqrt().mean(1, keepdim=True)
    roughness = -max_pool2d(-max_pool2d(roughness, 3, 1, 1), 3, 1, 1)
    return (8 * (1 - roughness)).clamp(min=-30).flatten(1)  # LEAST; TorchScript knows no globals


def cell_means(pixels: int) -> torch.Tensor:
    """Weights (4, pixels) of the means over the quarters of a side; a pixel between two is shared."""
    ends, pixel = torch.arange(5) * (pixels / 4), torch.arange(pixels)
    shared = torch.minimum(ends[1:, None], pixel + 1) - torch.maximum(ends[:-1, None], pixel)
    return shared.clamp(min=0) * (4 / pixels)


def level(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, C), where flat with the mean of the flat ones like them: weights exp(40 (cosine - 1)), twice.

    Args:
        logits: (B, N), of `flat_logits`.
    """
    if not torch.jit.is_scripting() and tokens.device.type == "cpu":
        if not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            # Photographs have few flat patches, and those of the others take no part.
            leveled = tokens.clone()
            for image, all_logits in enumerate(logits):
                flat = (all_logits > LEAST).nonzero()[:, 0]
                leveled[image, flat] = _level(tokens[image, flat][None], all_logits[flat][None])[0]
            return leveled
    return _level(tokens, logits)


def _level(tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # As attention of one head, whose kernels need not hold the weights of all pairs of tokens at once.
    leveled, flat = tokens.float()[:, None], logits.sigmoid()[:, None, :, None]
    among = -softplus(-logits)[:, None, None]  # the sigmoid's logarithm, finite in every runtime
    for _ in range(2):
        unit = normalize(leveled, dim=-1)
        mean = scaled_dot_product_attention(unit, unit, leveled, among, scale=40.0)
        leveled = torch.lerp(leveled, mean.to(leveled.dtype), flat)
    return leveled[:, 0].to(tokens.dtype)
