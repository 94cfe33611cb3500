"""The denoised model classes: timm's own ViTs with a denoiser behind the final norm and a flag to switch it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Optional

import torch
from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_dvt.denoiser import Denoiser, LayerDenoisers, combine
from timm_dvt.intermediates import Intermediates, repack, unpack


class Denoised:
    """What a denoised ViT overrides of timm's class: the methods through which features leave the model.

    Patch tokens of the last block are denoised after the final norm, those of an earlier block, where it has a
    denoiser, as the block leaves them; prefix tokens and other blocks are timm's. The blocks themselves are always
    fed raw tokens. Off, every output is the backbone's bit for bit.
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

    def denoisers(self) -> dict[int, Denoiser]:
        """The denoisers by the block whose patch tokens they clean, counted from 0; none if all were pruned away."""
        if isinstance(self.denoiser, LayerDenoisers):
            return {int(block): denoiser for block, denoiser in self.denoiser.layers.items()}
        return {} if self.denoiser is None else {self.final_block: self.denoiser}

    # ---- features

    def forward_features(
        self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Tokens (B, prefix + H*W, C) of images (B, 3, h, w), final norm applied, patch tokens denoised."""
        tokens = self._backbone_features(x, attn_mask=attn_mask, is_causal=is_causal)
        if self.denoise and self.denoises_final:
            grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
            tokens = torch.cat([prefix, self._denoise(patches, grid)], dim=1)
        return tokens

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """timm's head. Where timm norms after pooling, denoised tokens are normed already: norm the prefix only."""
        denoised = self.denoise and self.denoises_final
        if denoised and self.norm_after_pool and self.attn_pool is None and self.global_pool != "token":
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
        """timm's method. Maps of blocks that have a denoiser are denoised, other blocks' and prefix tokens are timm's.

        The last block's map, where denoised, is normed whatever `norm` says; an earlier block's is denoised first and
        then normed if `norm` says so. Maps are (B, C, H, W), or (B, H*W, C) with `output_fmt="NLC"`; further options
        are passed on to timm.
        """
        forward = super().forward_intermediates
        call = dict(indices=indices, return_prefix_tokens=return_prefix_tokens, norm=norm, stop_early=stop_early)
        call.update(options, intermediates_only=intermediates_only)
        denoisers = self.denoisers() if self.denoise else {}
        taken, deepest = feature_take_indices(len(self.blocks), indices)
        blocks = sorted(set(taken))  # timm gives maps in the order of the blocks
        inner = [block for block in blocks if block in denoisers and block != self.final_block]
        reaches_features = not intermediates_only and not (stop_early and deepest < len(self.blocks) - 1)
        final = self.denoises_final and (self.final_block in blocks or reaches_features)
        if not (denoisers and (final or inner) and output_fmt in ("NCHW", "NLC")):
            return forward(x, output_fmt=output_fmt, **call)

        # Tokens, not maps, come out of timm here, so that nothing is copied to a map and back. Those of an inner block
        # come without the norm, which is ours to apply behind its denoiser.
        norm_here = norm and bool(inner)
        output = forward(x, output_fmt="NLC", **{**call, "norm": norm and not norm_here})
        features, maps, prefixes = unpack(output, intermediates_only)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        patches = None
        if final and features is None:
            patches = self._denoise(maps[-1] if norm and not norm_here else self.norm(maps[-1]), grid)
        elif final:
            prefix, patches = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
            patches = self._denoise(patches, grid)
            features = torch.cat([prefix, patches], dim=1)
        for place, block in enumerate(blocks):
            if block in inner:
                maps[place] = denoisers[block](maps[place], grid)
        if norm_here:
            maps = [self.norm(m) for m in maps]
            prefixes = None if prefixes is None else [self.norm(p) for p in prefixes]
        if final and self.final_block in blocks:
            maps[-1] = patches
        if output_fmt == "NCHW":
            maps = [m.reshape(m.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for m in maps]
        return repack(output, features, maps, prefixes)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's method. A denoiser goes with its block; that of the last block keeps the final norm."""
        depth = len(self.blocks)
        final_norm = self.fc_norm if self.norm_after_pool else self.norm
        kept = super().prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if len(self.blocks) < depth:
            left = {block: denoiser for block, denoiser in self.denoisers().items() if block < len(self.blocks)}
            self.denoiser = LayerDenoisers(left, self.final_block) if left else None
            self.denoise, self.denoises_final = self.denoise and bool(left), False
        elif self.denoises_final and final_norm is not self.norm and final_norm is not self.fc_norm:
            self.denoisers()[self.final_block].norm, self.norm_after_pool = final_norm, False
        return kept

    # ---- timm's habits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        for denoiser in self.denoisers().values():
            denoiser.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        own = {name for name, _ in self.named_parameters() if name.startswith("denoiser.")}
        return set(super().no_weight_decay()) | {name for name in own if name.endswith("pos_embed")}

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
    arch: str = "block",
    layers: Sequence[int] | None = None,
    keep_length: bool = False,
) -> nn.Module:
    """Give a timm VisionTransformer or Eva a denoiser, in place, and return it. The denoiser is new: train or load it.

    Args:
        model: the backbone; its class becomes the denoised one, its weights, device and dtype stay.
        grid_size: rows and columns of the denoiser's position embedding; default the model's own patch grid.
        depth: blocks of the denoiser (paper: 1).
        num_heads: heads of a block; default `C // 64`.
        pos_embed: False for a denoiser without position embedding (paper, Tab. 6 e).
        arch: "block", or one of the paper's ablations and baselines: see `timm_dvt.denoiser.Denoiser`.
        layers: blocks that get a denoiser each, counted from 0, or from the end with a minus; default the last block.
            Their denoised maps come out of forward_intermediates, get_intermediate_layers and features_only.
        keep_length: give clean tokens the length of the raw ones, see `timm_dvt.denoiser.Denoiser`.

    Raises:
        TypeError: the model is not a timm VisionTransformer or Eva, or has a denoiser already.
        ValueError: the model drops patches in training, a block does not exist, or a size does not fit.
    """
    check_supported(model)
    count = len(model.blocks)
    wanted = [-1] if layers is None else list(layers)
    if not wanted or any(not -count <= block < count for block in wanted):
        raise ValueError(f"layers must be one or more blocks from {-count} to {count - 1}, got {layers}")
    weight = model.patch_embed.proj.weight
    grid = model.patch_embed.grid_size if grid_size is None else grid_size
    grid = (grid, grid) if isinstance(grid, int) else tuple(grid)
    factory = {"device": weight.device, "dtype": weight.dtype}
    new = {
        block: Denoiser(model.embed_dim, grid, depth, num_heads, pos_embed, arch, keep_length, **factory)
        for block in sorted({block % count for block in wanted})
    }
    return attach_denoiser(model, combine(new, final=count - 1))


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


def attach_denoiser(model: nn.Module, denoiser: Denoiser | LayerDenoisers) -> nn.Module:
    """Make a timm ViT a denoised one with this denoiser, in place, and return it. Raises as `add_denoiser`."""
    check_supported(model)
    weight = model.patch_embed.proj.weight
    model.__class__ = denoised_class(type(model))
    model.denoiser = denoiser.to(device=weight.device, dtype=weight.dtype).train(model.training)
    model.denoise = True
    model.final_block = len(model.blocks) - 1
    model.denoises_final = model.final_block in model.denoisers()
    model.backbone_name = timm_name(model)
    # With average pooling timm moves the final norm behind the pool; the denoiser sees normed tokens all the same.
    model.norm_after_pool = isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)
    model.set_grad_checkpointing(model.grad_checkpointing)
    return model


def remove_denoiser(model: nn.Module) -> nn.Module:
    """Make a denoised model the plain timm model it was, in place, and return it."""
    model.__class__ = model._backbone_class
    for name in ("denoiser", "denoise", "final_block", "denoises_final", "backbone_name", "norm_after_pool"):
        delattr(model, name)
    if hasattr(model, "_model_args"):  # what a config.json would say
        ours = ("backbone", "denoiser")
        model._model_args = {key: value for key, value in model._model_args.items() if key not in ours}
    return model


def timm_name(model: nn.Module) -> str:
    """A timm model's name, ARCH.TAG or ARCH; empty for a model that timm.create_model did not make."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag"))))


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
