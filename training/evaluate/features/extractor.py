"""A model's frozen patch tokens, raw and denoised, of a batch of images."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from timm_dvt.attach import Denoised
from timm_dvt.layouts import meant_size
from timm_dvt.loading import weights_digest
from timm_dvt.version import __version__
from training.common.backbone import FeatureReader


class Extractor:
    """A model's patch tokens in all its states.

    Attributes:
        states: "raw" and, for a model with a denoiser, "denoised".
        levels: whether the denoiser looks at images too, to level flat patches.
        reader: of the raw features of the last block.
        resized: whether images are of another size than the model is meant for.
        model: the model itself.
    """

    def __init__(self, model: nn.Module, input_size: int | None = None, dtype: str = "float32") -> None:
        """
        Args:
            model: a timm model that can have a denoiser, with one or without, on its device.
            input_size: side of the square that images are resized to; None is the model's own default.
            dtype: of the forward pass: "float32" or "bfloat16".

        Raises:
            TypeError, ValueError: as FeatureReader.
        """
        self.model: Any = model.eval().requires_grad_(False)
        embed = getattr(self.model, "patch_embed", None)
        meant = meant_size(model)[0] if getattr(embed, "img_size", None) else None
        self.reader = FeatureReader(model, input_size=input_size or meant, dtype=dtype)
        self.resized = input_size not in (None, meant)
        self.dtype = dtype
        self.denoiser = _last_denoiser(self.model)
        self.levels = getattr(self.denoiser, "flat_below", None) is not None
        self.states = ("raw",) if self.denoiser is None else ("raw", "denoised")

    def resize(self, image: Tensor) -> Tensor:
        """(3, h, w) to (3, S, S), antialiased."""
        size = self.reader.input_size
        if image.shape[-2:] == (size, size):
            return image
        return interpolate(image[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)

    @torch.no_grad()
    def backbone(self, images: Tensor) -> dict[str, Tensor]:
        """Of images (B, 3, S, S) in [0, 1]: {"raw": (B, K, K, C), "prefix": (B, prefix, C)}, float32."""
        prefix, maps = self.reader.tokens(images)
        (raw,) = maps.values()
        return {"raw": raw, "prefix": prefix}

    @torch.no_grad()
    def denoise(self, raw: Tensor, images: Tensor | None) -> Tensor:
        """Raw to denoised maps, (B, K, K, C) float32, on the model's device.

        Args:
            images: (B, 3, S, S) in [0, 1]; None only for a denoiser that does not look at them (`levels`).
        """
        assert self.denoiser is not None
        weight = next(self.denoiser.parameters())
        grid = (self.reader.grid, self.reader.grid)
        inputs = None if images is None else self.reader.normalized(images)
        tokens = raw.flatten(1, 2).to(weight.device, weight.dtype)
        return self.denoiser(tokens, grid, inputs).float().unflatten(1, grid)

    def describe(self) -> dict[str, Any]:
        """All of the backbone that decides features."""
        return {
            "weights": digest_once(self.model, "backbone"),
            "class": type(self.model).__name__.removeprefix("Denoised"),
            "grid": self.reader.grid,
            "input_size": self.reader.input_size,
            "normalize": [self.reader.mean.flatten().tolist(), self.reader.std.flatten().tolist()],
            "dtype": self.dtype,
            "version": __version__,
        }


def _last_denoiser(model: Any) -> nn.Module | None:
    """The denoiser of the last block's features; a model may have others, of earlier blocks."""
    return model.denoisers().get(model.final_block) if issubclass(type(model), Denoised) else None


@lru_cache(maxsize=8)
def digest_once(model: Any, part: str) -> str:
    """The digest of a model's denoiser, or of all the rest of it."""
    if part == "denoiser":
        return weights_digest(model.denoiser)
    return weights_digest(model, without="denoiser.")
