"""What an inspection means, in sentences for readers who have not read the paper, and what to do about it."""

import re
from collections.abc import Iterator

import timm

from timm_dvt.inspection.results import Estimate, Finding, Inspection, Layer

SMALL, LARGE = 0.01, 0.04  # position's share: below it is not worth an effort, above it is worth a training
READABLE = 0.3  # R2 from which a place can be read out of a token
BEYOND_DOUBT = 0.9  # R2 on images held out that is no chance, however little few images tell of what chance gives
MORE = 1.5  # times the features' share that makes an earlier block worth a word
STRONGER = 1.1  # of the pattern in blank images, on over off
LEAST_OUTLIERS, STANDS_OUT = 1e-4, 2.0  # share of the patches, and their norm over the median
# training.make_denoiser by its defaults: images x views, and stage 2 in forward passes.
PASSES = 128 * 16 + 500


def findings(report: Inspection) -> Iterator[Finding]:
    """The findings, the most important first."""
    if not report.trained:
        yield Finding(
            "random weights",
            "These weights are random: all norms are as they are initialized. The numbers describe no trained model; "
            "load weights (pretrained=True) and inspect again.",
        )
        return
    off = report.layer()
    on = next((layer for layer in report.layers if layer.final and layer.denoised), None)
    yield _position(report, off, on)
    if on is not None:
        yield from _blank(report, off, on)
    yield _outliers(report)
    if report.trial is not None:
        before, after = report.trial.before, report.trial.after
        yield Finding(
            "position",
            f"Tried at once: calibrate ({report.trial.method}) takes position's share from {percent(before)} to "
            f"{percent(after)}, on images that it was not calibrated on.",
        )
    if report.parts:
        yield Finding(
            "note",
            "No images were given, so these are parts of the two photographs that come with the package; your images "
            "may tell another story (--images FOLDER).",
        )


def _position(report: Inspection, off: Layer, on: Layer | None) -> Finding:
    layer, behind = (on, " behind the denoiser") if on is not None else (off, "")
    share = layer.share
    readable = all(_is_read(estimate) for estimate in (layer.row, layer.column))
    what = f"Position explains {percent(share)} of what varies in the final features{behind}"
    if on is not None:
        what += f", and {percent(off.share)} without it"
    what += f"; chance would give up to {100 * share.chance:.2g}%."
    row, column = (max(estimate.value, 0.0) for estimate in (layer.row, layer.column))
    where = (
        f"A linear map reads a patch's row and column out of it with R2 {row:.2f} and {column:.2f} (1 is perfect, 0 "
    )
    where += "nothing)."
    name = report.model
    calibrate = f"timm-dvt calibrate --model {name} --images PHOTOS --out calibrated"
    # What a denoiser leaves is no measure for blocks that have none; the last block is what the features are made of.
    blocks = [block for block in report.layers if not (block.final or block.denoised) and block.block != off.block]
    inner = max(blocks, key=lambda block: block.share.value, default=off)
    if inner.share.value > max(MORE * off.share.value, SMALL) and not inner.share.is_chance:
        where += (
            f" If you use earlier blocks: most of it, {percent(inner.share)}, is in block {inner.block} (calibrate "
        )
        where += f"takes --layers {inner.block} -1)."
    if share.is_chance or share.value < SMALL:
        if not readable and share.value > max(share.chance, SMALL):
            return Finding(
                "note",
                f"{what} {where} So few images do not tell the features' {percent(share)} from nothing: inspect more "
                "(--images, --views).",
            )
        if not readable:
            return Finding(
                "nothing", f"{what} {where} There is nothing for a denoiser to remove from the final features."
            )
        return Finding(
            "position",
            f"{what} {where} So a place can be read, but takes up little of the features. If it disturbs your use, "
            "calibrate with the method project, which takes out the directions that tell it.",
            (f"{calibrate} --method project",),
        )
    pattern = "a fine grid" if layer.grid.high.value > 0.5 else "gradients and blobs"
    if layer.grid.low.value < 0.5 and layer.grid.high.value <= 0.5:
        pattern = "patterns of a few patches"
    shown = f"The same pattern, mostly {pattern}, lies over every image."
    if on is not None:
        return Finding(
            "position",
            f"{what} {where} {shown} What the denoiser leaves can be taken off without training.",
            (f"{calibrate} --method leftover",),
        )
    cost = PASSES * report.seconds
    effect = (
        "It usually leaves a third to two thirds of the share" if report.trial is None else "What it did here is below"
    )
    advice = f"Calibrating takes minutes and no training. {effect}."
    commands = [calibrate]
    if share.value >= LARGE:
        advice += (
            f" A trained denoiser helps segmentation more; here it takes {duration(cost)} to {duration(2 * cost)}."
        )
        commands.append(f"python -m training.make_denoiser --model {name} --images PHOTOS --out mine")
    return Finding("position", f"{what} {where} {shown} {advice}", tuple(commands))


