"""All blocks' patch tokens of a timm model, with a denoiser off and on, from one forward pass."""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn

from timm_dvt.denoised import Denoised
from timm_dvt.errors import InspectionError, UnsupportedModelError
from timm_dvt.feature_methods import unpack
from timm_dvt.layouts import KNOWN, layout_of, meant_size, unwrapping
from timm_dvt.reading import normed

FEATURES = "features"
DENOISED = ", denoised"


class LayerReader:
    """Reads a model and leaves it as it is; it should be in eval mode.

    Attributes:
        size: (height, width) of an input, in pixels. grid: (H, W) of the features. patch: pixels of a patch.
        channels: of an input.
        layers: what is read, block by block: the name, the block, and whether it is denoised.
    """

    def __init__(self, model: nn.Module, blocks: list[int] | None, batch_size: int) -> None:
        """
        Args:
            blocks: which, negative ones from the end; None for all. The features are always read.

        Raises:
            InspectionError: the model gives no patches of one grid, or has no such block.
        """
        self.model: Any = model
        self.layout = self._layout()
        count = self.layout.maps
        wanted = range(count) if blocks is None else blocks
        if any(not -count <= block < count for block in wanted):
            raise InspectionError(f"blocks is {list(wanted)}; this model has those from {-count} to {count - 1}.")
        self.blocks = sorted({block % count for block in wanted})
        self.batch_size = batch_size
        self.final = count - 1
        # Of another class than these, the size that the layout was found out at is known to run.
        self.size = meant_size(model) if isinstance(model, KNOWN) else self.layout.img_size
        self.channels = getattr(model, "in_chans", 3)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        config = resolve_model_data_config(model)
        self.mean, self.std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.denoisers = model.denoisers() if isinstance(model, Denoised) else {}
        self.layers: list[tuple[str, int, bool]] = []
        self.grid = (1, 1)
        maps = self(torch.zeros(1, self.channels, *self.size))
        self.grid = (maps[FEATURES].shape[1], maps[FEATURES].shape[2])
        self.patch = tuple(side // count for side, count in zip(self.size, self.grid))
        for name in maps:
            block = self.final if name.startswith(FEATURES) else int(name.split(",")[0].split()[1])
            self.layers.append((name, block, name.endswith(DENOISED)))

    def _layout(self) -> Any:
        try:
            return getattr(self.model, "layout", None) or layout_of(self.model)
        except UnsupportedModelError as e:
            raise InspectionError(
                f"A {type(self.model).__name__} cannot be inspected: {e.reason}. Position artifacts are those of "
                "Vision Transformers, whose features are the patches of one grid; timm-dvt families lists the classes."
                f"{unwrapping(self.model)}"
            ) from e

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
            InspectionError: features are not finite.
        """
        read = [self._batch(batch.to(self.device, self.dtype)) for batch in inputs.split(self.batch_size)]
        maps = {name: torch.cat([features[name] for features in read]).float() for name in read[0]}
        for name, features in maps.items():
            if not torch.isfinite(features).all():
                raise InspectionError(f"Tokens ({name}) are not finite, in {self.dtype}; inspect in float32.")
        return maps

    def _batch(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        model, given = self.model, {"indices": self.blocks or [self.final], "intermediates_only": False}
        takes = inspect.signature(type(model).forward_intermediates).parameters
        if "output_fmt" in takes:
            given["output_fmt"] = "NCHW"
        with model.denoising(False) if self.denoisers else nullcontext():
            features, maps, _ = unpack(model.forward_intermediates(inputs, **given), only=False)
        layers = {}
        for block, tokens in zip(self.blocks, maps):
            layers[f"block {block}"] = tokens.permute(0, 2, 3, 1)
            if block in self.denoisers and block != self.final:
                layers[f"block {block}{DENOISED}"] = self._denoised(self.denoisers[block], layers[f"block {block}"])
        final: Any = features["patches"] if isinstance(features, dict) else features
        _, patches = normed(model, final, self.layout)
        grid = self.layout.grid_at(inputs.shape[2], inputs.shape[3], patches.shape[1])
        layers[FEATURES] = patches.unflatten(1, grid)
        if self.final in self.denoisers:
            layers[FEATURES + DENOISED] = self._denoised(self.denoisers[self.final], layers[FEATURES])
        return layers

    @staticmethod
    def _denoised(denoiser: Any, maps: torch.Tensor) -> torch.Tensor:
        return denoiser(maps.flatten(1, 2), maps.shape[1:3]).unflatten(1, maps.shape[1:3])
