"""The page's parts as HTML: what a model saw of an image, with the denoiser off and on. Looks in, text out."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from timm_dvt.viewer import pairs as looks
from timm_dvt.viewer.colors import SCALE
from timm_dvt.viewer.demo import EXPLANATION, resizing
from timm_dvt.viewer.panel import Shown, as_image, draw

STATES = ("denoiser off", "denoiser on")
KINDS = {"picture.png": "Picture", "maps.npy": "Maps, .npy", "maps.safetensors": "Maps, .safetensors"}
SOURCE = "https://arxiv.org/abs/2401.02957"


@dataclass(frozen=True)
class Look:
    """What a model saw of an image.

    Attributes:
        model, device: their names.
        original: what was chosen, reduced. image: as the model saw it.
        off, on: patch tokens (H, W, C).
    """

    model: str
    device: str
    original: Image.Image
    image: Image.Image
    off: np.ndarray
    on: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.off.shape[0], self.off.shape[1]

    def clamped(self, row: object, column: object) -> tuple[int, int]:
        """The patch nearest to what a visitor's browser asked for; the one in the middle if it asked for no number."""
        if not isinstance(row, int) or not isinstance(column, int):
            return looks.center(self.off)
        return min(max(row, 0), self.grid[0] - 1), min(max(column, 0), self.grid[1] - 1)


# ---- the parts, from top to bottom


def intro() -> str:
    return (
        f'<header class="dvt-intro"><h1>What a Vision Transformer sees, with its noise and without</h1>'
        f'<p>{" ".join(EXPLANATION)} (<a href="{SOURCE}">Denoising Vision Transformers</a>, ECCV 2024)</p></header>'
    )


def notice(text: str) -> str:
    """A message that a screen reader reads out; nothing for no text."""
    return f'<p class="dvt-notice" role="alert">{escape(text)}</p>' if text else ""


def overview(look: Look) -> str:
    """The photograph with the facts, and both maps in one frame with a bar to drag."""
    off, on = (url(as_image(colors)) for colors in looks.colors(look.off, look.on))
    rows, columns = look.grid
    change = resizing(look.original, look.image)
    facts = {
        "variant": look.model,
        "image": f"{look.image.width} x {look.image.height} pixels{f' ({change})' if change else ''}",
        "features": f"{rows} x {columns} patches, {look.off.shape[2]} channels",
    }
    return (
        f'<section class="dvt-row dvt-overview"><div class="dvt-text">{_photograph(look)}<dl>'
        + "".join(f"<dt>{escape(name)}</dt><dd>{_breakable(value)}</dd>" for name, value in facts.items())
        + f'</dl></div><div><div class="dvt-compare dvt-map" style="--at: 50%; {_aspect(look)}">'
        f'<img src="{off}" alt="Features as colors, {STATES[0]}">'
        f'<img class="dvt-over" src="{on}" alt="Features as colors, {STATES[1]}">'
        f'<input class="dvt-bar" type="range" min="0" max="100" value="50" aria-label="Divider, in percent of the '
        f'width: left of it the denoiser is off, right of it on"><span class="dvt-line"></span>'
        f'<span class="dvt-left">{STATES[0]}</span><span class="dvt-right">{STATES[1]}</span></div>'
        f'<p class="dvt-hint">Features as colors: the three principal '
        f"components of both maps together. Drag the bar, or use the arrow keys.</p></div></section>"
    )


def alike(look: Look, patch: tuple[int, int]) -> str:
    """The photograph and both maps of similarity, in each of which a patch can be chosen."""
    pair, scale = looks.similarities(look.off, look.on, patch)
    name = looks.WORDS["similarities"][0].capitalize()
    at = f"row {patch[0] + 1} of {look.grid[0]}, column {patch[1] + 1} of {look.grid[1]}"
    return (
        f'<section class="dvt-row" style="--row: {patch[0]}; --column: {patch[1]}; --rows: {look.grid[0]}; '
        f'--columns: {look.grid[1]}"><div class="dvt-text"><h2>{name}</h2><p>Of every patch to the one in the red '
        f"frame ({at}). Click another in any of the three pictures, or move the frame with the arrow keys.</p>"
        f"{_pick(_photograph(look), look, 'Photograph', at)}{_scale(scale)}</div>"
        + "".join(_figure(_pick(_map(c, look, f"{name}, {s}"), look, s, at), s) for c, s in zip(pair, STATES))
        + "</section>"
    )


def heading(kind: str, text: str) -> str:
    """The words of a part whose maps are elsewhere."""
    return f'<div class="dvt-heading"><h2>{looks.WORDS[kind][0].capitalize()}</h2><p>{text}</p></div>'


