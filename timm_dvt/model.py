"""The denoised model classes: timm's own ViTs with a denoiser behind the final norm and a flag to switch it."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Optional

import torch
from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_dvt.denoiser import Denoiser

# timm's list and dict outputs, with the last block's map among them.
Intermediates = list[torch.Tensor] | tuple | dict


class Denoised:
    """What a denoised ViT overrides of timm's class: the methods through which features leave the model.

    Patch tokens of the last block are denoised after the final norm; prefix tokens and earlier blocks are timm's.
    Off, every output is the backbone's bit for bit.
    """

    def __init_subclass__(cls) -> None:
        backbone = cls.__mro__[cls.__mro__.index(Denoised) + 1]
        cls._backbone_class = backbone
        cls._backbone_features = _renamed(backbone.forward_features, "_backbone_features")
        cls._backbone_head = _renamed(backbone.forward_head, "_backbone_head")

    # ---- the toggle

    def set_denoise(self, enable: bool = True) -> None:
        """Switch the denoiser on or off. Raises RuntimeError where it was pruned away with the last block."""
        if enable and self.denoiser is None:
            raise RuntimeError("This model has no denoiser left: it was pruned away together with the last block.")
        self.denoise = bool(enable)

    @contextmanager
    def denoising(self, enable: bool = True) -> Iterator[None]:
        """Switch the denoiser on or off for a block of code, whatever happens in it."""
        before = self.denoise
        self.set_denoise(enable)
        try:
            yield
        finally:
            self.denoise = before

    # ---- features

    def forward_features(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Tokens (B, prefix + H*W, C) of images (B, 3, h, w), final norm applied, patch tokens denoised."""
        tokens = self._backbone_features(x, attn_mask=attn_mask, is_causal=is_causal)
        if self.denoise:
            grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            tokens = torch.cat([prefix, self._denoise(patches, grid)], dim=1)
        return tokens

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """timm's head. Where timm norms after pooling, denoised tokens are normed already: norm the prefix only."""
        if self.denoise and self.norm_after_pool and self.attn_pool is None and self.global_pool != "token":
            x = torch.cat([self.fc_norm(x[:, : self.num_prefix_tokens]), x[:, self.num_prefix_tokens :]], dim=1)
            x = self.head_drop(self.pool(x))
            return x if pre_logits else self.head(x)
        return self._backbone_head(x, pre_logits=pre_logits)

    def _denoise(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if self.norm_after_pool:
            patches = self.fc_norm(patches)
        return self.denoiser(patches, grid)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **options,
    ) -> Intermediates:
        """timm's method. The last block's map is denoised, and so normed, whatever `norm` says; others are timm's.

        Maps are (B, C, H, W), or (B, H*W, C) with `output_fmt="NLC"`; further options are passed on to timm.
        """
        forward = super().forward_intermediates
        call = dict(indices=indices, return_prefix_tokens=return_prefix_tokens, norm=norm, stop_early=stop_early)
        call.update(options, intermediates_only=intermediates_only)
        last = len(self.blocks) - 1
        taken, deepest = feature_take_indices(len(self.blocks), indices)
        reaches_features = not intermediates_only and not (stop_early and deepest < last)
        ours = self.denoise and (last in taken or reaches_features) and output_fmt in ("NCHW", "NLC")
        if not ours:
            return forward(x, output_fmt=output_fmt, **call)

        # Tokens, not maps, come out of timm here, so that nothing is copied to a map and back.
        output = forward(x, output_fmt="NLC", **call)
        features, maps, prefixes = _unpack(output, intermediates_only)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        if features is None:
            patches = self._denoise(maps[-1] if norm else self.norm(maps[-1]), grid)
        else:
            prefix, patches = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
            patches = self._denoise(patches, grid)
            features = torch.cat([prefix, patches], dim=1)
        if last in taken:
            maps[-1] = patches
        if output_fmt == "NCHW":
            maps = [m.reshape(m.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for m in maps]
        return _repack(output, features, maps, prefixes)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's method. Without the last block the denoiser goes too; with it, the denoiser keeps the final norm."""
        depth = len(self.blocks)
        final_norm = self.fc_norm if self.norm_after_pool else self.norm
        kept = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if len(self.blocks) < depth:
            self.denoise, self.denoiser = False, None
        elif self.denoiser is not None and final_norm is not self.norm and final_norm is not self.fc_norm:
            self.denoiser.norm, self.norm_after_pool = final_norm, False
        return kept

    # ---- timm's habits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        if self.denoiser is not None:
            self.denoiser.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set(super().no_weight_decay()) | {"denoiser.pos_embed"}

    # group_matcher is timm's: what it does not name (the denoiser, the head) is the last layer of a layer decay.

    def __reduce__(self):
        # Also a class made for a subclass of timm's, which no module holds, can be pickled and copied.
        return _empty, (self._backbone_class,), self.__dict__.copy()


def _renamed(function: FunctionType, name: str) -> FunctionType:
    """A copy of a parent's method under a name of its own, because TorchScript knows no super()."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__annotations__ = function.__annotations__
    return copy


class DenoisedVisionTransformer(Denoised, VisionTransformer):
    """A timm VisionTransformer with a denoiser."""


class DenoisedEva(Denoised, Eva):
    """A timm Eva (EVA-02, DINOv3) with a denoiser."""


_CLASSES: dict[type, type] = {VisionTransformer: DenoisedVisionTransformer, Eva: DenoisedEva}


def denoised_class(backbone: type) -> type:
    """The denoised class of a timm class, a subclass of both `Denoised` and it."""
    if backbone not in _CLASSES:
        _CLASSES[backbone] = type(f"Denoised{backbone.__name__}", (Denoised, backbone), {})
    return _CLASSES[backbone]


def add_denoiser(
    model: nn.Module,
    grid_size: int | tuple[int, int] | None = None,
    depth: int = 1,
    num_heads: int | None = None,
    pos_embed: bool = True,
) -> nn.Module:
    """Give a timm VisionTransformer or Eva a denoiser, in place, and return it. The denoiser is new: train or load it.

    Args:
        model: the backbone; its class becomes the denoised one, its weights, device and dtype stay.
        grid_size: rows and columns of the denoiser's position embedding; default the model's own patch grid.
        depth: blocks of the denoiser (paper: 1).
        num_heads: heads of a block; default `C // 64`.
        pos_embed: False for a denoiser without position embedding (paper, Tab. 6 e).

    Raises:
        TypeError: the model is not a timm VisionTransformer or Eva, or has a denoiser already.
        ValueError: the model drops patches in training, or a size does not fit.
    """
    check_supported(model)
    weight = model.patch_embed.proj.weight
    grid = model.patch_embed.grid_size if grid_size is None else grid_size
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    factory = {"device": weight.device, "dtype": weight.dtype}
    return attach_denoiser(model, Denoiser(model.embed_dim, grid, depth, num_heads, pos_embed, **factory))


def check_supported(model: nn.Module) -> None:
    """Raise TypeError or ValueError for a model that cannot have a denoiser."""
    if isinstance(model, Denoised):
        raise TypeError(f"This {type(model).__name__} has a denoiser already.")
    if not isinstance(model, (VisionTransformer, Eva)):
        raise TypeError(
            f"A denoiser can be added to timm's VisionTransformer (ViT, DeiT, CLIP, DINO, DINOv2, SigLIP, ...) and "
            f"Eva (EVA-02, DINOv3, ...), not to {type(model).__name__}."
        )
    if getattr(model.patch_drop, "prob", 0):
        raise ValueError(
            f"patch_drop_rate={model.patch_drop.prob} leaves holes in the patch grid, and the denoiser needs the whole "
            f"grid. Create the model with patch_drop_rate=0."
        )


def attach_denoiser(model: nn.Module, denoiser: Denoiser) -> nn.Module:
    """Make a timm ViT a denoised one with this denoiser, in place, and return it. Raises as `add_denoiser`."""
    check_supported(model)
    weight = model.patch_embed.proj.weight
    cfg = getattr(model, "pretrained_cfg", None) or {}
    model.__class__ = denoised_class(type(model))
    model.denoiser = denoiser.to(device=weight.device, dtype=weight.dtype).train(model.training)
    model.denoise = True
    model.backbone_name = ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))
    # With average pooling timm moves the final norm behind the pool; the denoiser sees normed tokens all the same.
    model.norm_after_pool = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    model.set_grad_checkpointing(model.grad_checkpointing)
    return model


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Leave only the denoiser trainable, and return the model. Raises TypeError for a model without a denoiser."""
    if getattr(model, "denoiser", None) is None:
        raise TypeError(f"{type(model).__name__} has no denoiser; make one with timm_dvt.add_denoiser(model).")
    model.requires_grad_(False)
    model.denoiser.requires_grad_(True)
    return model


def _empty(backbone: type) -> nn.Module:
    cls: Any = denoised_class(backbone)
    return cls.__new__(cls)


def _unpack(output: Intermediates, only: bool) -> tuple[torch.Tensor | None, list, list | None]:
    """Final features, maps and prefix tokens out of any form timm returns them in."""
    if isinstance(output, dict):
        return output.get("image_features"), list(output["image_intermediates"]), None
    features, maps = (None, output) if only else output
    if maps and isinstance(maps[0], tuple):
        return features, [m for m, _ in maps], [p for _, p in maps]
    return features, list(maps), None


def _repack(output: Intermediates, features: torch.Tensor | None, maps: list, prefixes: list | None) -> Intermediates:
    """The form of `output` with these contents."""
    if isinstance(output, dict):
        new = {"image_intermediates": maps} | ({} if features is None else {"image_features": features})
        return {**output, **new}
    if prefixes is not None:
        maps = list(zip(maps, prefixes, strict=True))
    return maps if features is None else (features, maps)
