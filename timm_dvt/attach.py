"""Giving a timm model a denoiser, and taking it away."""

import operator
import re
from collections.abc import Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import PretrainedCfg, get_pretrained_cfg, split_model_name_tag
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_dvt.denoised import Denoised, denoised_class
from timm_dvt.denoiser import Denoiser, LayerDenoisers, combine
from timm_dvt.errors import UnsupportedModelError, UserError
from timm_dvt.flat import flat_below
from timm_dvt.layouts import Layout, layout_of, unwrapping

DenoisedVisionTransformer = denoised_class(VisionTransformer)
DenoisedEva = denoised_class(Eva)

# What a denoised model has that its backbone has not.
OURS = (
    "denoiser",
    "denoise",
    "layout",
    "plain",
    "final_block",
    "denoises_final",
    "backbone_name",
    "norm_after_pool",
    "timms_feature_info",
)


def add_denoiser(
    model: nn.Module,
    grid_size: int | tuple[int, int] | None = None,
    depth: int = 1,
    num_heads: int | None = None,
    pos_embed: bool = True,
    arch: str = "block",
    layers: Sequence[int] | None = None,
    keep_length: bool = False,
    pos_embed_out: bool | Sequence[int] = False,
    blank_gate: bool = False,
    flat_gate: bool = False,
) -> nn.Module:
    """Give a timm model a denoiser, in place, and return it. The denoiser is new: train or load it.

    Args:
        model: the backbone; its class becomes the denoised one, its weights, device and dtype stay.
        grid_size: rows and columns of the denoiser's position embedding; default the model's own patch grid.
        depth: blocks of the denoiser (paper: 1).
        num_heads: heads of a block; default `C // 64`.
        pos_embed: False for a denoiser without position embedding (paper, Tab. 6 e).
        arch: "block", or one of the paper's ablations and baselines: see `timm_dvt.denoiser.Denoiser`.
        layers: blocks that get a denoiser each, counted from 0, or from the end with a minus; default the last block.
            Their denoised maps come out of forward_intermediates, get_intermediate_layers and features_only. Others
            than the last only where class and patch tokens go through all blocks together.
        keep_length, pos_embed_out, blank_gate: give clean tokens the length of the raw ones; add a second position
            embedding to them; level images without content: see `timm_dvt.denoiser.Denoiser`.
        flat_gate: level flat patches, as of walls, too: see `timm_dvt.flat`.

    Raises:
        TypeError: the model does not give the patches of one grid (the message says why), or has a denoiser already.
        ValueError: the model drops patches in training, a block does not exist, or a size does not fit.
    """
    layout = check_supported(model)
    new = new_denoisers(
        model,
        layout,
        grid_size,
        layers,
        depth=depth,
        num_heads=num_heads,
        pos_embed=pos_embed,
        arch=arch,
        keep_length=keep_length,
        pos_embed_out=pos_embed_out,
        blank_gate=blank_gate,
        flat_gate=flat_gate,
    )
    return attach_denoiser(model, new, layout)


def new_denoisers(
    model: nn.Module,
    layout: Layout,
    grid_size: int | tuple[int, int] | None = None,
    layers: Sequence[int] | None = None,
    pos_embed_out: bool | Sequence[int] = False,
    flat_gate: bool = False,
    **options: Any,
) -> Denoiser | LayerDenoisers:
    """New denoisers for a model of this layout, on its device and of its dtype; `options` are those of `Denoiser`."""
    options["pos_embed_out"] = pos_embed_out if isinstance(pos_embed_out, bool) else to_2tuple(pos_embed_out)
    options["flat_below"] = flat_below(model) if flat_gate else None
    grid = tuple(to_2tuple(layout.grid if grid_size is None else grid_size))
    weight = next(model.parameters())
    options |= {"device": weight.device, "dtype": weight.dtype}
    blocks = blocks_of(model, layout, layers)
    new = {block: Denoiser(layout.channels, grid, **options) for block in blocks}
    return combine(new, final=layout.maps - 1)


def blocks_of(model: nn.Module, layout: Layout, layers: Sequence[int] | None) -> list[int]:
    """The blocks that `layers` of `add_denoiser` name, from 0, rising. Raises ValueError for those that cannot be."""
    count = layout.maps
    try:
        named: Any = [-1] if layers is None else [layers] if isinstance(layers, int) else layers
        wanted = [operator.index(block) for block in named]
    except TypeError:  # no whole numbers
        wanted = []
    if not wanted or any(not -count <= block < count for block in wanted):
        raise UserError(f"layers must be one or more blocks from {-count} to {count - 1}, got {layers!r}")
    blocks = sorted({block % count for block in wanted})
    if blocks != [count - 1]:
        _check_inner(model, layout)
    return blocks