def groups(look: Look, clusters: int) -> str:
    """Both maps in clusters."""
    pair, agreement = looks.groups(look.off, look.on, clusters)
    if agreement < looks.AGREEING:
        return (
            f'<p class="dvt-unsure">k-means finds other groups whenever it starts elsewhere (only {agreement:.0%} of '
            f"the patches keep theirs), so that {clusters} groups would show chance. Choose another number.</p>"
        )
    return f'<section class="dvt-pair">{_both(look, pair, STATES, f"{clusters} groups")}</section>'


def rest(look: Look) -> str:
    """The norms, and what was removed."""
    lengths, removed = looks.lengths(look.off, look.on), looks.removed(look.off, look.on)
    parts = [
        _section(
            "removed",
            "Off minus on. What depends on the place and not on the image is noise.",
            removed[1],
            _both(look, removed[0], ("as colors", "its length"), "Removed"),
        )
    ]
    if not looks.have_one_length(look.off, look.on):  # two maps alike would say nothing
        words = "Their norm, both maps on one scale. Single bright patches are outlier tokens."
        parts.insert(0, _section("lengths", words, lengths[1], _both(look, lengths[0], STATES, "Length")))
    return "".join(parts)


def downloads(key: str, patch: tuple[int, int], clusters: int) -> str:
    """Links to the files of a look; the picture's shows the patch and the clusters that are on the page."""
    chosen = f"?row={patch[0]}&column={patch[1]}&clusters={clusters}"
    links = (f'<a href="dvt/{key}/{file}{chosen}" download>{label}</a>' for file, label in KINDS.items())
    return f'<nav class="dvt-files" aria-label="Downloads"><span>Download</span>{"".join(links)}</nav>'


# ---- what can be downloaded


def file(look: Look, name: str, patch: tuple[int, int], clusters: int) -> bytes:
    """The content of one of `KINDS`: the demo's picture, or both maps, (2, H, W, C) or by name, float32."""
    content = io.BytesIO()
    if name == "picture.png":
        shown = Shown(look.image, look.off, look.on, ("", ""), patch, clusters)
        draw([shown], f"timm-dvt: {look.model}", EXPLANATION).save(content, "PNG")
        return content.getvalue()
    if name == "maps.npy":
        np.save(content, np.stack([look.off, look.on]))
        return content.getvalue()
    from safetensors.numpy import save

    return save({"off": np.ascontiguousarray(look.off), "on": np.ascontiguousarray(look.on)}, {"model": look.model})


# ---- pieces


def url(image: Image.Image, kind: str = "PNG") -> str:
    """An image as a data: URL, so that nothing of it lies in a file."""
    content = io.BytesIO()
    image.save(content, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def gradient() -> str:
    """The scale of lengths and similarities for a style sheet."""
    return ", ".join(f"rgb({', '.join(str(round(float(c) * 255)) for c in color)})" for color in SCALE)


def _section(kind: str, text: str, scale: looks.Scale, maps: str) -> str:
    words = f"<h2>{looks.WORDS[kind][0].capitalize()}</h2><p>{text}</p>"
    return f'<section class="dvt-row"><div class="dvt-text">{words}{_scale(scale)}</div>{maps}</section>'


def _both(look: Look, pair: Sequence[np.ndarray], captions: Sequence[str], name: str) -> str:
    return "".join(_figure(_map(c, look, f"{name}, {s}"), s) for c, s in zip(pair, captions))


def _figure(content: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _map(colors: np.ndarray, look: Look, alt: str) -> str:
    """One pixel a patch; the browser enlarges it without smoothing."""
    picture = f'<img src="{url(as_image(colors))}" alt="{escape(alt)}">'
    return f'<div class="dvt-map" style="{_aspect(look)}">{picture}</div>'


def _photograph(look: Look) -> str:
    picture = f'<img src="{url(look.image, "JPEG")}" alt="The photograph, as the model sees it">'
    return f'<div class="dvt-photograph" style="{_aspect(look)}">{picture}</div>'


def _pick(content: str, look: Look, name: str, at: str) -> str:
    """A picture in which a patch can be chosen, with a frame around the one that is."""
    return (
        f'<div class="dvt-pick" tabindex="0" role="application" aria-label="{escape(name)}. Patch in {at}. Arrow keys '
        f'choose another." data-rows="{look.grid[0]}" data-columns="{look.grid[1]}">{content}'
        f'<span class="dvt-frame"></span></div>'
    )


def _scale(scale: looks.Scale) -> str:
    low, high = (f"{end:.3g}" for end in scale)
    return f'<div class="dvt-scale"><span>{low}</span><i></i><span>{high}</span></div>'


def _breakable(name: str) -> str:
    """A name that may go on in the next line after an underscore or a dot."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _aspect(look: Look) -> str:
    return f"aspect-ratio: {look.image.width} / {look.image.height}"
