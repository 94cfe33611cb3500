"""timm_dvt.inspect: what a model's features hold of position and of outliers, layer by layer."""

import copy
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from timm_dvt.bars import tqdm
from timm_dvt.blanks import draw_blank
from timm_dvt.calibration import LEAST_VIEWS, calibrate
from timm_dvt.defaults import torch_defaults
from timm_dvt.denoised import Denoised
from timm_dvt.inspection.estimates import alikeness, grid_energy, position_share, products_of
from timm_dvt.inspection.findings import duration, findings
from timm_dvt.inspection.outliers import histogram, outliers_of
from timm_dvt.inspection.probe import PlaceProbe
from timm_dvt.inspection.reader import LayerReader
from timm_dvt.inspection.results import Blank, Inspection, InspectionError, Layer, Pictures, Trial
from timm_dvt.inspection.samples import photographs
from timm_dvt.model import timm_name
from timm_dvt.positions import MOST_GROUPS, PositionSums, Windows
from timm_dvt.sample_images import SampleError, Source
from timm_dvt.viewing import WINDOWS, view_inputs

VIEWS = 256
BLANKS = 16  # of one color, and as many of noise
PROBED = 4  # windows of a canvas that a linear map reads; all turns are among them, so that a sky tells no place
MOST_NORMS = 512  # views whose norms are kept, 2 bytes a patch
SOLVING = 30  # canvases that could be counted in the time in which the sums are solved


@dataclass
class _Sums:
    """Of a layer, over all photographs."""

    position: PositionSums
    probe: PlaceProbe = field(default_factory=PlaceProbe)
    norms: list[np.ndarray] = field(default_factory=list)


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
        views: forward passes of photographs.
        batch_size: views in a forward pass.
        try_calibration: calibrate a copy of the model on half of the images, and judge it by the other half.
        progress: say on stderr how long it will take, and show a bar.
        name: what the commands of the findings call the model; default its name in timm.

    Raises:
        InspectionError: an argument is out of range; the model gives no patches of one grid; images cannot be used, are
            too few, or too much alike; features are not finite.
    """
    if views < LEAST_VIEWS or batch_size < 1:
        raise InspectionError(f"views is {views}, batch_size {batch_size}; they must be at least {LEAST_VIEWS} and 1.")
    training = model.training
    try:
        reader = LayerReader(model.eval(), None if blocks is None else list(blocks), batch_size)
        rgb = reader.channels == 3
        if not rgb and images is not None:
            raise InspectionError(f"The model takes images of {reader.channels} channels; leave images out.")
        shown = photographs(images, views // WINDOWS) if rgb else None
        if try_calibration and (shown is None or len(shown) < 8):
            count = 0 if shown is None else len(shown)
            raise InspectionError(f"images holds {count} different ones; to try a calibration takes 8: half judge it.")
        sums, seconds, pictures, told = _photographs(reader, shown, views, progress)
        of_blanks = {kind: _blanks(reader, kind, progress) for kind in ("flat", "noise")}
        layers, pictures = _layers(reader, sums, of_blanks, told, pictures)
        trial = _try(model, images is None, shown, views, batch_size, progress) if try_calibration and shown else None
    except SampleError as e:
        raise InspectionError(str(e)) from e
    finally:
        model.train(training)
    facts: dict[str, Any] = dict(
        model=name or timm_name(model) or type(model).__name__,
        kind=type(model).__name__,
        device=str(reader.device),
        size=reader.size,
        trained=_is_trained(model),
        images=0 if shown is None else len(shown),
        parts=rgb and images is None,
        views=told.views,
        blanks=2 * BLANKS,
        seconds=seconds,
        layers=tuple(layers),
        trial=trial,
        pictures=pictures,
    )
    return Inspection(**facts, findings=tuple(findings(Inspection(**facts, findings=()))))


@dataclass
class _Told:
    """What is kept of the views: how much each patch's pixels vary, by grid, and which image a view is of."""

    views: int = 0
    content: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)
    images: list[int] = field(default_factory=list)


