"""timm_dvt.inspect: what a model's features hold of position and of outliers, layer by layer."""

import copy
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from timm_dvt.attach import timm_name
from timm_dvt.calibration.calibrate import GATE_BLANKS, GATE_IMAGES, LEAST_VIEWS, calibrate
from timm_dvt.calibration.samples import Source
from timm_dvt.calibration.views import WINDOWS
from timm_dvt.defaults import torch_defaults
from timm_dvt.denoised import Denoised
from timm_dvt.errors import InspectionError
from timm_dvt.inspection.counting import BLANKS, Count, OfGroups, count_blanks, features_share
from timm_dvt.inspection.estimates import alikeness, grid_energy, position_share, products_of
from timm_dvt.inspection.findings import findings
from timm_dvt.inspection.outliers import histogram, outliers_of
from timm_dvt.inspection.reader import layer_reader
from timm_dvt.inspection.results import Blank, Inspection, Layer, Pictures, Trial
from timm_dvt.inspection.samples import photographs
from timm_dvt.reading import FEATURES

VIEWS = 256


@torch_defaults()
def inspect(
    model: nn.Module,
    images: Source | Iterable[Source] | None = None,
    *,
    blocks: Sequence[int] | None = None,
    views: int = VIEWS,
    batch_size: int = WINDOWS,
    try_calibration: bool = False,
    progress: bool = False,
    name: str | None = None,
) -> Inspection:
    """Tell what a timm ViT's features hold of position and of outlier tokens, and what would help; the model stays.

    Windows of photographs, as `timm_dvt.calibrate` cuts them, and blank images go through the model once, at the size
    it is meant for and on its device. Sums are kept of each layer, not maps, so memory does not grow with the views.

    Args:
        model: any model that `timm_dvt.add_denoiser` takes, with a denoiser or without. With one, denoised tokens are
            measured beside the raw ones, from the same forward pass.
        images: as for `timm_dvt.calibrate`, 4 or more that show different things. None: parts of the two photographs
            that come with the package; blank and noise images for a model that takes no RGB.
        blocks: counted from 0, or from the end with a minus; default all. The final features are always measured.
        views: forward passes of photographs, 8 an image.
        batch_size: views in a forward pass.
        try_calibration: calibrate a copy of the model on half of the images, and judge it by the other half.
        progress: say on stderr how long it will take, and show a bar.
        name: what the commands of the findings call the model; default its name in timm.

    Raises:
        InspectionError: an argument is out of range; the model gives no patches of one grid; images are too
            few, or too much alike; features are not finite.
        UserError: an image cannot be used.
    """
    if views < LEAST_VIEWS or batch_size < 1:
        raise InspectionError(f"views is {views}, batch_size {batch_size}; they must be at least {LEAST_VIEWS} and 1.")
    training = model.training
    try:
        reader = layer_reader(model.eval(), None if blocks is None else list(blocks), batch_size)
        shown = photographs(images, views // WINDOWS, reader.channels, try_calibration)
        count = Count(reader, shown, views // WINDOWS if shown else views)
        if progress:
            tried = 3 * _tried(views) + GATE_BLANKS + GATE_IMAGES if try_calibration else 0
            print(count.cost(2 * BLANKS + tried), file=sys.stderr)
        count.run(progress)
        blanks = {kind: count_blanks(reader, kind, progress) for kind in ("flat", "noise")}
        pictures = _pictures(count)
        layers = _layers(count, blanks, pictures)
        trial = _try(model, images, shown, views, batch_size, progress) if try_calibration and shown else None
    finally:
        model.train(training)
    facts: dict[str, Any] = dict(
        model=name or timm_name(model) or type(model).__name__,
        kind=type(model).__name__,
        device=str(reader.device),
        size=reader.size,
        trained=_is_trained(model),
        images=0 if shown is None else len(shown),
        parts=shown is not None and images is None,
        views=count.views,
        blanks=2 * BLANKS,
        seconds=count.seconds,
        layers=tuple(layers),
        trial=trial,
        pictures=pictures,
    )
    return Inspection(**facts, findings=tuple(findings(Inspection(**facts, findings=()))))


def _layers(count: Count, blanks: dict[str, dict[str, OfGroups]], pictures: Pictures) -> list[Layer]:
    """What the sums tell, layer by layer; maps and histograms are put into the pictures."""
    layers = []
    content = {grid: np.concatenate(parts) for grid, parts in count.content.items()}
    raw = 0.0
    for name, block, denoised in count.reader.layers:
        sums, final = count.layers.pop(name), name.startswith(FEATURES)  # popped, as each takes memory
        maps, weights, variances = sums.position.of_groups()
        products = products_of(maps)
        raw = raw if denoised else float(weights @ variances)
        kinds = {kind: _blank(of[name], maps, products, weights, raw) for kind, of in blanks.items()}
        norms = np.concatenate(sums.norms)
        outliers, places = outliers_of(norms, content[norms.shape[1:]], count.images)
        pictures.norms[name], pictures.places[name] = histogram(norms.ravel()), places
        if final:
            pictures.means[name] = torch.tensordot(weights, maps, 1).numpy()
            flat, of_each, _ = blanks["flat"][name]
            pictures.flat[name] = torch.tensordot(of_each, flat, 1).numpy()
        row, column = sums.probe.r2()
        layers.append(
            Layer(
                name=name,
                block=block,
                denoised=denoised,
                final=final,
                grid_size=(maps.shape[1], maps.shape[2]),
                share=position_share(products, weights, variances),
                row=row,
                column=column,
                **kinds,
                outliers=outliers,
                grid=grid_energy(maps, weights),
            )
        )
    return layers


def _blank(of_groups: OfGroups, maps: torch.Tensor, products: torch.Tensor, weights: torch.Tensor, raw: float) -> Blank:
    """What blank images tell beside the photographs' maps, their products and weights, and the raw variance there."""
    theirs, of_each, variances = of_groups
    pattern = torch.tensordot(of_each, theirs, 1)[None]
    blank_products = products_of(theirs)
    return Blank(
        position_share(blank_products, of_each, variances),
        position_share(blank_products, of_each, torch.full_like(of_each, raw)),
        alikeness(products, weights, products_of(maps, pattern)[:, 0], float(products_of(pattern))),
    )


def _pictures(count: Count) -> Pictures:
    """A photograph and its tokens, and room for what the sums tell."""
    reader = count.reader
    photograph = reader.pixels(count.inputs(0)[:1])
    maps = {name: features[0].cpu().numpy() for name, features in reader(reader.normalized(photograph)).items()}
    drawable = photograph[0, :3] if reader.channels >= 3 else photograph[0, :1].expand(3, -1, -1)
    return Pictures(drawable.permute(1, 2, 0).numpy(), maps, {}, {}, {}, {})


def _tried(views: int) -> int:
    """Forward passes to calibrate, to judge the model and to judge the calibrated one, each."""
    return max(views // 2, LEAST_VIEWS)


def _try(model: nn.Module, images: Any, shown: list[Source], views: int, batch_size: int, progress: bool) -> Trial:
    """Calibrate a copy on every other image, or on blank ones where the caller has none, and judge by the others."""
    method = "leftover" if isinstance(model, Denoised) and model.denoisers() else "static"
    twin = copy.deepcopy(model)
    learn = None if images is None else shown[::2]
    calibrate(twin, learn, method=method, views=_tried(views), batch_size=batch_size, progress=progress)
    readers = (layer_reader(candidate.eval(), [], batch_size) for candidate in (model, twin))
    return Trial(method, *(features_share(reader, shown[1::2], _tried(views) // WINDOWS) for reader in readers))


def _is_trained(model: nn.Module) -> bool:
    """False where all norms have the scale 1 with which they are initialized."""
    norms = [
        module
        for name, module in model.named_modules()
        if not name.startswith("denoiser") and "norm" in type(module).__name__.lower()
    ]
    scales = [norm.weight for norm in norms if isinstance(getattr(norm, "weight", None), torch.Tensor)]
    return not scales or any(not bool((scale == 1).all()) for scale in scales)
