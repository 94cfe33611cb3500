"""The denoised class of any timm class: timm's own model with a denoiser behind the final norm and a flag to switch it.

`Denoised` overrides the methods through which features leave a model; `denoised_class` puts it before a timm class.
What differs from family to family is where the patches lie in the features, which `timm_dvt.layouts` finds out, and
the arguments of these methods, for which `timm_dvt.feature_methods` has a form each.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any, Optional, TypeAlias

import torch
from torch import nn

from timm_dvt.denoiser import Denoiser, LayerDenoisers
from timm_dvt.errors import UserError
from timm_dvt.feature_methods import Intermediates, denoise_packed, methods_for, packed_pixels, repack, unpack
from timm_dvt.timm_private import feature_take_indices

# A type checker cannot know the timm class that stands behind `Denoised`, nor what attributes it has.
if TYPE_CHECKING:
    _Backbone: TypeAlias = Any
else:
    _Backbone = object


class Denoised(_Backbone):
    """What a denoised model overrides of timm's class: the methods through which features leave the model.

    Patch tokens of the last block are denoised after the final norm, those of an earlier block, where it has a
    denoiser, as the block leaves them; prefix tokens and other blocks are timm's. The blocks themselves are always
    fed raw tokens. Off, every output is the backbone's bit for bit.
    """

    if TYPE_CHECKING:
        denoiser: Any  # a Denoiser or LayerDenoisers, None once it is pruned away
        norm_after_pool: bool

    def __init_subclass__(cls) -> None:
        backbone: Any = cls.__mro__[cls.__mro__.index(Denoised) + 1]
        cls._backbone_class = backbone
        cls.__constants__ = [*getattr(backbone, "__constants__", ()), "plain"]  # TorchScript's
        cls._backbone_features = _renamed(backbone.forward_features, "_backbone_features")
        if hasattr(backbone, "forward_head"):
            cls._backbone_head = _renamed(backbone.forward_head, "_backbone_head")
        for name, function in methods_for(backbone).items():
            setattr(cls, name, function)

    # ---- the toggle

    def set_denoise(self, enable: bool = True) -> None:
        """Switch the denoiser on or off. Raises RuntimeError where it was pruned away with the last block.

        Off, a SAM's last map is timm's again, that of its last block: of other channels than the denoised neck's.
        """
        if enable and self.denoiser is None:
            raise RuntimeError("This model has no denoiser left: it was pruned away together with the last block.")
        self.denoise = bool(enable)

    @contextmanager
    def denoising(self, enable: bool = True) -> Iterator[None]:
        """Switch the denoiser on or off for a block of code, whatever happens in it.

        The switch is the model's, the same for all threads. Where several use one model, a lock of theirs has to keep
        other forwards and other such blocks out of this one; or each takes a `copy.deepcopy`.
        """
        before = self.denoise
        self.set_denoise(enable)
        try:
            yield
        finally:
            self.denoise = before

    def denoisers(self) -> dict[int, Denoiser]:
        """The denoisers by the block whose patch tokens they clean, counted from 0; none if all were pruned away."""
        if isinstance(self.denoiser, LayerDenoisers):
            layers: Any = self.denoiser.layers
            return {int(block): denoiser for block, denoiser in layers.items()}
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
            tokens = torch.cat([prefix, self._denoise(patches, grid, x)], dim=1)
        return tokens

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """timm's head. Where timm norms after pooling, denoised tokens are normed already: norm the prefix only."""
        denoised = self.denoise and self.denoises_final
        if denoised and self.norm_after_pool and self.attn_pool is None and self.global_pool != "token":
            x = torch.cat([self.fc_norm(x[:, : self.num_prefix_tokens]), x[:, self.num_prefix_tokens :]], dim=1)
            x = self.head_drop(self.pool(x))
            return x if pre_logits else self.head(x)
        return self._backbone_head(x, pre_logits=pre_logits)

    def _denoise(
        self, patches: torch.Tensor, grid: tuple[int, int], images: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        if self.norm_after_pool:
            patches = self.fc_norm(patches)
        return self.denoiser(patches, grid, images)

    def _cleaned(self, features: Any, given: dict[str, Any]) -> Any:
        """Final features in any of timm's forms with denoised patch tokens; `given` are the method's arguments."""
        if isinstance(features, dict):  # of packed patches
            return {**features, "patches": self._cleaned(features["patches"], given)}
        if isinstance(features, (tuple, list)):
            raise UserError(f"forward_features gave a {type(features).__name__}; for that, switch the denoiser off.")
        x = given["x"]
        packed = x if isinstance(x, dict) else given
        prefix = self.prefix_tokens()
        patches = self.layout.patches(features, prefix)
        if packed.get("patch_coord") is not None:
            pixels = packed_pixels(x["patches"] if packed is x else x, self.embeds)
            clean = denoise_packed(self._denoise, patches, pixels, packed["patch_coord"], packed.get("patch_valid"))
        else:
            clean = self._denoise(patches, self.layout.grid_at(x.shape[2], x.shape[3], patches.shape[1]), x)
        return self.layout.replaced(features, clean, prefix)

    def prefix_tokens(self) -> int:
        """How many tokens stand ahead of the patch tokens in forward_features."""
        return int(getattr(self, "num_prefix_tokens", self.layout.prefix))

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
        call = dict(indices=indices, return_prefix_tokens=return_prefix_tokens, norm=norm, stop_early=stop_early)
        call.update(options, intermediates_only=intermediates_only)
        if not self.plain:
            return self._intermediates(dict(x=x, output_fmt=output_fmt, **call))
        forward = super().forward_intermediates
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
        features: Any
        features, maps, prefixes = unpack(output, intermediates_only)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        patches: Any = None
        if final and features is None:
            patches = self._denoise(maps[-1] if norm and not norm_here else self.norm(maps[-1]), grid, x)
        elif final:
            prefix, patches = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
            patches = self._denoise(patches, grid, x)
            features = torch.cat([prefix, patches], dim=1)
        for place, block in enumerate(blocks):
            if block in inner:
                maps[place] = denoisers[block](maps[place], grid, x)
        if norm_here:
            maps = [self.norm(m) for m in maps]
            prefixes = None if prefixes is None else [self.norm(p) for p in prefixes]
        if final and self.final_block in blocks:
            maps[-1] = patches
        if output_fmt == "NCHW":
            maps = [m.reshape(m.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous() for m in maps]
        return repack(output, features, maps, prefixes)

    def _intermediates(self, given: dict[str, Any]) -> Intermediates:
        """forward_intermediates where the final map is known from the features alone: `given` are its arguments."""
        forward = partial(self._backbone_class.forward_intermediates, self)
        takes = inspect.signature(self._backbone_class.forward_intermediates).parameters
        given = {name: value for name, value in given.items() if name in takes or value}
        wanted = self.final_block in feature_take_indices(self.final_block + 1, given.get("indices"))[0]
        only = given.get("intermediates_only", False)
        stops = given.get("stop_early", takes["stop_early"].default if "stop_early" in takes else False)
        if not (self.denoise and self.denoises_final) or (not wanted and (only or stops)):
            return forward(**given)
        output = forward(**{**given, "intermediates_only": False})
        features, maps, prefixes = unpack(output, only=False)
        features = self._cleaned(features, given)
        if wanted:
            patches = self.layout.patches(features, self.prefix_tokens())
            form = given.get("output_fmt", "NCHW")
            if form != "NLC":
                x = given["x"]
                grid = self.layout.grid_at(x.shape[2], x.shape[3], patches.shape[1])
                patches = patches.reshape(patches.shape[0], *grid, -1)
            maps[-1] = patches.permute(0, 3, 1, 2).contiguous() if form == "NCHW" else patches
        return repack(output, None if only else features, maps, prefixes)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True, **options
    ) -> list[int]:
        """timm's method. A denoiser goes with its block; that of the last block keeps the final norm."""
        if not self.plain:
            return self._prune(indices, prune_norm, prune_head, options)
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

    def _prune(self, indices: int | list[int], prune_norm: bool, prune_head: bool, options: dict) -> list[int]:
        """prune_intermediate_layers of a model whose features are more than a norm of the last block's tokens.

        While the last block is there, all that follows it stays, for it makes what the denoiser sees.
        """
        prune = super().prune_intermediate_layers
        if feature_take_indices(self.final_block + 1, indices)[1] < self.final_block:
            self.denoiser, self.denoise, self.denoises_final = None, False, False
            return prune(indices, prune_norm=prune_norm, prune_head=prune_head, **options)
        kept = prune(indices, prune_norm=prune_norm and not self.denoises_final, prune_head=False, **options)
        if prune_head and hasattr(self, "reset_classifier"):
            self.reset_classifier(0)
        return kept

    # ---- timm's habits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if hasattr(self._backbone_class, "set_grad_checkpointing"):  # timm's classes have it, a person's may not
            super().set_grad_checkpointing(enable)
        for module in self.modules():  # also of a denoiser that an adapter wraps
            if isinstance(module, Denoiser):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        denoiser_names = {name for name, _ in self.named_parameters() if name.startswith("denoiser.")}
        timms = super().no_weight_decay() if hasattr(self._backbone_class, "no_weight_decay") else ()
        return set(timms) | {name for name in denoiser_names if name.endswith(("pos_embed", "pos_embed_out"))}

    # group_matcher is timm's: what it does not name (the denoiser, the head) is the last layer of a layer decay.

    def __reduce__(self):
        # Also a class made for a subclass of timm's, which no module holds, can be pickled and copied.
        # What of a module is its own alone, such as what `model.compile()` left, torch's __getstate__ leaves out.
        return _empty, (self._backbone_class,), self.__getstate__()


def _renamed(function: FunctionType, name: str) -> FunctionType:
    """A copy of a parent's method under a name of its own, because TorchScript knows no super()."""
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    return copy


_CLASSES: dict[type, type] = {}


def denoised_class(backbone: type) -> type:
    """The denoised class of a timm class, a subclass of both `Denoised` and it; always the same one."""
    if backbone not in _CLASSES:
        body = {"__doc__": f"A timm {backbone.__name__} with a denoiser.", "__module__": __name__}
        _CLASSES[backbone] = type(f"Denoised{backbone.__name__}", (Denoised, backbone), body)
    return _CLASSES[backbone]


def _empty(backbone: type) -> nn.Module:
    """A denoised model with nothing in it yet, for pickles and copies."""
    cls: Any = denoised_class(backbone)
    return cls.__new__(cls)
