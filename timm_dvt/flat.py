"""Flat patches, those without texture, as of walls and skies: known by their pixels, and leveled among themselves.

Beside objects, the tokens of a wall keep the pattern of their places, which no denoiser of tokens removes: artifacts
differ there from those in photographs, and a block cannot tell a wall from what looks like one. Its pixels can.
"""

from statistics import fmean
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import use_fused_attn
from torch.nn.functional import max_pool2d, normalize, pad, scaled_dot_product_attention, softplus
from torch.utils._python_dispatch import _len_torch_dispatch_stack

BELOW = 0.6 / 255  # of an image in [0, 1]: what a plane leaves of a flat patch's cells
LEAST = -30.0  # a logit that leaves a token as it is to the bit, and that half precision can hold
BITS = 13  # of the number of a group; in more than 8,192 patches two may share one


def flat_below(model: Any) -> float:
    """`BELOW` in units of a timm model's input, whose channels are scaled nearly alike."""
    std = resolve_model_data_config(model)["std"] if getattr(model, "in_chans", 3) == 3 else [0.25]  # as LayerReader
    return BELOW / fmean(std)


def flat_patches(
    images: torch.Tensor, grid_size: tuple[int, int], below: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which patches have no texture, what tells them apart, and whether an image has the same texture all over.

    A patch is flat whose 4 x 4 cells are less than `below` from a plane, and whose pixels are less than ten times that
    from their cell: cells average the noise of a camera out. Of 3 x 3 patches all have to be flat, fewer at a border: a
    single one among textured ones, as of a car, is content.

    Args:
        images: (B, channels, h, w), as the model takes them.
        grid_size: H and W.
        below: root mean square, in units of the images; the mean of the channels counts.

    Returns:
        Logits (B, H*W), above 0 for flat patches; marks (B, H*W, channels + `BITS`), colors in such units that those
        that differ by 0.35, of 1 from black to white, are 1 apart, and behind them the number of the group of flat
        neighbors that a patch is in, so that other groups are far; and (B,), 1 for images of one color or
        of nothing but noise, 0 for those of which a part has another texture, as a page with text on it has.
    """
    rows, columns = patch_side(images.shape[2], grid_size[0]), patch_side(images.shape[3], grid_size[1])
    height, width = grid_size[0] * rows, grid_size[1] * columns
    used = images.detach().float() / below.float()
    if height != images.shape[2] or width != images.shape[3]:
        used = pad(used, (0, width - images.shape[3], 0, height - images.shape[2]))  # or cut off
    patches = used.reshape(used.shape[0], used.shape[1], grid_size[0], rows, grid_size[1], columns).transpose(3, 4)
    colors = patches.mean((-2, -1), keepdim=True)
    # Less their mean before they are multiplied: half precision, where autocast takes it, would round colors.
    patches = patches - colors
    cells = (cell_means(rows).to(patches) @ patches @ cell_means(columns).to(patches).T).float()
    grain = (patches.square().mean((-2, -1)) - cells.square().mean((-2, -1))).clamp(min=0).sqrt()
    place = torch.arange(4, device=cells.device, dtype=cells.dtype) - 1.5
    for slope in (place, place[:, None]):
        cells = cells - (cells * slope).sum((-2, -1), keepdim=True) / (4 * place.square().sum()) * slope
    bumps = cells.square().mean((-2, -1))
    roughness = torch.maximum(bumps.sqrt(), grain / 10).mean(1, keepdim=True)
    roughness = -max_pool2d(-max_pool2d(roughness, 3, 1, 1), 3, 1, 1)
    logits = (8 * (1 - roughness)).clamp(min=-30)  # LEAST; TorchScript knows no globals
    units = 0.6 / 255 / 0.35 / used.shape[1] ** 0.5  # of BELOW
    colors = colors[..., 0, 0] * units
    marks = torch.cat([colors, group_numbers(logits > -30, colors)], 1).flatten(2).transpose(1, 2)
    # What a plane leaves of a patch, and half a level, is nearly the same in all patches of a color or of noise.
    texture = ((bumps + grain.square()).sqrt().mean(1) + 0.5 / 0.6).log().flatten(1)
    alike = (100 * (0.24 - texture.std(1, unbiased=False))).sigmoid()
    return logits.flatten(1), marks, alike


def group_numbers(flat: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """Binary numbers (B, 13, H, W), with digits that make others far, of the groups of flat patches (B, 1, H, W).

    Two patches are in one group if a path of flat neighbors, up, down, left or right, leads from one to the other in
    twelve straight lines or fewer, without a step in the colors (B, channels, H, W) of 1 or more. Times a root of 2, as
    in `level`, digits are exact in half precision, too.
    """
    rows, columns = flat.shape[2], flat.shape[3]
    numbers = torch.arange(rows * columns, device=flat.device, dtype=torch.float32).reshape(1, 1, rows, columns)
    numbers = torch.where(flat, numbers, -1.0)
    across, down = _runs(flat, colors), _runs(flat.transpose(2, 3), colors.transpose(2, 3))
    for _ in range(6):
        numbers = _largest_of_runs(numbers, flat, across)
        numbers = _largest_of_runs(numbers.transpose(2, 3), flat.transpose(2, 3), down).transpose(2, 3)
    digits = 2.0 ** torch.arange(13, device=flat.device).reshape(13, 1, 1)  # BITS
    return ((numbers.clamp(min=0) / digits).floor() % 2 - 0.5) * 32**0.5


def _runs(flat: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
    """Numbers of the runs of flat patches (B, 1, ..., N) along the last dimension."""
    steps = (colors[..., 1:] - colors[..., :-1]).square().sum(1, keepdim=True) >= 1
    return (~flat | pad(steps, (1, 0))).long().cumsum(-1)


def _largest_of_runs(numbers: torch.Tensor, flat: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """Along the last dimension, the largest number of each run of flat patches, at all of its places."""
    same = (runs[..., None] == runs[..., None, :]) & flat[..., None, :]
    return torch.where(flat, torch.where(same, numbers[..., None, :], -1.0).amax(-1), numbers)


def patch_side(pixels: int, count: int) -> int:
    """Pixels of a patch, of which so many make a side; the last one may be padded, or a rest left over."""
    side = pixels // count
    return side if side * count == pixels else side + side % 2  # patches have even sides


def cell_means(pixels: int) -> torch.Tensor:
    """Weights (4, pixels) of the means over the quarters of a side; a pixel between two is shared."""
    ends, pixel = torch.arange(5) * (pixels / 4), torch.arange(pixels)
    shared = torch.minimum(ends[1:, None], pixel + 1) - torch.maximum(ends[:-1, None], pixel)
    return shared.clamp(min=0) * (4 / pixels)


def level(tokens: torch.Tensor, logits: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, C), where flat with the mean of the flat ones like them, twice; others as they are.

    Weights are exp(40 (cosine - 1) - d^2), d the distance of the marks: what is drawn in other plain colors, or has an
    outline around it, stays apart.

    Args:
        logits, marks: of `flat_patches`.
    """
    if torch.jit.is_scripting() or not _looks_at_values(tokens):
        return _level(tokens, logits, marks)
    # Photographs have few flat patches, and those of the others take no part.
    leveled = tokens.clone()
    for image, there in enumerate(logits > LEAST):
        flat = there.nonzero()[:, 0]
        parts = (part[image, flat][None] for part in (tokens, logits, marks))
        leveled[image, flat] = _level(*parts)[0]
    return leveled


def _level(tokens: torch.Tensor, logits: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    leveled, flat = tokens.float(), logits.sigmoid()[..., None]
    among = -softplus(-logits) - marks.square().sum(-1)  # the sigmoid's logarithm, finite in every runtime
    for _ in range(2):
        near = torch.cat([normalize(leveled, dim=-1) * 40**0.5, marks * 2**0.5], -1)
        if torch.jit.is_scripting() or _fused(tokens):  # whose kernels do not hold the weights of all pairs at once
            query, value = near[:, None], pad(leveled, (0, marks.shape[-1]))[:, None]
            mean = scaled_dot_product_attention(query, query, value, among[:, None, None], scale=1.0)
            mean = mean[:, 0, :, : tokens.shape[-1]]
        else:
            mean = (near @ near.transpose(1, 2) + among[:, None]).softmax(-1) @ leveled
        leveled = torch.lerp(leveled, mean.to(leveled.dtype), flat)
    return torch.where(logits[..., None] > -30, leveled.to(tokens.dtype), tokens)


@torch.jit.unused
def _fused(tokens: torch.Tensor) -> bool:
    """Whether fused kernels are wanted, by timm's switch, and can be: vmap and jvp know none."""
    compiling = torch.compiler.is_compiling()  # which would break its graph at the next question
    return bool(use_fused_attn()) and (compiling or not torch._C._functorch.is_functorch_wrapped_tensor(tokens))


@torch.jit.unused
def _looks_at_values(tokens: torch.Tensor) -> bool:
    """Whether code may depend on what a tensor holds, and may wait for it: on the CPU, and where nothing is traced."""
    if type(tokens) is not torch.Tensor or tokens.device.type != "cpu":
        return False
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling() or _len_torch_dispatch_stack()
    return not traced and not torch._C._functorch.is_functorch_wrapped_tensor(tokens)
