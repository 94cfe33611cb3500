"""Raw final patch tokens of any model that can have a denoiser: what its denoiser is given, whatever its family."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from timm_dvt.attach import Denoised, norms_after_pool
from timm_dvt.errors import UserError
from timm_dvt.layouts import Layout, layout_of


def final_tokens(
    model: nn.Module, images: torch.Tensor, layout: Layout | None = None
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Prefix tokens (B, prefix, C), patch tokens (B, H*W, C), both final-normed and never denoised, and (H, W).

    Args:
        model: a timm model, with a denoiser or without.
        images: (B, 3, h, w), normalized.
        layout: where known, of `timm_dvt.layouts.layout_of`; default the model's own, found out by a run.

    Raises:
        TypeError, ValueError: as `timm_dvt.add_denoiser`.
    """
    known: Any = model
    layout = layout or getattr(model, "layout", None) or layout_of(model)
    with known.denoising(False) if isinstance(model, Denoised) else nullcontext():
        features = known.forward_features(images)
    prefix, patches = normed(known, features, layout)
    return prefix, patches, layout.grid_at(images.shape[2], images.shape[3], patches.shape[1])


def normed(model: Any, features: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefix (B, prefix, C) and patch tokens (B, H*W, C) of final features, normed where timm norms after the pool."""
    count = int(getattr(model, "num_prefix_tokens", layout.prefix))
    patches = layout.patches(features, count)
    prefix = features[:, :count] if layout.form == "tokens" else patches[:, :0]
    if norms_after_pool(model) or getattr(model, "norm_after_pool", False):
        prefix, patches = model.fc_norm(prefix), model.fc_norm(patches)
    return prefix, patches


def fit_to(model: Any, size: int | tuple[int, int]) -> Layout:
    """Make a model take images of this side, or height and width, in place, where it does not; returns its layout.

    Raises:
        ValueError: it takes no images of that size.
    """
    pixels = (size, size) if isinstance(size, int) else size
    if hasattr(model, "set_input_size") and not getattr(model, "dynamic_img_size", False):
        model.set_input_size(img_size=pixels)
    try:
        return layout_of(model, pixels)
    except TypeError as e:
        raise UserError(f"input_size is {size}, at which a {type(model).__name__} does not run. {e}") from e
