"""From images to feature maps: what is read of a model, at which size, and the passes themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms import str_to_pil_interp
from timm.models.hiera import Hiera

from timm_dvt.attach import Denoised
from timm_dvt.errors import ImageError, UserError
from timm_dvt.extraction.settings import ExtractSettings
from timm_dvt.layouts import check_rgb, layout_or_refusal, meant_size
from timm_dvt.loading import load_any_size, pick_device, weights_digest
from timm_dvt.reading import fit_to, norm_behind_pool, normed

TOKEN = "class_token"
LONGEST = 8  # times the shorter side
RAW = "_raw"  # ends the name of what is taken with the denoiser off, beside what is taken with it on


class Extractor:
    """Reads feature maps from a model.

    Attributes:
        shapes: (H, W, C) of each variable that holds maps, at the most, and (C,) of class tokens.
        states: "on" and "off": in which the denoiser is.
        blocks: that are read, counted from 0.
        size: height and width of the square images, or of the largest with `keep_aspect`.
        facts: what of the model decides the maps, as JSON can hold it.
    """

    def __init__(self, settings: ExtractSettings) -> None:
        """Raises UserError: no such model, or it has not what is asked for."""
        self.settings = settings
        self.device = pick_device(settings.device)
        self.model: Any = load_any_size(settings.model, settings.pretrained).to(self.device).eval()
        self._layout = layout_or_refusal(self.model, "gives no features to extract")
        check_rgb(self.model)
        self.states = self._states()
        self.patch, self.size = self._sizes()
        config = resolve_model_data_config(self.model)
        self.config = {**config, "input_size": (3, *self.size)}
        self.mean, self.std = (torch.tensor(config[key], device=self.device).view(-1, 1, 1) for key in ("mean", "std"))
        self._square = create_transform(**self.config, is_training=False, normalize=False)
        self._method = str_to_pil_interp(config["interpolation"])
        self.blocks = self._blocks()
        self._norm: Any = norm_behind_pool(self.model)
        self._once = (
            len(self.states) > 1
            and self.model.plain
            and list(self.model.denoisers()) == [self.model.final_block] == list(self.blocks)
            and not (self._norm is not None or settings.autocast)
        )
        if self._once:
            self.model.set_denoise(False)
        self._run = torch.compile(self._forward, dynamic=False) if settings.compile else self._forward
        self.shapes = {key: value.shape[1:] for key, value in self(torch.zeros(1, 3, *self.size).byte()).items()}
        self.facts = {
            "model": settings.model,
            "pretrained": settings.pretrained,
            "weights": weights_digest(self.model),
            "blocks": list(self.blocks),
            "size": list(self.size),
            "keep_aspect": settings.keep_aspect,
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop": None if settings.keep_aspect else [config["crop_mode"], config["crop_pct"]],
            "denoised": [state == "on" for state in self.states],
            "autocast": settings.autocast,
        }

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An RGB image as (3, h, w) uint8: as timm's own transform for evaluation, or of its own shape.

        Raises ImageError for an image so narrow that of its own shape it would lose a patch or more of its length.
        """
        if not self.settings.keep_aspect:
            width, height = image.size
            most = LONGEST * min(image.size)
            if max(image.size) > most and self.config["crop_mode"] == "center":  # timm would enlarge what it cuts off
                image = ImageOps.fit(image, (min(width, most), min(height, most)))
            return self._square(image)
        longer = max(image.size)
        sides = [
            side / longer * limit / patch for side, limit, patch in zip(image.size, self.size[::-1], self.patch[::-1])
        ]
        aspect = max(sides) / min(sides)
        if min(sides) < 1 and aspect - max(sides) >= 1:  # a patch high, it is that much longer than the grid
            needed = int(aspect) * max(self.patch)
            raise ImageError(
                f"{image.width} x {image.height} pixels are too narrow for --keep-aspect at --size {max(self.size)}: "
                f"they take --size {needed} or more; or leave out --keep-aspect"
            )
        width, height = (max(1, round(side)) * patch for side, patch in zip(sides, self.patch[::-1]))
        fitted = ImageOps.fit(image, (width, height), self._method)
        return torch.from_numpy(np.array(fitted).transpose(2, 0, 1).copy())

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Variables of a batch (B, 3, h, w) uint8: maps (B, H, W, C), class tokens (B, C), float32, on the device."""
        images = images.to(self.device, non_blocking=True)
        variables: dict[str, torch.Tensor] = {}
        if self._once:  # raw maps are all that the denoiser needs
            maps, token = self._run(images)
            with torch.no_grad():
                tokens, grid = maps[0].flatten(1, 2), tuple(maps[0].shape[1:3])
                clean = self.model.denoiser(tokens, grid, self._normalized(images)).reshape(maps[0].shape)
            variables = {self._name(self.blocks[0]): clean, self._name(self.blocks[0]) + RAW: maps[0]}
            return variables if token is None else {**variables, TOKEN: token}
        for state in self.states:
            with self.model.denoising(state == "on") if isinstance(self.model, Denoised) else nullcontext():
                maps, token = self._run(images)
            end = RAW if state == "off" and len(self.states) > 1 else ""
            for block, features in zip(self.blocks, maps, strict=True):
                variables[self._name(block) + end] = features
            if token is not None and TOKEN not in variables:  # denoisers leave it as it is
                variables[TOKEN] = token
        return variables

    @torch.no_grad()  # torch.compile and inference mode do not go together
    def _forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        inputs = self._normalized(images)
        if isinstance(self.model, Hiera):
            with torch.autocast(self.device.type, enabled=self.settings.autocast):
                _, patches = normed(self.model, self.model.forward_features(inputs), self._layout)
            grid = self._layout.grid_at(inputs.shape[2], inputs.shape[3], patches.shape[1])
            return [patches.unflatten(1, grid).float()], None
        token: dict[str, Any] = {"return_prefix_tokens": True} if self.settings.class_token else {}
        with torch.autocast(self.device.type, enabled=self.settings.autocast):
            maps = self.model.forward_intermediates(
                inputs, indices=list(self.blocks), norm=True, intermediates_only=True, **token
            )
        prefix = maps[-1][1][:, 0].float() if token else None
        if token:
            maps = [patches for patches, _ in maps]
        if self._norm is not None:
            denoised = getattr(self.model, "denoise", False) and self.model.denoises_final
            plain = len(maps) - (denoised and self.blocks[-1] == self.model.final_block)  # a denoised map is normed
            maps = [self._normed_map(patches) if i < plain else patches for i, patches in enumerate(maps)]
            prefix = None if prefix is None else self._norm(prefix)
        return [patches.permute(0, 2, 3, 1).float() for patches in maps], prefix

    def _normalized(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def _normed_map(self, patches: torch.Tensor) -> torch.Tensor:
        return self._norm(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _name(self, block: int) -> str:
        return "features" if self.settings.blocks is None else f"block_{block}"

    def _states(self) -> Sequence[str]:
        has = isinstance(self.model, Denoised) and self.model.denoiser is not None
        states = self.settings.states or (("on",) if has else ("off",))
        if "on" in states and not has:
            raise UserError(
                f"{self.settings.model} has no denoiser to switch on: take it as it is (--no-denoise), calibrate one "
                "(timm-dvt calibrate), or name a variant (timm-dvt list)"
            )
        return states

    def _sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of a patch and of an input, in pixels. Raises UserError for a size that cannot be."""
        layout: Any = self._layout
        patch: Any = layout.img_size[0] // layout.grid[0], layout.img_size[1] // layout.grid[1]
        side = self.settings.size
        size: Any = meant_size(self.model) if side is None else (side, side)
        dynamic = getattr(self.model, "dynamic_img_size", False)
        if any(pixels % step for pixels, step in zip(size, patch)):
            lower = max(1, size[0] // patch[0]) * patch[0]
            raise UserError(f"--size must be a multiple of {patch[0]}, the patch, such as {lower}; got {size[0]}")
        if self.settings.keep_aspect and not dynamic:
            raise UserError(f"--keep-aspect: a {type(self.model).__name__} takes images of one size only")
        if not dynamic:
            fit_to(self.model, size)
        return patch, size

    def _blocks(self) -> tuple[int, ...]:
        count, wanted = self._layout.maps, self.settings.blocks
        if self.settings.class_token:
            known = "return_prefix_tokens" in inspect.signature(self.model.forward_intermediates).parameters
            if not known or getattr(self.model, "cls_token", None) is None:
                raise UserError(f"--class-token: {self.settings.model} has no class token")
        if isinstance(self.model, Hiera) and wanted is not None:
            raise UserError(f"--blocks: timm norms no blocks of a {type(self.model).__name__}; leave it out")
        if wanted is None or wanted == "all":
            return (count - 1,) if wanted is None else tuple(range(count))
        if any(not -count <= int(block) < count for block in wanted):
            raise UserError(f"--blocks: {self.settings.model} has the blocks 0 to {count - 1}; got {wanted}")
        return tuple(sorted({int(block) % count for block in wanted}))
