"""The page of an inspection: one HTML file with its pictures inside it."""

from dataclasses import dataclass
from importlib import resources

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from PIL import Image

from timm_dvt.inspection import charts
from timm_dvt.inspection.findings import percent
from timm_dvt.inspection.results import Estimate, Inspection, Layer
from timm_dvt.viewer import pairs
from timm_dvt.viewer.colors import heat, principal_colors
from timm_dvt.viewer.page import url
from timm_dvt.viewer.panel import as_image

SHOWN = 320  # pixels of the photograph
MOST_MAPS = 13  # of blocks
HEADINGS = (
    "tokens",
    "position, %",
    "row R2",
    "column R2",
    "one color, %",
    "noise, %",
    "alike",
    "outliers, %",
    "robust, %",
    "fine grid, %",
)
NOTES = (
    "± is one standard error. position: its share of the variance within photographs. R2: of a linear map from tokens "
    "to the place, on images held out. one color, noise: the variance of the pattern in such images, in percent of "
    "that within photographs, denoiser off. alike: correlation of the mean maps of photographs and of images of one "
    "color. outliers: patches whose norm lies above the valley of the histogram; robust: beyond median and absolute "
    "deviation. fine grid: energy of the mean map at wavelengths below 4 patches; white noise has the chance."
)


@dataclass(frozen=True)
class Cell:
    """A picture with its name and words."""

    name: str
    words: str
    url: str
    map: bool = True


def page(report: Inspection) -> str:
    """The page, as HTML."""
    assets = resources.files("timm_dvt") / "assets"
    read = {name: (assets / name).read_text(encoding="utf-8") for name in ("inspect.html", "page.css")}
    template = Environment(autoescape=True, trim_blocks=True).from_string(read["inspect.html"])
    drawn = [layer for layer in report.layers if layer.final or _is_drawn(layer, report)]
    return template.render(
        title=f"What {report.model} knows of position",
        lead=lead(report),
        style=Markup(read["page.css"]),
        findings=report.findings,
        means=_means(report),
        has_denoiser=any(layer.denoised for layer in report.layers),
        curve=Markup(charts.shares(report.layers)),
        norms=[_norms(report, layer) for layer in drawn],
        places=[_place(report, layer) for layer in drawn if layer.outliers.cut is not None],
        photograph=_photograph(report),
        headings=HEADINGS,
        rows=[row(layer) for layer in report.layers],
        notes=NOTES,
    )


def lead(report: Inspection) -> str:
    """What was looked at, in a sentence."""
    images = f"{report.images} images" if report.images else "blank and noise images"
    images = "parts of the two photographs that come with the package" if report.parts else images
    height, width = report.size
    return (
        f"{report.kind}, {height} x {width} pixels, {report.views} views of {images} and {report.blanks} blank images, "
        f"on {report.device}."
    )


def row(layer: Layer) -> list[tuple[str, str]]:
    """A layer's numbers under `HEADINGS`, each with what chance gives."""
    of_percent = (layer.flat.pattern, layer.noise.pattern, layer.outliers.share, layer.outliers.robust_share)
    blank = [_cell(estimate, 100) for estimate in of_percent]
    place = [_cell(estimate) for estimate in (layer.row, layer.column, layer.flat.alike)]
    share, grid = _cell(layer.share, 100), _cell(layer.grid.high, 100)
    return [(layer.name, ""), share, *place[:2], *blank[:2], place[2], *blank[2:], grid]


def _cell(number: Estimate, times: float = 1) -> tuple[str, str]:
    digits = 2 if abs(number.value * times) < 10 else 1
    value, error, chance = (f"{times * part:.{digits}f}" for part in (number.value, number.error, number.chance))
    return f"{value} ± {error}", f"chance {chance}"


def _is_drawn(layer: Layer, report: Inspection) -> bool:
    """The last block, and the one in which most outliers stand out."""
    blocks = [other for other in report.layers if not other.final]
    most = max(blocks, key=lambda other: (other.outliers.share.value, other.block), default=layer)
    return layer in (most, *blocks[-1:])


def _means(report: Inspection) -> list[Cell]:
    names = [layer.name for layer in report.layers if layer.final]
    kinds = {"photographs": report.pictures.means, "one color": report.pictures.flat}
    layers = {layer.name: layer for layer in report.layers}
    maps = [pair[name] for name in names for pair in kinds.values()]
    cells, raw = [], {}
    if maps[0].shape[-1] < 3:
        return []
    for place, (centered, projection) in enumerate(zip(*pairs.patterns(maps))):
        name, kind = names[place // 2], list(kinds)[place % 2]
        if place < 2:
            raw[kind] = projection
        layer = layers[name]
        share = layer.share if kind == "photographs" else layer.flat.pattern
        words = f"{percent(share)} of the variance within photographs"
        if kind == "one color":
            words += f"; correlation with the mean of photographs {layer.flat.alike.value:.2f}"
        cells.append(Cell(f"{kind}, {name}", words, _map(raw[kind].colors(centered))))
    return cells


def _norms(report: Inspection, layer: Layer) -> dict[str, str]:
    outliers = layer.outliers
    words = "no second kind"
    if outliers.cut:
        words = f"{outliers.count} of {outliers.patches} patches above the cut at {outliers.cut:.3g}"
    words += f"; {outliers.robust_count} beyond {outliers.robust_cut:.3g}, the robust cut"
    svg = charts.norms(*report.pictures.norms[layer.name], outliers)
    return {"name": layer.name, "words": words, "svg": Markup(svg)}


def _place(report: Inspection, layer: Layer) -> Cell:
    places, outliers = report.pictures.places[layer.name], layer.outliers
    words = f"at most in {100 * places.max():.1f}% of the views"
    if (border := outliers.border) is not None:
        words += f"; {100 * border.value:.0f}% in the outermost ring (chance {100 * border.chance:.0f}%)"
    return Cell(layer.name, words, _map(heat(places, 0.0, float(places.max()))))


def _photograph(report: Inspection) -> list[Cell]:
    shown = as_image(report.pictures.photograph)
    shown.thumbnail((SHOWN, SHOWN))
    cells = [Cell("photograph", "as the model sees it", url(shown, "JPEG"), map=False)]
    blocks = [layer.name for layer in report.layers if not layer.final]
    step = -(-len(blocks) // MOST_MAPS)
    kept = {*blocks[::-1][:: step or 1], *(layer.name for layer in report.layers if layer.final)}
    raw = report.pictures.maps["features"]
    for layer in report.layers:
        if layer.name in kept and raw.shape[-1] >= 3:
            maps = report.pictures.maps[layer.name]
            colors = pairs.colors(raw, maps)[1] if layer.final and layer.denoised else principal_colors(maps)
            cells.append(Cell(layer.name, f"position {100 * layer.share.value:.2g}%", _map(colors)))
    return cells


def _map(colors: np.ndarray) -> str:
    """One pixel a patch; the browser enlarges it without smoothing."""
    image: Image.Image = as_image(colors)
    return url(image)