def check_supported(model: nn.Module) -> Layout:
    """How the features of a model lie, or TypeError or ValueError for one that cannot have a denoiser."""
    if isinstance(model, Denoised):
        raise UnsupportedModelError(f"This {type(model).__name__} has a denoiser already.")
    layout = layout_of(model)
    rate = getattr(getattr(model, "patch_drop", None), "prob", 0) or getattr(model, "patch_drop_rate", 0)
    if rate:
        raise UserError(
            f"patch_drop_rate={rate} leaves holes in the patch grid, and the denoiser needs the whole "
            f"grid. Create the model with patch_drop_rate=0."
        )
    return layout


def attach_denoiser(model: Any, denoiser: Denoiser | LayerDenoisers, layout: Layout | None = None) -> nn.Module:
    """Make a timm model a denoised one with this denoiser, in place, and return it. Raises as `add_denoiser`.

    Args:
        layout: what `check_supported` says of the model, where that was asked already: for some classes it is slow.
    """
    layout = layout or check_supported(model)
    final = layout.maps - 1
    if isinstance(denoiser, LayerDenoisers):
        _check_inner(model, layout)
    weight = next(model.parameters())
    model.__class__ = denoised_class(type(model))
    model.denoiser = denoiser.to(device=weight.device, dtype=weight.dtype).train(model.training)
    model.denoise = True
    model.layout, model.plain = layout, layout.plain
    model.final_block = final
    model.denoises_final = final in model.denoisers()
    model.backbone_name = timm_name(model)
    model.norm_after_pool = norms_after_pool(model)
    model.timms_feature_info = model.feature_info
    if not layout.plain and model.feature_info[-1]["num_chs"] != layout.channels:  # SAM's neck
        model.feature_info = [*model.feature_info[:-1], {**model.feature_info[-1], "num_chs": layout.channels}]
    model.set_grad_checkpointing(getattr(model, "grad_checkpointing", False))
    return model


def _check_inner(model: nn.Module, layout: Layout) -> None:
    """Raise ValueError for a model of which only the last block can have a denoiser."""
    if not layout.plain:
        raise UserError(
            f"layers other than the last cannot be denoised in a {type(model).__name__}: what its earlier blocks give "
            "is not what its final features are made of."
        )


def norms_after_pool(model: nn.Module) -> bool:
    """Whether timm has moved the final norm behind the pool, as for averages; a denoiser sees normed tokens anyway."""
    norm, fc_norm = getattr(model, "norm", None), getattr(model, "fc_norm", None)
    return isinstance(norm, nn.Identity) and not isinstance(fc_norm, (nn.Identity, type(None)))


def behind_pool(state: dict) -> dict:
    """The state of a model with its final norm where timm has that of one that averages."""
    return {re.sub(r"^norm\.", "fc_norm.", key): tensor for key, tensor in state.items()}


def remove_denoiser(model: Any) -> nn.Module:
    """Make a denoised model the plain timm model it was, in place, and return it. Raises TypeError for any other."""
    if not isinstance(model, Denoised):
        raise UnsupportedModelError(f"{type(model).__name__} has no denoiser to remove.{unwrapping(model)}")
    name = model.backbone_name
    model.__class__ = model._backbone_class
    model.feature_info = model.timms_feature_info
    if name and timm_name(model) != name:  # a variant's config: what names the model and its weights is the variant's
        architecture, tag = split_model_name_tag(name)
        timms = get_pretrained_cfg(name) or PretrainedCfg()
        weights = {key: getattr(timms, key) for key in ("url", "file", "hf_hub_id", "hf_hub_filename", "license")}
        cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in ("source", *weights)}
        cfg |= {key: value for key, value in weights.items() if value is not None}
        model.pretrained_cfg = model.default_cfg = cfg | {"architecture": architecture, "tag": tag}
    for name in OURS:
        delattr(model, name)
    if hasattr(model, "_model_args"):  # what a config.json would say
        ours = ("backbone", "denoiser")
        model._model_args = {key: value for key, value in model._model_args.items() if key not in ours}
    return model


def timm_name(model: nn.Module) -> str:
    """A timm model's name, ARCH.TAG or ARCH; empty for a model that timm.create_model did not make."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))


def freeze_backbone(model: Any) -> nn.Module:
    """Leave only the denoiser trainable, and return the model. Raises TypeError for a model without a denoiser."""
    if getattr(model, "denoiser", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no denoiser; make one with timm_dvt.add_denoiser(model).{unwrapping(model)}"
        )
    model.requires_grad_(False)
    model.denoiser.requires_grad_(True)
    return model
