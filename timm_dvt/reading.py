"""Patch tokens of any model that can have a denoiser, whatever its family: what denoisers are given and give."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from timm_dvt.attach import Denoised, norms_after_pool
from timm_dvt.errors import FeaturesError, UserError
from timm_dvt.feature_methods import unpack
from timm_dvt.layouts import Layout, layout_of

FEATURES = "features"
DENOISED = ", denoised"


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
    norm = norm_behind_pool(model)
    return (prefix, patches) if norm is None else (norm(prefix), norm(patches))


def norm_behind_pool(model: Any) -> nn.Module | None:
    """The final norm of a model that averages: timm has it behind the pool, and feature methods do not norm then."""
    return model.fc_norm if norms_after_pool(model) or getattr(model, "norm_after_pool", False) else None


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


class LayerReader:
    """Maps of a model's blocks and of its features, denoised ones too, from one forward pass; the model stays as it is.

    Attributes:
        size: (height, width) of an input, in pixels. grid: (H, W) of the features. patch: pixels of a patch.
        channels: of an input.
        layers: what is read, block by block: the name, the block, and whether it is denoised.
        views: how many were read.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        blocks: list[int],
        batch_size: int,
        size: tuple[int, int],
        denoised: bool = True,
    ) -> None:
        """
        Args:
            model: in eval mode. layout: of `timm_dvt.layouts.layout_of`.
            blocks: from 0, rising. The features are always read.
            denoised: also what the denoisers of a model make of these.

        Raises:
            FeaturesError: features are not finite.
        """
        self.model: Any = model
        self.layout, self.blocks, self.batch_size, self.size = layout, blocks, batch_size, size
        self.final = layout.maps - 1
        self.channels = getattr(model, "in_chans", 3)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        config = resolve_model_data_config(model)
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.denoisers = model.denoisers() if denoised and isinstance(model, Denoised) else {}
        self.layers: list[tuple[str, int, bool]] = []
        self.views = 0
        maps = self(torch.zeros(1, self.channels, *self.size))
        self.views = 0  # the one of zeros was to learn the grid
        self.grid = (maps[FEATURES].shape[1], maps[FEATURES].shape[2])
        self.patch = tuple(side // count for side, count in zip(self.size, self.grid))
        for name in maps:
            block = self.final if name.startswith(FEATURES) else int(name.split(",")[0].split()[1])
            self.layers.append((name, block, name.endswith(DENOISED)))

    def name_of(self, block: int, denoised: bool = False) -> str:
        """What the map is called that the denoiser of a block is given, or gives."""
        return (FEATURES if block == self.final else f"block {block}") + DENOISED * denoised

    def normalized(self, image: torch.Tensor) -> torch.Tensor:
        """An image (channels, h, w) in [0, 1] as the model takes it; of channels other than RGB no mean is known."""
        return (image - self.mean) / self.std if self.channels == 3 else (image - 0.5) * 4

    def pixels(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (V, channels, h, w) as they were before they were normalized, in [0, 1]."""
        return (inputs * self.std + self.mean if self.channels == 3 else inputs / 4 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs (V, channels, *size), normalized, to maps (V, H, W, C) by the layers' names, float32.

        Raises:
            FeaturesError: they are not finite.
        """
        read = [self._batch(batch.to(self.device, self.dtype)) for batch in inputs.split(self.batch_size)]
        self.views += len(inputs)
        maps = {name: torch.cat([features[name] for features in read]).float() for name in read[0]}
        for name, features in maps.items():
            if not torch.isfinite(features).all():
                raise FeaturesError(
                    f"Tokens ({name}) are not finite, in {self.dtype}; use the model in float32, and convert it then."
                )
        return maps

    def _batch(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        model, given = self.model, {"indices": self.blocks or [self.final], "intermediates_only": False}
        takes = inspect.signature(type(model).forward_intermediates).parameters
        if "output_fmt" in takes:
            given["output_fmt"] = "NCHW"
        with model.denoising(False) if isinstance(model, Denoised) else nullcontext():
            features, maps, _ = unpack(model.forward_intermediates(inputs, **given), only=False)
        layers = {}
        for block, tokens in zip(self.blocks, maps):
            layers[f"block {block}"] = tokens.permute(0, 2, 3, 1)
            if block in self.denoisers and block != self.final:
                raw = layers[f"block {block}"]
                layers[f"block {block}{DENOISED}"] = self._denoised(self.denoisers[block], raw, inputs)
        final: Any = features["patches"] if isinstance(features, dict) else features
        _, patches = normed(model, final, self.layout)
        grid = self.layout.grid_at(inputs.shape[2], inputs.shape[3], patches.shape[1])
        layers[FEATURES] = patches.unflatten(1, grid)
        if self.final in self.denoisers:
            layers[FEATURES + DENOISED] = self._denoised(self.denoisers[self.final], layers[FEATURES], inputs)
        return layers

    @staticmethod
    def _denoised(denoiser: Any, maps: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return denoiser(maps.flatten(1, 2), maps.shape[1:3], inputs).unflatten(1, maps.shape[1:3])
