"""Stage 1 for one image: a model and an image go in; F, G and the residual come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor, nn

from timm_dvt.defaults import torch_defaults
from timm_dvt.errors import UserError
from training.common.backbone import FeatureReader
from training.common.views import Views, render_views, sample_views, shrink_for_views, view_axes, whole_view
from training.stage1.conditioning import check_views
from training.stage1.field.fit import fit_field
from training.stage1.linear.solver import LinearSolver
from training.stage1.settings import SOLVERS, Stage1Settings


class NonFiniteFeatures(UserError):
    """The backbone gave NaN or infinite features for this image."""


Field = Callable[[Tensor, Tensor], Tensor]  # xs (w,) and ys (h,) in [0, 1] of the whole image -> F (h, w, C)


@dataclass
class Decomposition:
    """One image's features at one block, taken apart (paper Eq. 5): raw = F + G + residual.

    Attributes:
        raw: (K, K, C) features of the whole image, as the backbone gives them.
        semantics: (K, K, C) F at the patch centers of the whole image.
        artifacts: (K, K, C) G, with zero mean over the patches.
        residual: (K, K, C) raw - F - G with the linear solver; h(raw) with the field.
        layer: the block, counted from 0.
        settings: what was asked for.
        diagnostics: what the solver chose and found.
        field: F at any places, see `at`.
        crop_raw: (N, K, K, C) what the backbone gives for the first N = settings.crops crops; None without crops.
        crop_semantics: (N, K, K, C) F at their patch centers; None without crops.
    All tensors are float32 on the CPU.
    """

    raw: Tensor
    semantics: Tensor
    artifacts: Tensor
    residual: Tensor
    layer: int
    settings: Stage1Settings
    diagnostics: dict[str, Any] = dataclass_field(default_factory=dict)
    field: Field | None = dataclass_field(default=None, repr=False, compare=False)
    crop_raw: Tensor | None = dataclass_field(default=None, repr=False)
    crop_semantics: Tensor | None = dataclass_field(default=None, repr=False)

    def at(self, height: int, width: int) -> Tensor:
        """F at the centers of height x width equal cells of the whole image: (height, width, C) float32 on the CPU.

        F is a field over the image, seen in crops at every scale, so it can be read between patches: no feature map
        has to be upsampled. Of the linear solver it is bilinear between M x M nodes, max(2 K, 64) by
        default (`LinearSettings`) and at most 5 K: beyond that it gets smoother, not sharper.

        Raises:
            ValueError: a size below 1, or a decomposition whose field was not kept.
        """
        if height < 1 or width < 1:
            raise UserError(f"height and width must be 1 or more, got {height} and {width}")
        if self.field is None:
            raise UserError("this decomposition came without its field, so F is known at the patches alone")
        xs, ys = ((torch.arange(count, dtype=torch.float64) + 0.5) / count for count in (width, height))
        return self.field(xs, ys).float().cpu()


@torch_defaults()
def decompose(
    model: nn.Module,
    image: Tensor,
    settings: Stage1Settings | None = None,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int], Any] | None = None,
    fit_progress: Callable[[int], Any] | None = None,
) -> Decomposition | dict[int, Decomposition]:
    """Take the features of one image apart into semantics F, artifacts G and a residual (paper 4.2).

    Args:
        model: a timm model that can have a denoiser, see FeatureReader; a `*_dvt` model's denoiser is not used.
        image: (3, H, W) floating point in [0, 1], of any size and shape.
        settings: see Stage1Settings; None is its defaults.
        device: the model is moved there first; None leaves it where it is.
        progress: called with the number of views done since the last call (a tqdm's `update`, say).

        fit_progress: called with the number of steps done since the last call; solver "field" only.

    The linear solver's memory does not grow with the number of views. The field keeps every view's features,
    the paper's way: views * K * K * C * 4 bytes a layer, 3.2 GB at the paper's settings.

    Returns:
        A Decomposition of the last block, or {layer: Decomposition} if `settings.layers` is given.

    Raises:
        TypeError: the model cannot have a denoiser.
        ValueError: an argument is out of its range; NonFiniteFeatures (a ValueError) if the backbone gives
            NaN or infinity.
        IllConditioned: the views cannot tell F and G apart; where they hardly can, a UserWarning.
    """
    settings = settings or Stage1Settings()
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise UserError(f"image must be (3, H, W) floating point, got {image.dtype} {tuple(image.shape)}")
    if settings.solver not in SOLVERS:
        raise UserError(f"solver must be one of {SOLVERS}, got {settings.solver!r}")
    if settings.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {settings.batch_size}")
    if not 0 <= settings.crops < settings.views:
        raise UserError(f"crops must be from 0 to {settings.views - 1}, one below views, got {settings.crops}")
    if device is not None:
        model = model.to(device)
    reader = settings.reader(model)
    if reader.device.type == "cuda":
        image = image.to(reader.device)  # which cuts views faster than a CPU can feed it
    if settings.square_first:
        image = render_views(image, whole_view(), reader.input_size)[0]
    image = shrink_for_views(image, reader.input_size, settings.area, settings.aspect)
    views = image_views(settings, (image.shape[1], image.shape[2]))
    centers = torch.linspace(0, 1, reader.grid, dtype=torch.float64) if settings.corner_aligned else reader.centers
    xs, ys = view_axes(views, centers)
    check_views(xs, ys)
    make = _StreamingLinear if settings.solver == "linear" else _CollectingField
    solvers = {layer: make(reader, centers, xs, ys, settings) for layer in reader.layers}
    kept: dict[int, list[Tensor]] = {layer: [] for layer in reader.layers}  # of the whole image, then of crops
    for first in range(0, len(views), settings.batch_size):
        batch = slice(first, first + settings.batch_size)
        features = reader.patch_features(render_views(image, views[batch], reader.input_size))
        for layer, maps in features.items():
            if not bool(maps.sum().isfinite()) and not bool(maps.isfinite().all()):  # a sum is quicker to take
                raise NonFiniteFeatures(
                    f"block {layer} gave NaN or infinite features in views {first} to {first + len(maps) - 1}; check "
                    "the image and the weights" + (", or use --dtype float32" if settings.dtype != "float32" else "")
                )
            kept[layer] += [crop.clone() for crop in maps[: max(0, 1 + settings.crops - first)]]
            for view, view_features in enumerate(maps, start=first):
                solvers[layer].add(view, view_features)
        if progress is not None:
            progress(len(views[batch]))
    results = {}
    for layer, solver in solvers.items():
        raw, *crops = kept[layer]
        semantics, artifacts, residual = (part.cpu() for part in solver.solve(raw, fit_progress))
        results[layer] = parts = Decomposition(
            raw.cpu(), semantics, artifacts, residual, layer, settings, solver.diagnostics, solver.field
        )
        if crops:
            parts.crop_raw = torch.stack(crops).cpu()
            assert solver.field is not None  # it is solved
            seen = [solver.field(xs[view], ys[view]).float() for view in range(1, 1 + len(crops))]
            parts.crop_semantics = torch.stack(seen).cpu()
    return results if settings.layers is not None else results[reader.layers[0]]


def image_views(settings: Stage1Settings, image_size: tuple[int, int]) -> Views:
    """The views of one image of (height, width) pixels: the whole image first, then random crops."""
    if settings.views < 2:
        raise UserError(f"views must be at least 2 (the whole image and a crop), got {settings.views}")
    whole = whole_view()
    crops = sample_views(
        settings.views - 1, image_size, settings.seed, area=settings.area, aspect=settings.aspect, flip=settings.flip
    )
    return Views(torch.cat([whole.boxes, crops.boxes]), torch.cat([whole.flips, crops.flips]))


class _StreamingLinear:
    """One layer's linear solver: view by view in; F, G and residual of the whole image out."""

    def __init__(
        self, reader: FeatureReader, centers: Tensor, xs: Tensor, ys: Tensor, settings: Stage1Settings
    ) -> None:
        # The sums need float64, which Apple's GPUs lack.
        self.device = torch.device("cpu") if reader.device.type == "mps" else reader.device
        self.xs, self.ys, self.centers = (x.to(self.device) for x in (xs, ys, centers))
        self.solver = LinearSolver(reader.grid, reader.channels, settings.linear, self.device)
        self.diagnostics: dict[str, Any] = {}
        self.field: Field | None = None

    def add(self, view: int, features: Tensor) -> None:
        self.solver.add(self.xs[view], self.ys[view], features)

    def solve(self, raw: Tensor, progress: Callable[[int], Any] | None) -> tuple[Tensor, Tensor, Tensor]:
        fit = self.solver.solve()
        self.diagnostics = fit.diagnostics
        semantics = fit.semantics(self.centers, self.centers)
        self.field = lambda xs, ys: fit.semantics(xs.to(self.device), ys.to(self.device))
        return semantics, fit.artifacts, raw.to(self.device) - semantics - fit.artifacts


class _CollectingField:
    """One layer's neural field: all views' features in memory first, then the fit (paper A.1)."""

    def __init__(
        self, reader: FeatureReader, centers: Tensor, xs: Tensor, ys: Tensor, settings: Stage1Settings
    ) -> None:
        self.reader, self.centers, self.settings = reader, centers, settings
        count = len(xs)
        where = torch.device("cpu")
        if reader.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(reader.device)
            # Half of what is free: the networks and their optimizer take theirs.
            where = reader.device if 8 * count * reader.grid**2 * reader.channels < free else where
        self.features = torch.empty(count, reader.grid**2, reader.channels, device=where)
        self.coords = (
            torch.stack([xs[:, None, :].expand(-1, reader.grid, -1), ys[:, :, None].expand(-1, -1, reader.grid)], -1)
            .reshape(-1, 2)
            .float()
        )
        self.patches = torch.arange(reader.grid**2).repeat(count)
        self.diagnostics: dict[str, Any] = {}
        self.field: Field | None = None

    def add(self, view: int, features: Tensor) -> None:
        self.features[view] = features.flatten(0, 1)

    def solve(self, raw: Tensor, progress: Callable[[int], Any] | None) -> tuple[Tensor, Tensor, Tensor]:
        fit = fit_field(
            self.coords,
            self.patches,
            self.features.flatten(0, 1),
            self.reader.grid,
            self.settings.field,
            seed=self.settings.seed,
            device=self.reader.device,
            progress=progress,
        )
        self.diagnostics = {"views": len(self.features), "loss": float(fit.losses[-100:].mean())}

        def field(xs: Tensor, ys: Tensor) -> Tensor:
            rows = torch.meshgrid(ys.float(), xs.float(), indexing="ij")
            return fit.semantics(torch.stack(rows, -1).flip(-1))

        self.field = field
        return field(self.centers, self.centers), fit.artifacts, fit.residual(raw)
