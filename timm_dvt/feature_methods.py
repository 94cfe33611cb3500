"""The forms that timm's feature methods have beside those of VisionTransformer and Eva, with a denoiser behind them.

Which a class gets is read off its own methods. Those of one image argument can be scripted, as timm's can.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from timm_dvt.errors import UserError
from timm_dvt.layouts import KNOWN

# What forward_intermediates takes, in this order, where a class has prefix tokens from the first block on.
ARGUMENTS = ("x", "indices", "return_prefix_tokens", "norm", "stop_early", "output_fmt", "intermediates_only")


# timm's list and dict outputs, with the last block's map among them.
Intermediates = list[torch.Tensor] | tuple | dict

# A type checker cannot know the class that these methods will be of.
if TYPE_CHECKING:
    _Model: TypeAlias = Any
else:
    _Model = object


def methods_for(backbone: Any) -> dict[str, Callable]:
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
                if self.plain:  # a constant, so that of other models this is not compiled
                    grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
                    prefix, patches = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
                    return torch.cat([prefix, self._denoise(patches, grid, x)], dim=1)
                else:
                    raise RuntimeError("TorchScript knows this model's features only with the denoiser off.")
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


def unpack(output: Intermediates, only: bool) -> tuple[torch.Tensor | None, list, list | None]:
    """Final features, maps and prefix tokens out of any form timm returns them in."""
    if isinstance(output, dict):
        prefixes = output.get("image_intermediates_prefix")
        return output.get("image_features"), list(output["image_intermediates"]), prefixes
    features, maps = (None, output) if only else output
    if maps and isinstance(maps[0], tuple):
        return features, [m for m, _ in maps], [p for _, p in maps]
    return features, list(maps), None


def repack(output: Intermediates, features: torch.Tensor | None, maps: list, prefixes: list | None) -> Intermediates:
    """The form of `output` with these contents."""
    if isinstance(output, dict):
        new = {"image_intermediates": maps, "image_intermediates_prefix": prefixes, "image_features": features}
        kept = (key for key in output if features is not None or key != "image_features")
        return {key: new.get(key, output[key]) for key in kept}
    if prefixes is not None:
        maps = list(zip(maps, prefixes, strict=True))
    return maps if features is None else (features, maps)


def packed_pixels(patches: torch.Tensor, embeds: Any) -> torch.Tensor:
    """Packed patches as NaFlex embeds them, flat or not, as pixels (B, N, channels, p, q)."""
    rows, columns = embeds.patch_size
    channels_last = getattr(embeds, "channels_last", True)  # the only order before timm 1.0.31
    if patches.ndim == 3 and channels_last:
        patches = patches.unflatten(2, (rows, columns, -1))
    elif patches.ndim == 3:
        patches = patches.unflatten(2, (-1, rows, columns))
    return patches.permute(0, 1, 4, 2, 3) if channels_last else patches


def denoise_packed(
    denoiser: Callable[[torch.Tensor, tuple[int, int], torch.Tensor], torch.Tensor],
    patches: torch.Tensor,
    pixels: torch.Tensor,
    coordinates: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Denoise packed patches (NaFlex: images of any aspect ratio in one batch), each image's on a grid of its own.

    Args:
        denoiser: of tokens (B, H*W, C) of a grid (H, W), and the images (B, channels, H*p, W*q) that they are of.
        patches: tokens (B, N, C), in any order.
        pixels: (B, N, channels, p, q), of each.
        coordinates: (B, N, 2), row and column of each.
        valid: (B, N), False for padding, which is handed back as it is; default where no coordinate is negative.

    Raises:
        ValueError: an image's patches do not fill a grid.
    """
    valid = (coordinates >= 0).all(dim=-1) if valid is None else valid.bool()
    places: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for image, (at, there) in enumerate(zip(coordinates, valid)):
        kept = there.nonzero().flatten()
        rows, columns = (int(most) + 1 for most in at[kept].amax(dim=0))
        number = at[kept, 0] * columns + at[kept, 1]
        if len(number.unique()) != rows * columns or len(kept) != rows * columns:
            raise UserError(
                f"{len(kept)} patch tokens do not fill a grid of {rows} x {columns} (image {image} of the batch); "
                "the denoiser needs every patch, once"
            )
        places[rows, columns].append((image, kept[number.argsort()]))
    clean = patches.clone()
    for grid, members in places.items():
        images = torch.tensor([image for image, _ in members], device=patches.device)[:, None]
        order = torch.stack([kept for _, kept in members])
        whole = pixels[images, order].unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        clean[images, order] = denoiser(patches[images, order], grid, whole).to(clean.dtype)
    return clean