def _photographs(
    reader: LayerReader, shown: list[Source] | None, views: int, progress: bool
) -> tuple[dict[str, _Sums], float, tuple[np.ndarray, dict[str, np.ndarray]], _Told]:
    """Sums of all layers, the seconds of a view, a photograph with its maps, and what is kept of the views."""
    margin = (reader.grid[0] // 2, reader.grid[1] // 2)
    windows = Windows.whole() if shown is None else Windows.draw(WINDOWS, margin)
    each = len(windows.places)
    count = views // each
    images = len(shown) if shown is not None else count // 2
    groups = min(images, MOST_GROUPS)
    start = time.perf_counter()
    first = reader(view_inputs(reader, windows, shown, 1)[1])  # not the first forward pass, which warms up
    seconds = (time.perf_counter() - start) / each

    def empty() -> dict[str, _Sums]:
        cut = {name: _scaled(windows, maps, reader) for name, maps in first.items()}
        return {name: _Sums(PositionSums(cut[name], groups, directions=False)) for name in first}

    start, sums = time.perf_counter(), empty()
    for name, maps in first.items():
        sums[name].position.add(maps, 0)
        sums[name].probe.add(maps[:PROBED])
    beside, sums = time.perf_counter() - start, empty()
    if progress:
        passes, space = count * each + 2 * BLANKS, sum(groups * maps[0].numel() * 4 for maps in first.values())
        print(
            f"inspect: {passes} forward passes at {seconds:.2g} s (timed), all in all about "
            f"{duration(passes * seconds + (count + SOLVING) * beside)}; sums take {max(space / 1e9, 0.1):.1f} GB",
            file=sys.stderr,
        )
    told, every = _Told(), -(-count * each // MOST_NORMS)
    # Those that a linear map is fitted to come first; no image is on both sides.
    order = sorted(range(count), key=lambda visit: _image(visit, shown) % 2)
    for turn, visit in enumerate(tqdm(order, "inspect", unit="image", disable=not progress)):
        inputs = view_inputs(reader, windows, shown, visit)[1]
        image = _image(visit, shown)
        keeps = turn % every == 0
        told.images += [image] * each * keeps
        for name, maps in reader(inputs).items():
            layer = sums[name]
            layer.position.add(maps, image % groups)
            probed = maps[:PROBED]
            layer.probe.test(probed, image) if image % 2 else layer.probe.add(probed)
            if keeps:
                layer.norms.append(maps.norm(dim=-1).cpu().numpy().astype(np.float32))
        for grid in {layer.norms[0].shape[1:] for layer in sums.values() if layer.norms} if keeps else ():
            told.content.setdefault(grid, []).append(_content(inputs, grid))
        told.views += each
    photograph = reader.pixels(view_inputs(reader, windows, shown, 0)[1][:1])[0]
    drawn = reader(reader.normalised(photograph)[None])
    return sums, seconds, (_drawable(photograph), {name: maps[0].cpu().numpy() for name, maps in drawn.items()}), told


def _image(visit: int, shown: list[Source] | None) -> int:
    return visit // 2 if shown is None else visit % len(shown)


def _scaled(windows: Windows, maps: torch.Tensor, reader: LayerReader) -> Windows:
    """The windows on the grid of a layer that may be a finer one."""
    rows, columns = (side // whole for side, whole in zip(maps.shape[1:3], reader.grid))
    if (rows * reader.grid[0], columns * reader.grid[1]) != tuple(maps.shape[1:3]):
        raise InspectionError(
            f"A grid of {maps.shape[1]} x {maps.shape[2]} is no multiple of the features' {reader.grid[0]} x "
            f"{reader.grid[1]}; leave such blocks out (blocks=[-1])."
        )
    places = tuple((y * rows, x * columns, turned) for y, x, turned in windows.places)
    return Windows(places, (windows.margin[0] * rows, windows.margin[1] * columns))


def _content(inputs: torch.Tensor, grid: tuple[int, ...]) -> np.ndarray:
    """(V, H, W): the variance of the pixels in each patch."""
    mean, square = (adaptive_avg_pool2d(one, (grid[0], grid[1])) for one in (inputs, inputs.square()))
    return (square - mean.square()).sum(1).cpu().numpy()


def _blanks(reader: LayerReader, kind: str, progress: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, Any]]:
    """By layer what groups of images of one color, or of noise, tell."""
    sums: dict[str, PositionSums] = {}
    seeds = range(kind == "noise", 2 * BLANKS, 2)  # as `draw_blank` turns them out
    for turn, seed in enumerate(tqdm(seeds, f"{kind} images", leave=False, disable=not progress)):
        image = reader.normalised(draw_blank(reader.channels, reader.size, seed))
        for name, maps in reader(image[None]).items():
            sums.setdefault(name, PositionSums(Windows.whole(), MOST_GROUPS, directions=False))
            sums[name].add(maps, turn % MOST_GROUPS)
    return {name: one.of_groups() for name, one in sums.items()}


def _layers(
    reader: LayerReader, sums: dict[str, _Sums], blanks: dict[str, dict], told: _Told, drawn: tuple
) -> tuple[list[Layer], Pictures]:
    layers, pictures = [], Pictures(*drawn, {}, {}, {}, {})
    content = {grid: np.concatenate(parts) for grid, parts in told.content.items()}
    raw: Any = None
    for name, block, denoised in reader.layers:
        layer, final = sums.pop(name), name.startswith("features")
        maps, weights, variances = layer.position.of_groups()
        products = products_of(maps)
        raw = raw if denoised else float(weights @ variances)
        mean = torch.tensordot(weights, maps, 1)
        of_kind = {}
        for kind, of in blanks.items():
            theirs, their_weights, their_variances = of[name]
            pattern = torch.tensordot(their_weights, theirs, 1)[None]
            own = products_of(theirs)
            of_kind[kind] = Blank(
                position_share(own, their_weights, their_variances),
                position_share(own, their_weights, torch.full_like(their_weights, raw)),
                alikeness(products, weights, products_of(maps, pattern)[:, 0], float(products_of(pattern))),
            )
            if final and kind == "flat":
                pictures.flat[name] = pattern[0].numpy()
        norms = np.concatenate(layer.norms)
        outliers, places = outliers_of(norms, content[norms.shape[1:]], told.images)
        pictures.norms[name], pictures.places[name] = histogram(np.maximum(norms, 1e-12).ravel()), places
        if final:
            pictures.means[name] = mean.numpy()
        layers.append(
            Layer(
                name=name,
                block=block,
                denoised=denoised,
                final=final,
                grid_size=(maps.shape[1], maps.shape[2]),
                share=position_share(products, weights, variances),
                row=layer.probe.r2()[0],
                column=layer.probe.r2()[1],
                flat=of_kind["flat"],
                noise=of_kind["noise"],
                outliers=outliers,
                grid=grid_energy(maps, weights),
            )
        )
    return layers, pictures


def _try(model: nn.Module, by_default: bool, shown: list[Source], views: int, batch_size: int, progress: bool) -> Trial:
    """Calibrate a copy on every other image, or on blank ones where the caller has none, and judge by the others."""
    method = "leftover" if isinstance(model, Denoised) and model.denoisers() else "static"
    twin = copy.deepcopy(model)
    judges, passes = shown[1::2], max(views // 2, LEAST_VIEWS)
    calibrate(twin, None if by_default else shown[::2], method=method, views=passes, progress=progress)
    before, after = (_share_of(LayerReader(one.eval(), [], batch_size), judges, passes) for one in (model, twin))
    return Trial(method, before, after)


def _share_of(reader: LayerReader, shown: list[Source], views: int) -> Any:
    windows = Windows.draw(WINDOWS, (reader.grid[0] // 2, reader.grid[1] // 2))
    groups = min(len(shown), MOST_GROUPS)
    sums = PositionSums(windows, groups, directions=False)
    for visit in range(views // WINDOWS):
        maps = reader(view_inputs(reader, windows, shown, visit)[1])
        sums.add(list(maps.values())[-1], visit % len(shown) % groups)
    maps, weights, variances = sums.of_groups()
    return position_share(products_of(maps), weights, variances)


def _is_trained(model: nn.Module) -> bool:
    """False where all norms have the scale 1 and the shift 0 with which they are initialized."""
    norms = [
        module
        for name, module in model.named_modules()
        if not name.startswith("denoiser") and "norm" in type(module).__name__.lower()
    ]
    scales = [norm.weight for norm in norms if isinstance(getattr(norm, "weight", None), torch.Tensor)]
    return not scales or any(not bool((scale == 1).all()) for scale in scales)


def _drawable(image: torch.Tensor) -> np.ndarray:
    """(h, w, 3) of an image of whatever channels."""
    shown = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return shown.permute(1, 2, 0).numpy()
