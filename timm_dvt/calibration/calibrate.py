"""A denoiser without training: the mean artifact map, or the directions in which position shows, from a few images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_dvt.attach import Denoised, attach_denoiser, blocks_of, check_supported, remove_denoiser
from timm_dvt.calibration.blanks import draw_blank, fit_gate
from timm_dvt.calibration.linear import outside, projecting_out, subtracting
from timm_dvt.calibration.positions import Position
from timm_dvt.calibration.samples import Source, canvas, sources, warn_if_alike
from timm_dvt.calibration.views import WINDOWS, estimate_positions, read_blocks
from timm_dvt.defaults import torch_defaults
from timm_dvt.denoiser import Denoiser, combine, resample
from timm_dvt.errors import CalibrationError
from timm_dvt.flat import flat_below
from timm_dvt.layouts import layout_of, meant_size
from timm_dvt.reading import LayerReader

LEAST_VIEWS = 4 * WINDOWS  # two canvases, whose estimates are compared, of the images and of blank ones
GATE_BLANKS, GATE_IMAGES = 24, 16  # forward passes by which blank images are told from photographs


@dataclass(frozen=True)
class Calibration:
    """How a denoiser was calibrated; its attribute `calibration`.

    Attributes:
        method: of `METHODS`.
        images: how many were looked at; 0 for blank and noise images.
        views: forward passes.
        error: estimated error of the mean artifact map, as a fraction of the map. From fewer than 4 images it leaves
            out what those images have in common.
        components: directions projected out; 0 of methods that take none out.
        share_before, share_after: estimated fraction of the variance within the views that position explains.
    """

    method: str
    images: int
    views: int
    error: float
    components: int
    share_before: float
    share_after: float


@torch_defaults()
def calibrate(
    model: Any,
    images: Source | Iterable[Source] | None = None,
    *,
    method: str = "static",
    layers: Sequence[int] | None = None,
    views: int = 256,
    tolerance: float = 0.1,
    batch_size: int = 8,
    keep_length: bool = False,
    blank_gate: bool = True,
    progress: bool = False,
) -> nn.Module:
    """Give a timm ViT a denoiser that works, without training; in place, and return the model.

    Random windows of the images, also mirrored and upside down, go through the model at the size it is meant for, on
    its device, and are summed up; memory does not grow with their number. What windows of one image share is content
    and cancels, what all windows have at the same place is the artifact map (`calibration.positions`). What was found
    is in `model.denoiser.calibration`, a `Calibration`; with several layers, in `model.denoisers()[block].calibration`.

    Args:
        model: any model that `add_denoiser` takes. A denoiser that it has already is replaced, but by "leftover".
        images: a folder, paths, PIL images, or RGB tensors (3, h, w) or (B, 3, h, w) in [0, 1] or uint8, alone or in an
            iterable. None: blank and noise images, which need no data but show only a part of the artifacts.
        method: "static" subtracts the mean artifact map, (H, W, C), at other grids resampled as a position embedding.
            "project" takes the directions out of the tokens in which places differ by more than noise: a (C, C) matrix
            for any grid, which leaves all other directions as they are. The directions are those of blank images, and
            `images` tell the mean token, which is kept. Neither has to be calibrated again for another grid.
            "leftover" keeps the denoiser that the model has, and subtracts the mean map of what that leaves: a trained
            block predicts F from what places have in common too. Before lengths are kept, where they are.
        layers: blocks to be denoised, as for `add_denoiser`; default the last one, or those that have a denoiser.
        views: forward passes at the most.
        tolerance: stop as soon as the map's own estimate of its error is not above this fraction of the map.
        batch_size: views in a forward pass.
        keep_length: bring each clean token to the length of the raw one, for what lives on lengths: of a DINOv2-S,
            object discovery (CorLoc) falls from 52.5 to 46.0 with a "static" map of 16 images, and with lengths kept
            stays at 52.5. "leftover" keeps lengths where the denoiser does already.
        blank_gate: where `images` are given, know what has no content and level it, where the map of photographs
            leaves a pattern of its own: images of a plain color by their tokens, which takes 40 forward passes more
            (where no linear map can tell the two apart there is no such gate), and walls and skies beside things by
            their pixels (`timm_dvt.flat`). "leftover" gives gates to a denoiser that has none, and keeps those of
            others.
        progress: show a bar with the error so far.

    Raises:
        CalibrationError: an argument is out of range, images are too few or cannot be used, or features not finite.
        TypeError, ValueError: the model is none that can have a denoiser; see `add_denoiser`.
    """
    layout = model.layout if isinstance(model, Denoised) else check_supported(model)
    check_arguments(method, views, tolerance, batch_size)
    samples = None if images is None else sources(images, views // WINDOWS)
    warn_if_alike(samples or [])
    if METHODS[method].make is None:
        _calibrate_leftover(model, samples, layers, views, tolerance, batch_size, blank_gate, progress)
        return _finished(model, keep_length, blank_gate and samples is not None)
    has = _denoised_blocks(model)
    blocks = blocks_of(model, layout, has if layers is None else layers)
    inner = [block for block in blocks if block != layout.maps - 1]
    training = model.training
    try:
        reader = LayerReader(model.eval(), layout, inner, batch_size, meant_size(model), denoised=False)
        raw = {block: reader.name_of(block) for block in blocks}
        # In images content hides the directions of position: the one that a DINOv2-S shows first holds 27% of what
        # varies in its features, where six found on blank images hold 4.5%. So images only tell the mean token.
        twice = METHODS[method].blanks and samples is not None
        most = views // 2 if twice else views
        count, positions = estimate_positions(reader, raw, samples, most, tolerance, progress)
        basis = estimate_positions(reader, raw, None, most, tolerance, progress)[1] if twice else positions
        facts = dict(method=method, images=0 if samples is None else min(len(samples), count), views=reader.views)
        new = {block: _denoiser(position, basis[block], facts) for block, position in positions.items()}
        if blank_gate and samples is not None:
            _add_gates(new, reader, raw, samples)
        if isinstance(model, Denoised):
            remove_denoiser(model)
            layout = layout_of(model)  # its size may be another than when it got its denoiser
        attach_denoiser(model, combine(new, layout.maps - 1), layout)
    finally:
        model.train(training)
    return _finished(model, keep_length, blank_gate and samples is not None)


def check_arguments(
    method: str = "static", views: int = LEAST_VIEWS, tolerance: float = 0, batch_size: int = 1
) -> None:
    """Raise CalibrationError for arguments of `calibrate` that no model can be calibrated with."""
    if method not in METHODS:
        raise CalibrationError(f"method is {method!r}; it must be one of {', '.join(METHODS)}.")
    if views < LEAST_VIEWS or batch_size < 1 or not tolerance >= 0:
        raise CalibrationError(
            f"views is {views}, tolerance {tolerance}, batch_size {batch_size}; they must be at least "
            f"{LEAST_VIEWS}, 0 and 1."
        )


def _add_gates(new: dict[int, Denoiser], reader: LayerReader, raw: dict[int, str], images: list[Source]) -> None:
    """Let new denoisers, of what the reader gives by these names, know blank images from these."""
    blanks = torch.stack([draw_blank(reader.channels, reader.size, seed) for seed in range(GATE_BLANKS)])
    shown = torch.stack([canvas(images[i % len(images)], reader.size, i) for i in range(GATE_IMAGES)])
    tokens = [read_blocks(reader, raw, reader.normalized(kind)) for kind in (blanks, shown)]
    for block, denoiser in new.items():
        gate = fit_gate(*(maps[block].flatten(1, 2).cpu() for maps in tokens))
        if gate is not None:
            denoiser.start_gating(*gate)


def _finished(model: Any, keep_length: bool, level: bool) -> nn.Module:
    """The model, whose denoisers keep lengths and level flat patches from now on, if they are to."""
    for denoiser in model.denoisers().values():
        if keep_length:
            denoiser.start_keeping_length()
        if level and denoiser.flat_below is None:
            denoiser.start_leveling(flat_below(model))
    return model


def _calibrate_leftover(
    model: Any,
    samples: list[Source] | None,
    layers: Sequence[int] | None,
    views: int,
    tolerance: float,
    batch_size: int,
    blank_gate: bool,
    progress: bool,
) -> None:
    """`calibrate` by "leftover": the denoisers stay, and get an output embedding, and a gate where they have none."""
    denoisers = model.denoisers() if isinstance(model, Denoised) else {}
    if not denoisers:
        raise CalibrationError("The method leftover improves a denoiser, and this model has none; use static.")
    if layers is not None:
        raise CalibrationError(f"layers is {layers}; the method leftover takes those that have a denoiser.")
    inner = [block for block in denoisers if block != model.final_block]
    size, training = _size_of_denoiser(model) or meant_size(model), model.training
    try:
        with _as_predicted(denoisers.values()):
            reader = LayerReader(model.eval(), model.layout, inner, batch_size, size)
            clean = {block: reader.name_of(block, denoised=True) for block in denoisers}
            count, positions = estimate_positions(reader, clean, samples, views, tolerance, progress)
        read, ungated = reader.views, {block: d for block, d in denoisers.items() if d.blank_gate is None}
        if blank_gate and ungated and samples is not None:
            _add_gates(ungated, reader, {block: reader.name_of(block) for block in ungated}, samples)
    finally:
        model.train(training)
    for block, position in positions.items():
        denoiser = denoisers[block]
        artifacts = position.artifacts.flatten(0, 1)[None]
        denoiser.start_adding(-resample(artifacts, reader.grid, denoiser.grid_size))
        denoiser.calibration = Calibration(
            method="leftover",
            images=0 if samples is None else min(len(samples), count),
            views=read,
            error=position.error,
            components=0,
            share_before=position.share,
            share_after=position.share_without_artifacts,
        )


def _size_of_denoiser(model: Any) -> tuple[int, int] | None:
    """The input size in pixels at which a denoiser's grid is the model's, of a model that takes any size."""
    if not getattr(model, "dynamic_img_size", False):
        return None
    denoisers, layout = model.denoisers(), model.layout
    grid = denoisers[max(denoisers)].grid_size
    return grid[0] * (layout.img_size[0] // layout.grid[0]), grid[1] * (layout.img_size[1] // layout.grid[1])


@contextmanager
def _as_predicted(denoisers: Iterable[Denoiser]) -> Iterator[None]:
    """Denoisers whose tokens are those of their blocks alone, for a block of code."""
    off: Any = {"keep_length": False, "pos_embed_out": None, "blank_gate": None, "flat_below": None}
    before = [(denoiser, {name: getattr(denoiser, name) for name in off}) for denoiser in denoisers]
    try:
        for denoiser, _ in before:
            for name, value in off.items():
                setattr(denoiser, name, value)
        yield
    finally:
        for denoiser, values in before:
            for name, value in values.items():
                setattr(denoiser, name, value)


def _denoised_blocks(model: nn.Module) -> list[int] | None:
    """The blocks that have a denoiser; None for a model without."""
    if not isinstance(model, Denoised):
        return None
    before = model.denoisers()
    if not before or any(not isinstance(denoiser.norm, nn.Identity) for denoiser in before.values()):
        raise CalibrationError("Blocks or the final norm of this model were pruned away; calibrate before pruning.")
    return list(before)


def _denoiser(position: Position, blanks: Position, facts: dict) -> Denoiser:
    """A denoiser of the method, in float32 on the CPU, with what there is to tell of it.

    Args:
        position: as the images show it. blanks: as blank images show it, if the method is "project".
    """
    make = METHODS[facts["method"]].make
    assert make is not None  # leftover keeps the denoiser that there is
    denoiser, components, after = make(position, blanks)
    denoiser.calibration = Calibration(
        **facts, error=blanks.error, components=components, share_before=position.share, share_after=after
    )
    return denoiser


def _static(position: Position, blanks: Position) -> tuple[Denoiser, int, float]:
    return subtracting(position.artifacts), 0, position.share_without_artifacts


def _project(position: Position, blanks: Position) -> tuple[Denoiser, int, float]:
    basis = blanks.components()
    denoiser = projecting_out(basis, position.artifacts.shape[:2], position.mean)
    return denoiser, basis.shape[1], position.share_after(outside(basis))


class Method(NamedTuple):
    """A row of `METHODS`.

    Attributes:
        help: of the command line.
        make: of position as images and as blank images show it, the denoiser, how many directions it projects out, and
            the share of variance that position explains after; None keeps the denoiser that there is ("leftover").
        found: what a report says that it took; {n} is the number of directions, {s} an s where there are several.
        blanks: whether half of the views are of blank images, where images are given.
    """

    help: str
    make: Callable[[Position, Position], tuple[Denoiser, int, float]] | None
    found: str = "the mean artifact map"
    blanks: bool = False


METHODS = {
    "static": Method("subtract the mean artifact map", _static),
    "project": Method(
        "take out the directions in which position shows", _project, "{n} direction{s} projected out", blanks=True
    ),
    "leftover": Method("keep the model's denoiser, subtract the mean map that it leaves", None),
}
