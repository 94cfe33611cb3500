"""Denoisers out of files of weights: of the file's architecture, blocks, heads and grids, loaded all or nothing."""

import math
import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models import create_model, is_model
from torch import nn

from timm_dvt.architectures import ARCHITECTURES, architecture_of
from timm_dvt.attach import norms_after_pool
from timm_dvt.denoiser import Denoiser, LayerDenoisers
from timm_dvt.errors import UnsupportedModelError
from timm_dvt.layouts import unwrapping
from timm_dvt.weights.checkpoints import Checkpoint, CheckpointError, Grid, State, check_state, read_checkpoint, some

# What a denoiser of any architecture can have beside its own.
EXTRAS = {"keeps_length", "pos_embed_out", "blank_gate.weight", "blank_gate.bias", "flat_below"}


def denoiser_for(
    checkpoint: Checkpoint,
    dim: int,
    grid_size: Grid,
    num_heads: int | None = None,
    backbone: str = "",
    depth: int | None = None,
    out_grid: Grid | None = None,
) -> Denoiser | LayerDenoisers:
    """A denoiser with the checkpoint's weights, for a ViT of width `dim`.

    The backbone's blocks that have a denoiser, its architecture, number of blocks, heads and grids are the file's. One
    that names no grids and heads, as no published one does, must be of `grid_size` and `num_heads`, and its output
    embedding of `out_grid` or a square.

    Args:
        backbone, depth: the backbone's name and number of blocks, where the caller knows them.

    Raises:
        CheckpointError: keys are missing or too many, shapes differ, or the file is for another backbone.
    """
    path, state = checkpoint.path, checkpoint.denoiser
    if checkpoint.made_for and backbone and checkpoint.made_for != backbone:
        raise CheckpointError(f"{path}: made for {checkpoint.made_for}, not for {backbone}.")
    if not state:
        raise CheckpointError(f"{path}: holds no denoiser (keys: {some(checkpoint.backbone)}).")
    new = partial(Denoiser, dim, num_heads=checkpoint.num_heads or num_heads, device="meta")
    grids = {"pos_embed": grid_size, "pos_embed_out": out_grid or grid_size, **checkpoint.grids}
    layers = sorted({int(m[1]) for m in (re.match(r"layers\.(\d{1,9})\.", key) for key in state) if m})
    if not layers:
        return _one_denoiser(state, new, grids, path, "denoiser.")
    if layers[-1] >= (last := (depth or 1024)):
        raise CheckpointError(f"{path}: holds a denoiser for block {layers[-1]}; the backbone's last is {last - 1}.")
    stray = [key for key in state if not re.match(r"layers\.\d{1,9}\.", key)]
    if stray:
        raise CheckpointError(f"{path}: unexpected keys: {some(stray)}.")
    denoisers = {}
    for block in layers:
        prefix = f"layers.{block}."
        layer_state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        denoisers[block] = _one_denoiser(layer_state, new, grids, path, f"denoiser.{prefix}")
    return LayerDenoisers(denoisers, (depth or layers[-1] + 1) - 1)


def _one_denoiser(state: State, new: Callable[..., Denoiser], grids: dict, path: str, prefix: str) -> Denoiser:
    """What `new` makes, with these weights; the keys tell its architecture and number of blocks."""
    arch = architecture_of({key: tensor for key, tensor in state.items() if key not in EXTRAS})
    numbers = [int(m[1]) for m in (re.match(r"blocks\.(\d{1,9})\.", key) for key in state) if m]
    depth = 1 + max(numbers, default=0) if ARCHITECTURES[arch].deep else 1
    if depth > 64:
        raise CheckpointError(f"{path}: block {depth - 1} of a denoiser is beyond reason; the file is damaged.")
    out = "pos_embed_out" in state and _out_grid(state["pos_embed_out"], grids["pos_embed_out"])
    more: dict[str, Any] = dict(keep_length="keeps_length" in state, pos_embed_out=out)
    more |= dict(blank_gate="blank_gate.weight" in state, flat_below=_number(state.get("flat_below")))
    denoiser = new(grids["pos_embed"], depth=depth, arch=arch, **more)
    check_state(denoiser, state, path, prefix=prefix)
    dtype = next(iter(state.values())).dtype  # check_state has seen to it that it is a floating one
    denoiser.to_empty(device="cpu").to(dtype).load_state_dict(state)
    if denoiser.flat_below is not None and not 0 < denoiser.flat_below < math.inf:
        raise CheckpointError(f"{path}: {prefix}flat_below is {float(denoiser.flat_below)}; it must be above 0.")
    return denoiser


def _number(value: torch.Tensor | None) -> float | None:
    """What a tensor of one number holds; `check_state` refuses others."""
    return None if value is None else float(value) if value.ndim == 0 else 0.0


def _out_grid(embedding: torch.Tensor, expected: Grid) -> Grid:
    """The grid of an output embedding (1, H*W, C): the expected one, or a square one if it has other places."""
    side = math.isqrt(places := embedding.shape[1] if embedding.ndim == 3 else 0)
    return expected if places == math.prod(expected) or side * side != places or not side else (side, side)


def _has_new_norm(model: Any) -> bool:
    """Whether another pool than its own gave a model a norm that has learned nothing, in place of its final one."""
    weight = model.fc_norm.weight if model.norm_after_pool else None
    if weight is None or weight.is_meta or not bool((weight == 1).all()) or not is_model(model.backbone_name):
        return False
    return not norms_after_pool(create_model(model.backbone_name, device="meta"))


def load_denoiser(model: Any, path: str | os.PathLike) -> nn.Module:
    """Load a denoiser's weights into a denoised model, all or nothing, and return the model.

    Args:
        model: a `*_dvt` model, or one that went through `timm_dvt.add_denoiser`.
        path: a published `.pth`, a safetensors file, or a folder of `timm_dvt.save_pretrained`. Its backbone weights,
            if any, are left alone. Architecture, number of blocks, grids and denoised layers become the file's.

    Warns where the model has a new norm behind its pool, which a denoiser was not trained behind.

    Raises:
        CheckpointError: names the file and what is wrong with it; the model is as it was.
    """
    if "_orig_mod" in getattr(model, "_modules", {}):  # of torch.compile
        load_denoiser(model._orig_mod, path)
        return model
    # Of its own: other wrappers hand on what the model inside has, and would keep what they are given to themselves.
    if "denoiser" not in getattr(model, "_modules", {}) or model.denoiser is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no denoiser to load into; see timm_dvt.add_denoiser.{unwrapping(model)}"
        )
    if _has_new_norm(model):
        warnings.warn(
            "timm made this model with a new norm behind its pool, and denoisers are made for what the trained one "
            "gives; create the *_dvt variant, or the model with its own pool and then "
            "model.reset_classifier(num_classes, global_pool)",
            stacklevel=2,
        )
    before = model.denoisers()
    old, last, name = before[max(before)], model.final_block, model.backbone_name
    checkpoint = read_checkpoint(path)
    new = denoiser_for(checkpoint, old.dim, old.learned_grid, old.num_heads, name, last + 1, old.out_grid_size)
    weight = next(old.parameters())
    new.requires_grad_(weight.requires_grad).train(model.training)
    model.denoiser = new.to(device=weight.device, dtype=weight.dtype)
    after = model.denoisers()
    model.denoises_final = last in after
    for denoiser in after.values():
        denoiser.grad_checkpointing = old.grad_checkpointing
    if last in before and last in after:
        after[last].norm = before[last].norm
    return model