def _blank(report: Inspection, off: Layer, on: Layer) -> Iterator[Finding]:
    """Whether a denoiser makes the pattern of images without content stronger."""
    kinds = {"of one color": (off.flat.pattern, on.flat.pattern), "of noise": (off.noise.pattern, on.noise.pattern)}
    for kind, (before, after) in kinds.items():
        grew = after.value - before.value > 2 * (before.error**2 + after.error**2) ** 0.5
        if grew and after.value > STRONGER**2 * before.value:
            times = (after.value / before.value) ** 0.5 if before.value > 0 else float("inf")
            yield Finding(
                "blank",
                f"In images {kind} the denoiser makes the pattern {times:.1f} times stronger, so walls and skies that "
                "fill an image get worse. This gives it a gate for blank images, unless it has one, and takes off what "
                "it leaves.",
                (f"timm-dvt calibrate --model {report.model} --images PHOTOS --out calibrated --method leftover",),
            )


def _outliers(report: Inspection) -> Finding:
    layers = [layer for layer in report.layers if not layer.denoised and _stands_out(layer)]
    if not layers:
        near = [layer for layer in report.layers if not layer.denoised and layer.outliers.count]
        off = " with the denoiser off" if any(layer.denoised for layer in report.layers) else ""
        words = f"No outlier tokens: no second kind of norms stands apart in the features{off}."
        if near:
            layer = max(near, key=lambda layer: layer.outliers.ratio)
            words = (
                f"No outlier tokens: of the norms of {layer.name} {percent(layer.outliers.share)} lie beyond a valley, "
                f"at {layer.outliers.ratio:.2f} times the usual norm; "
            )
            few = "these images do not tell so many from chance."
            words += few if layer.outliers.ratio >= STANDS_OUT else f"outliers have {STANDS_OUT:g} times and more."
        return Finding("nothing", words)
    # The features' norm hides what stands out; the last block shows it.
    layer = layers[-1] if not layers[-1].final or len(layers) == 1 else layers[-2]
    outliers = layer.outliers
    words = (
        f"Outlier tokens: {percent(outliers.share)} of the patches ({layer.name}) have {outliers.ratio:.1f} times "
        "the usual norm."
    )
    if outliers.low_content is not None:
        less = outliers.low_content.value - 2 * outliers.low_content.error > 0.5
        words += (
            " They sit in patches with less content than others." if less else " Low content does not explain them."
        )
    if outliers.place is not None:
        words += (
            f" Their place explains {percent(outliers.place)} of where they are."
            if not outliers.place.is_chance
            else " They are not bound to places."
        )
    last = [one for one in report.layers if not one.denoised and one.block == report.layer().block]
    if not any(one in layers for one in last):
        return Finding("note", f"{words} The last block and the features have none.")
    words += (
        " This is not what a denoiser of position removes: take a model trained with registers (in timm *_reg4_*), or "
        "add registers at test time (Vision Transformers Don't Need Trained Registers, arXiv 2506.08010)."
    )
    other = _with_registers(report.model)
    return Finding("outliers", words, (f"timm-dvt inspect --model {other} --images PHOTOS",) if other else ())


def _with_registers(name: str) -> str | None:
    """timm's model of that name that was trained with registers, if there is one."""
    known = timm.list_pretrained("*_reg4_*")
    other = re.sub(r"(_patch\d+)_", r"\1_reg4_", name.replace("_dvt", ""), count=1)
    return other if other in known else None


def _is_read(estimate: Estimate) -> bool:
    beyond = estimate.value > max(BEYOND_DOUBT, 2 * estimate.error)
    return estimate.value > READABLE and (beyond or not estimate.is_chance)


def _stands_out(layer: Layer) -> bool:
    outliers = layer.outliers
    least = max(LEAST_OUTLIERS, outliers.share.chance, 2 * outliers.share.error)
    enough = outliers.share.value > least and outliers.robust_share.value > LEAST_OUTLIERS
    return enough and outliers.ratio >= STANDS_OUT


def percent(share: Estimate) -> str:
    """A share with its standard error."""
    digits = 1 if share.value >= 0.01 else 2
    return f"{100 * share.value:.{digits}f} ± {100 * share.error:.{digits}f}%"


def duration(seconds: float) -> str:
    """A time in words."""
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, size = next(((unit, size) for unit, size in units if seconds >= 1.5 * size), units[-1])
    return f"{seconds / size:.{int(seconds < 3 * size)}f} {unit}"
