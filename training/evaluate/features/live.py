"""Features of images of any size, computed when they are asked for: what augmented images and windows need."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from training.common.backbone import autocasting
from training.evaluate.features.cached import Extractor
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
        self.prefix = extractor.model.num_prefix_tokens > 0
        self._twins: dict[tuple[int, int], Any] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, state: str, final_norm: bool = True) -> tuple[Tensor, Tensor]:
        """Patch tokens and class tokens, float32.

        Args:
            images: (B, 3, h, w), normalized; padded with zeros to multiples of the patch size, half on either side.
            state: "raw" or "denoised".
            final_norm: False leaves raw patch tokens as the last block gives them. Denoisers always see normed ones.

        Returns:
            (B, ceil(h / patch), ceil(w / patch), C); (B, C), or (B, 0) of a model without a class token.
        """
        height, width = images.shape[-2:]
        images = pad(images.to(self.device, torch.float32), patch_padding((height, width), self.patch))
        twin = self._twin((images.shape[-2], images.shape[-1]))
        grid = (images.shape[-2] // self.patch, images.shape[-1] // self.patch)
        weight = next(twin.parameters())
        dtype = self._extractor.reader.dtype
        with autocasting(weight, dtype):
            (output,) = twin.forward_intermediates(
                images.to(weight.dtype),
                indices=[len(twin.blocks) - 1],
                return_prefix_tokens=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            # Without prefix tokens timm hands back the patches alone.
            tokens, prefix = output if isinstance(output, tuple) else (output, output[:, :0])
            norm = twin.fc_norm if isinstance(twin.norm, nn.Identity) else twin.norm  # timm moves it there for pooling
            normed, prefix = norm(tokens), norm(prefix)
        if state == "denoised":
            assert self._extractor.denoiser is not None
            tokens = self._extractor.denoiser(normed.to(weight.dtype), grid)
        elif final_norm:
            tokens = normed
        classes = prefix[:, 0] if self.prefix else prefix.flatten(1)
        return tokens.float().unflatten(1, grid), classes.float()

    def _twin(self, size: tuple[int, int]) -> Any:
        """The model for images of one size: it shares the weights; the position embedding, resampled, is its own."""
        if size not in self._twins:
            model = self._extractor.model
            twin: Any = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
            if hasattr(twin, "set_denoise"):
                twin.set_denoise(False)
            twin.set_input_size(img_size=size)
            self._twins[size] = twin
        return self._twins[size]
