"""The forms that timm's feature methods have beside those of VisionTransformer and Eva, with a denoiser behind them.

Which a class gets is read off its own methods. Those of one image argument can be scripted, as timm's can.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from timm_dvt.intermediates import Intermediates
from timm_dvt.layouts import KNOWN

# What forward_intermediates takes, in this order, where a class has prefix tokens from the first block on.
ARGUMENTS = ("x", "indices", "return_prefix_tokens", "norm", "stop_early", "output_fmt", "intermediates_only")


# A type checker cannot know the class that these methods will be of.
if TYPE_CHECKING:
    _Model: TypeAlias = Any
else:
    _Model = object


def chosen_for(backbone: Any) -> dict[str, Callable]:
    """The methods by name that the denoised class of this timm class needs, in place of `Denoised`'s own."""
    if issubclass(backbone, KNOWN):
        return {}
    one_image = names(backbone.forward_features) == ("x",)
    form: Any = OfImages if one_image else OfAnything
    chosen: dict[str, Callable] = {"forward_features": form.forward_features}
    if names(backbone.forward_intermediates)[: len(ARGUMENTS)] != ARGUMENTS:
        chosen["forward_intermediates"] = OfAnything.forward_intermediates
    if hasattr(backbone, "forward_head"):
        used = backbone.forward_head.__code__.co_names
        form = OfAnything if "_pool" in used else OfImages
        chosen["forward_head"] = form.forward_head if "fc_norm" in used else backbone.forward_head
    return chosen


def names(method: Callable) -> tuple[str, ...]:
    """The names of a method's arguments but self."""
    return tuple(inspect.signature(method).parameters)[1:]


class OfImages(_Model):
    """Methods of a class whose features come from one image tensor."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """timm's final features of images (B, 3, h, w), in timm's form, patch tokens denoised."""
        features = self._backbone_features(x)
        if self.denoise and self.denoises_final:
            if torch.jit.is_scripting():
                if not self.plain:
                    raise RuntimeError("TorchScript knows this model's features only with the denoiser off.")
                grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
                prefix, patches = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
                return torch.cat([prefix, self._denoise(patches, grid)], dim=1)
            else:
                return self._cleaned(features, {"x": x})
        return features

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """timm's head. Where timm norms after pooling, denoised tokens are normed already: norm the prefix only."""
        if self.denoise and self.denoises_final and self.norm_after_pool and self.global_pool != "token":
            x = torch.cat([self.fc_norm(x[:, : self.num_prefix_tokens]), x[:, self.num_prefix_tokens :]], dim=1)
            if self.global_pool == "avg":
                x = x[:, self.num_prefix_tokens :].mean(dim=1)
            x = self.head_drop(x)
            return x if pre_logits else self.head(x)
        return self._backbone_head(x, pre_logits=pre_logits)


class OfAnything(_Model):
    """Methods of a class that takes more than images: masks, patches with coordinates."""

    def forward_features(self, *args, **options):
        """timm's final features, in timm's form, patch tokens denoised. Raises ValueError where patches are missing."""
        features = self._backbone_features(*args, **options)
        if self.denoise and self.denoises_final:
            takes = names(self._backbone_class.forward_features)
            given = dict(zip(takes, args), **options)
            return self._cleaned(features, {**given, "x": given[takes[0]]})
        return features

    def forward_intermediates(self, *args, **options) -> Intermediates:
        """timm's method. The final map, where it is asked for, is denoised and normed whatever `norm` says."""
        return self._intermediates(dict(zip(names(self._backbone_class.forward_intermediates), args), **options))

    def forward_head(self, patches, pre_logits: bool = False, patch_valid=None) -> torch.Tensor:
        """timm's head. Where timm norms after pooling, denoised tokens are normed already: norm the prefix only."""
        denoised = self.denoise and self.denoises_final
        if denoised and self.norm_after_pool and self.attn_pool is None and self.global_pool != "token":
            prefix, patches = patches[:, : self.num_prefix_tokens], patches[:, self.num_prefix_tokens :]
            x = self._pool(torch.cat([self.fc_norm(prefix), patches], dim=1), patch_valid=patch_valid)
            x = self.head_drop(x)
            return x if pre_logits else self.head(x)
        return self._backbone_head(patches, pre_logits=pre_logits, patch_valid=patch_valid)
