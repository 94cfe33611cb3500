"""Raw patch features of any timm model that can have a denoiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_dvt.errors import UserError
from timm_dvt.layouts import check_rgb, layout_of
from timm_dvt.reading import final_tokens, fit_to
from training.common.views import patch_centers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def autocasting(weight: Tensor, dtype: torch.dtype) -> AbstractContextManager:
    """Where a model of such a weight computes in `dtype`: autocast, if it is of float32 and to be faster."""
    faster = dtype != torch.float32 and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, dtype) if faster else nullcontext()


class FeatureReader:
    """Reads patch features from a timm model that can have a denoiser, and leaves the model itself as it was.

    The reader works on a copy of the module tree that shares the model's weights, in eval mode; only the
    position embedding is its own, resampled once to the reader's grid (as timm resamples: bicubic,
    antialiased). Features are raw: the denoiser of a `*_dvt` model is switched off in the copy.

    Attributes:
        layers: the blocks that are read, as non-negative indices in ascending order.
        depth: number of blocks of the model.
        input_size, patch, stride: pixels.
        grid: K, patches along one side: (input_size - patch) // stride + 1 (paper A.1).
        centers: (K,) patch centers as fractions of the input's side.
        channels: C.
        device: where images go.
        mean, std: (1, 3, 1, 1) by which images are normalized, the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        *,
        input_size: int | None = None,
        stride: int | None = None,
        dtype: str = "float32",
    ) -> None:
        """
        Args:
            model: a timm model that can have a denoiser. Any input size and stride, and any of its blocks, can be
                had of a VisionTransformer or Eva with a plain convolutional patch embedding; of another one the
                last map, at its own stride, and at the sizes that it takes, its own by default.
            layers: blocks to read; negative ones count from the end; None is the last block alone. The last
                block's features have the final norm applied (also where timm moved it behind the pooling);
                those of earlier blocks are as the block leaves them.
            input_size: side of the square input; None is the multiple of the patch size nearest to 518 with
                at most 37 patches a side (the paper's: 518 for patch 14, 512 for patch 16).
            stride: step between patches; None is the patch size; smaller gives denser grids.
            dtype: "float32", or "bfloat16" for autocast; features come back as float32 either way.

        Raises:
            TypeError: the model is of another kind.
            ValueError: a layer, size, stride or dtype that cannot be, or other channels than RGB.
        """
        whole: Any = model
        check_rgb(model)
        self.layout: Any = cast(Any, getattr(model, "layout", None) or layout_of(model))  # its sizes are known
        resizable = isinstance(model, (VisionTransformer, Eva)) and isinstance(model.patch_embed, PatchEmbed)
        if dtype not in DTYPES:
            raise UserError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
        if resizable:
            patch_height, patch_width = whole.patch_embed.patch_size
        else:
            made_for, grid = (tuple(pair) for pair in (self.layout.img_size, self.layout.grid))
            patch_height, patch_width = (pixels // patches for pixels, patches in zip(made_for, grid))
        if patch_height != patch_width:
            raise UserError(f"model must have square patches, got {patch_height} x {patch_width}")
        self.patch = int(patch_height)
        self.depth = self.layout.maps
        self.layers = _resolve_layers(layers, self.depth)
        default_size = default_input_size(self.patch) if resizable else made_for[0]
        self.input_size = default_size if input_size is None else input_size
        self.stride = self.patch if stride is None else stride
        if not 1 <= self.stride <= self.patch:
            raise UserError(f"stride must be from 1 to the patch size {self.patch}, got {self.stride}")
        if self.input_size < self.patch or self.input_size % self.patch:
            raise UserError(
                f"input_size must be a multiple of the patch size {self.patch}, got {self.input_size}; "
                f"nearest: {max(1, round(self.input_size / self.patch)) * self.patch}"
            )
        self.centers = patch_centers(self.input_size, self.patch, self.stride)
        self.grid = len(self.centers)
        self.channels = self.layout.channels
        self.dtype = DTYPES[dtype]
        self._model = _copy_for_grid(model, self.grid, self.stride) if resizable else raw_copy(model)
        self._whole = not resizable  # the final features alone are known, at the model's own stride
        if self._whole:
            self._check_whole(type(model).__name__)
        config = resolve_model_data_config(model)
        weight = next(model.parameters())
        self.device = weight.device
        self.mean = torch.tensor(config["mean"], device=weight.device, dtype=torch.float32).view(1, -1, 1, 1)
        self.std = torch.tensor(config["std"], device=weight.device, dtype=torch.float32).view(1, -1, 1, 1)

    @torch.no_grad()
    def patch_features(self, images: Tensor) -> dict[int, Tensor]:
        """Patch tokens of a batch, with gradients off.

        Args:
            images: (B, 3, input_size, input_size) in [0, 1], not normalized; moved to the model's device.

        Returns:
            {layer: (B, K, K, C) float32}, in row, column order, one entry for each of `layers`.
        """
        return self.tokens(images)[1]

    def normalized(self, images: Tensor) -> Tensor:
        """Images (B, 3, h, w) in [0, 1] as the model takes them: on its device, of its dtype."""
        dtype = next(self._model.parameters()).dtype
        return ((images.to(self.device, torch.float32) - self.mean) / self.std).to(dtype)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Prefix tokens (class and registers) of the last block read, and patch tokens as `patch_features`.

        Returns:
            (B, prefix, C) float32, final norm applied if the last block is read; {layer: (B, K, K, C)}.
        """
        if images.ndim != 4 or images.shape[-2:] != (self.input_size, self.input_size):
            raise UserError(f"images must be (B, 3, {self.input_size}, {self.input_size}), got {tuple(images.shape)}")
        weight = next(self._model.parameters())
        images = self.normalized(images)
        with autocasting(weight, self.dtype):
            if self._whole:
                prefix, patches, grid = final_tokens(self._model, images, self.layout)
                return prefix.float(), {self.depth - 1: patches.float().unflatten(1, grid)}
            tokens = self._model.forward_intermediates(
                images,
                indices=list(self.layers),
                return_prefix_tokens=True,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            # Without prefix tokens timm hands back the patches alone.
            pairs = [pair if isinstance(pair, tuple) else (pair, pair[:, :0]) for pair in tokens]
            features, prefix = {layer: pair[0] for layer, pair in zip(self.layers, pairs)}, pairs[-1][1]
            if self.depth - 1 in features:
                norm = self._final_norm()
                features[self.depth - 1], prefix = norm(features[self.depth - 1]), norm(prefix)
        maps = {layer: x.float().unflatten(1, (self.grid, self.grid)) for layer, x in features.items()}
        return prefix.float(), maps

    def _check_whole(self, name: str) -> None:
        if self.layers != (self.depth - 1,):
            raise UserError(f"layers must be the last one alone for a {name}, got {self.layers}")
        if self.stride != self.patch:
            raise UserError(f"stride must be the patch size, {self.patch}, for a {name}, got {self.stride}")
        self.layout = fit_to(self._model, self.input_size)

    def _final_norm(self) -> nn.Module:
        # In average-pooled classifiers timm moves the final norm behind the pooling and calls it fc_norm.
        if isinstance(self._model.norm, nn.Identity):
            return self._model.fc_norm
        return self._model.norm


def default_input_size(patch: int) -> int:
    """The multiple of the patch size nearest to 518 with at most 37 patches a side (paper A.1: 518, 512)."""
    return max(1, min(37, round(518 / patch))) * patch


def _resolve_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    wanted = (depth - 1,) if layers is None else tuple(layers)
    if not wanted or any(not -depth <= layer < depth for layer in wanted):
        raise UserError(f"layers must be block indices from {-depth} to {depth - 1}, got {wanted}")
    return tuple(sorted({layer % depth for layer in wanted}))


def raw_copy(model: nn.Module) -> Any:
    """The model with its denoiser off, in eval mode: a copy of the module tree that shares the weights."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin: Any = copy.deepcopy(model, shared).eval()
    if hasattr(twin, "set_denoise"):
        twin.set_denoise(False)
    return twin


def _copy_for_grid(model: nn.Module, grid: int, stride: int) -> Any:
    """A copy in eval mode that shares the weights and takes inputs of grid x grid patches, `stride` apart."""
    twin = raw_copy(model)
    embed = twin.patch_embed
    if twin.pos_embed is not None:
        resampled = resample_abs_pos_embed(
            twin.pos_embed.detach(),
            new_size=[grid, grid],
            old_size=list(embed.grid_size),
            num_prefix_tokens=0 if twin.no_embed_class else twin.num_prefix_tokens,
        )
        twin.pos_embed = nn.Parameter(resampled, requires_grad=False)
    rope = getattr(twin, "rope", None)
    if rope is not None and getattr(rope, "feat_shape", None) is not None:
        rope.update_feat_shape([grid, grid])
    embed.proj.stride = (stride, stride)
    embed.strict_img_size = False
    embed.grid_size, embed.num_patches = (grid, grid), grid * grid
    return twin
