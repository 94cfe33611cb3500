"""Stage 1 for one image: a model and an image go in; F, G and the residual come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.backbone import FeatureReader
from training.linear import LinearSettings, LinearSolver
from training.views import Views, render_views, sample_views, view_axes, whole_view

SOLVERS = ("linear", "field")


class NonFiniteFeatures(ValueError):
    """The backbone gave NaN or infinite features for this image."""


@dataclass(frozen=True)
class Stage1Settings:
    """How one image is decomposed.

    Attributes:
        solver: "linear" (least squares, streamed) or "field" (the paper's neural fields).
        views: forward passes an image: the whole image, then views - 1 random crops.
        seed: of the crops, and of the field's initialisation.
        layers: blocks to decompose, all in one pass; None is the last block alone.
        input_size: side of the square input in pixels; None is the paper's (518 for patch 14, 512 for 16).
        stride: step between patches in pixels; None is the patch size.
        batch_size: views a forward pass; does not change the result.
        dtype: "float32" or "bfloat16", of the forward passes.
        linear: settings of the linear solver.
    """

    solver: str = "linear"
    views: int = 768
    seed: int = 0
    layers: tuple[int, ...] | None = None
    input_size: int | None = None
    stride: int | None = None
    batch_size: int = 8
    dtype: str = "float32"
    linear: LinearSettings = field(default_factory=LinearSettings)


@dataclass
class Decomposition:
    """One image's features at one block, taken apart (paper Eq. 5): raw = F + G + residual.

    Attributes:
        raw: (K, K, C) features of the whole image, as the backbone gives them.
        semantics: (K, K, C) F at the patch centres of the whole image.
        artifacts: (K, K, C) G, with zero mean over the patches.
        residual: (K, K, C) raw - F - G with the linear solver; h(raw) with the field.
        layer: the block, counted from 0.
        settings: what was asked for.
        diagnostics: what the solver chose and found.
    All tensors are float32 on the CPU.
    """

    raw: Tensor
    semantics: Tensor
    artifacts: Tensor
    residual: Tensor
    layer: int
    settings: Stage1Settings
    diagnostics: dict[str, Any] = field(default_factory=dict)


def decompose(
    model: nn.Module,
    image: Tensor,
    settings: Stage1Settings = Stage1Settings(),
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Decomposition | dict[int, Decomposition]:
    """Take the features of one image apart into semantics F, artifacts G and a residual (paper 4.2).

    Args:
        model: any timm VisionTransformer or Eva; a `*_dvt` model's denoiser is not used.
        image: (3, H, W) floating point in [0, 1], of any size and shape.
        settings: see Stage1Settings.
        device: the model is moved there first; None leaves it where it is.
        progress: called with the number of views done since the last call (a tqdm's `update`, say).

    Returns:
        A Decomposition of the last block, or {layer: Decomposition} if `settings.layers` is given.

    Raises:
        TypeError: the model is not one of timm's ViTs.
        ValueError: an argument is out of its range; NonFiniteFeatures (a ValueError) if the backbone gives NaN
            or infinity.
        IllConditioned: the views cannot tell F and G apart.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(f"image must be (3, H, W) floating point, got {image.dtype} {tuple(image.shape)}")
    if settings.solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {settings.solver!r}")
    if settings.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {settings.batch_size}")
    if device is not None:
        model = model.to(device)
    reader = FeatureReader(
        model, settings.layers, input_size=settings.input_size, stride=settings.stride, dtype=settings.dtype
    )
    views = image_views(settings, (image.shape[1], image.shape[2]))
    xs, ys = view_axes(views, reader.centres)
    solvers = {k: LinearSolver(reader.grid, reader.channels, settings.linear, reader.device) for k in reader.layers}
    raw: dict[int, Tensor] = {}
    for first in range(0, len(views), settings.batch_size):
        batch = slice(first, first + settings.batch_size)
        features = reader.patch_features(render_views(image, views[batch], reader.input_size))
        for layer, maps in features.items():
            if not bool(maps.isfinite().all()):
                raise NonFiniteFeatures(
                    f"block {layer} gave NaN or infinite features in views {first} to {first + len(maps) - 1}; "
                    "check the image and the weights, or use dtype='float32'"
                )
            raw.setdefault(layer, maps[0].clone())
            for view, view_features in enumerate(maps, start=first):
                solvers[layer].add(xs[view], ys[view], view_features)
        if progress is not None:
            progress(len(views[batch]))
    results = {}
    for layer, solver in solvers.items():
        fit = solver.solve()
        centres = reader.centres.to(reader.device)
        semantics = fit.semantics(centres, centres)
        residual = raw[layer] - semantics - fit.artifacts
        parts = [part.cpu() for part in (raw[layer], semantics, fit.artifacts, residual)]
        results[layer] = Decomposition(*parts, layer, settings, fit.diagnostics)
    return results if settings.layers is not None else results[reader.layers[0]]


def image_views(settings: Stage1Settings, image_size: tuple[int, int]) -> Views:
    """The views of one image: the whole image, which random crops cover badly at its corners, then crops."""
    whole = whole_view()
    if settings.views < 2:
        raise ValueError(f"views must be at least 2 (the whole image and a crop), got {settings.views}")
    crops = sample_views(settings.views - 1, image_size, settings.seed)
    return Views(torch.cat([whole.boxes, crops.boxes]), torch.cat([whole.flips, crops.flips]))
