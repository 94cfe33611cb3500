"""Features of images of any size, computed when they are asked for: what augmented images and windows need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from timm_dvt.layouts import Layout
from timm_dvt.reading import final_tokens, fit_to
from training.common.backbone import autocasting, raw_copy
from training.evaluate.features.extractor import Extractor
from training.evaluate.segmentation.windows import patch_padding


class LiveFeatures:
    """A model's features of the last block, in any of its states.

    Attributes:
        patch: pixels.
        channels: C.
        prefix: whether there is a class token.
        device: where the model is.
    """

    def __init__(self, extractor: Extractor) -> None:
        reader = extractor.reader
        self._extractor = extractor
        self.patch, self.channels, self.device = reader.patch, reader.channels, reader.device
        self.prefix = reader.layout.prefix > 0
        self._twins: dict[tuple[tuple[int, int], bool], tuple[Any, Layout]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, state: str, final_norm: bool = True) -> tuple[Tensor, Tensor]:
        """Patch tokens and class tokens, float32.

        Args:
            images: (B, 3, h, w), normalized; padded with zeros to multiples of the patch size, half on either side.
            state: "raw" or "denoised".
            final_norm: False leaves raw patch tokens as the last block gives them. Denoisers always see normed ones.

        Returns:
            (B, ceil(h / patch), ceil(w / patch), C); (B, C), or (B, 0) of a model without a class token.

        Raises:
            ValueError: the model takes no images of that size.
        """
        height, width = images.shape[-2:]
        images = pad(images.to(self.device, torch.float32), patch_padding((height, width), self.patch))
        twin, layout = self._twin((images.shape[-2], images.shape[-1]), final_norm or state == "denoised")
        weight = next(twin.parameters())
        images = images.to(weight.dtype)
        with autocasting(weight, self._extractor.reader.dtype):
            prefix, tokens, grid = final_tokens(twin, images, layout)
        if state == "denoised":
            assert self._extractor.denoiser is not None
            tokens = self._extractor.denoiser(tokens.to(weight.dtype), grid, images)
        classes = prefix[:, 0] if self.prefix else prefix.flatten(1)
        return tokens.float().unflatten(1, grid), classes.float()

    def _twin(self, size: tuple[int, int], final_norm: bool) -> tuple[Any, Layout]:
        """The model for images of one size, and its layout there: a copy that shares the weights."""
        if (size, final_norm) not in self._twins:
            twin = raw_copy(self._extractor.model)
            layout = fit_to(twin, size)
            if not final_norm:
                twin.norm = twin.fc_norm = nn.Identity()  # timm moves the norm from the one to the other for pooling
            self._twins[size, final_norm] = twin, layout
        return self._twins[size, final_norm]
