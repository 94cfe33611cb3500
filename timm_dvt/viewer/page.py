"""The page's parts as HTML: what a model saw of an image, with the denoiser off and on. Comparisons in, text out."""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from timm_dvt.errors import UserError, too_little_memory
from timm_dvt.version import REPOSITORY
from timm_dvt.viewer import pairs
from timm_dvt.viewer.colors import SCALE, principal_colors
from timm_dvt.viewer.demo import EXPLANATION, resizing
from timm_dvt.viewer.examples import on_position
from timm_dvt.viewer.panel import Shown, as_image, draw

STATES = ("denoiser off", "denoiser on")
KINDS = {"picture.png": "Picture", "maps.npy": "Maps, .npy", "maps.safetensors": "Maps, .safetensors"}
SOURCE, TIMM = "https://arxiv.org/abs/2401.02957", "https://github.com/huggingface/pytorch-image-models"


@dataclass(frozen=True)
class Comparison:
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
            return pairs.center(self.off)
        return min(max(row, 0), self.grid[0] - 1), min(max(column, 0), self.grid[1] - 1)


# ---- the parts, from top to bottom


def intro() -> str:
    links = {"Paper (ECCV 2024)": SOURCE, "timm": TIMM} | ({} if "/OWNER/" in REPOSITORY else {"Code": REPOSITORY})
    listed = " ".join(f'<a href="{address}">{name}</a>' for name, address in links.items())
    return (
        f'<header class="dvt-intro"><h1>timm-dvt</h1><p>{" ".join(EXPLANATION)}</p>'
        f"<p><code>pip install git+{REPOSITORY}</code> {listed}</p></header>"
    )


def notice(text: str) -> str:
    """A message that a screen reader reads out; nothing for no text."""
    return f'<p class="dvt-notice" role="alert">{escape(text)}</p>' if text else ""


def sentence(error: UserError) -> str:
    """A message as a sentence in one line."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def unforeseen(error: Exception) -> str:
    """What a visitor can do about an error that nobody thought of."""
    if too_little_memory(error):
        return "The machine that serves this page has too little memory for this. Take a smaller variant or image."
    return (
        f"This went wrong ({type(error).__name__}; the server's terminal says more). Try again, or take another image."
    )


def overview(comparison: Comparison) -> str:
    """The photograph with the facts, and both maps in one frame with a bar to drag and a button that flips them.

    The bar stands between two columns of patches, so that no patch is seen in both states.
    """
    off, on = (url(as_image(colors)) for colors in pairs.colors(comparison.off, comparison.on))
    rows, columns = comparison.grid
    change = resizing(comparison.original, comparison.image)
    facts = {
        "variant": comparison.model,
        "image": f"{comparison.image.width} x {comparison.image.height} pixels{f' ({change})' if change else ''}",
        "features": f"{rows} x {columns} patches, {comparison.off.shape[2]} channels",
        "computed": f"on {comparison.device}",
    }
    middle = columns // 2
    maps = (
        f'<div class="dvt-compare dvt-map" style="--at: {100 * middle / columns:.4f}%; {_aspect(comparison.image)}">'
        f'<img src="{off}" alt="Features as colors, {STATES[0]}">'
        f'<img class="dvt-over" src="{on}" alt="Features as colors, {STATES[1]}">'
        f'<input class="dvt-bar" type="range" min="0" max="{columns}" value="{middle}" aria-label="Divider, in columns '
        f'of patches: left of it the denoiser is off, right of it on"><span class="dvt-line"></span>'
        f'<span class="dvt-left">{STATES[0]}</span><span class="dvt-right">{STATES[1]}</span></div>'
        '<p class="dvt-flip"><button class="dvt-toggle" type="button">Flip off and on <kbd>t</kbd></button></p>'
    )
    position = on_position(comparison.image)
    hint = (
        f"<strong>{position}</strong> " if position else ""
    ) + "Features as colors: the three principal components of both maps together. Drag the bar, or use the arrow keys."
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{_breakable(value)}</dd>" for name, value in facts.items())
    return _overview(_photograph(comparison.image), f"<dl>{listed}</dl>", maps, hint)


def pending(image: Image.Image, off: np.ndarray | None = None) -> str:
    """What is seen of an overview meanwhile: the photograph, the map with the denoiser off once it is there."""
    waits, maps = STATES[0], ""
    if off is not None:
        waits = STATES[1]
        picture = f'<img src="{url(as_image(principal_colors(off)))}" alt="Features as colors, {STATES[0]}">'
        maps = f'<div class="dvt-map" style="{_aspect(image)}">{picture}<span class="dvt-left">{STATES[0]}</span></div>'
    bar = f'<progress max="3" value="{1 if off is None else 2}" aria-label="Progress"></progress>'
    return _overview(_photograph(image), "", f"{maps}{bar}", f"Computing with the {waits} ...")


def _overview(photograph: str, facts: str, maps: str, hint: str) -> str:
    return (
        f'<section class="dvt-row dvt-overview"><div class="dvt-text">{photograph}{facts}</div>'
        f'<div>{maps}<p class="dvt-hint">{hint}</p></div></section>'
    )


def alike(comparison: Comparison, patch: tuple[int, int]) -> str:
    """The photograph and both maps of similarity, in each of which a patch can be chosen."""
    pair, scale = pairs.similarities(comparison.off, comparison.on, patch)
    name = pairs.WORDS["similarities"]
    at = f"row {patch[0] + 1} of {comparison.grid[0]}, column {patch[1] + 1} of {comparison.grid[1]}"
    maps = (_pick(_map(c, comparison, f"{name}, {s}"), comparison, s, at) for c, s in zip(pair, STATES))
    figures = "".join(map(_figure, maps, STATES))
    return (
        f'<section class="dvt-row" style="--row: {patch[0]}; --column: {patch[1]}; --rows: {comparison.grid[0]}; '
        f'--columns: {comparison.grid[1]}"><div class="dvt-text"><h2>{name}</h2><p>Of every patch to the one in the '
        f"red frame ({at}). Click another in any of the three pictures, or move the frame with the arrow keys.</p>"
        f"{_pick(_photograph(comparison.image), comparison, 'Photograph', at)}{_scale(scale)}</div>"
        f"{figures}</section>"
    )


def heading(kind: str, text: str) -> str:
    """The words of a part whose maps are elsewhere."""
    return f'<div class="dvt-heading"><h2>{pairs.WORDS[kind]}</h2><p>{text}</p></div>'


def groups(comparison: Comparison, clusters: int) -> str:
    """Both maps in clusters."""
    pair, agreement = pairs.groups(comparison.off, comparison.on, clusters)
    if agreement < pairs.AGREEING:
        return (
            f'<p class="dvt-unsure">k-means finds other groups when it starts elsewhere (only {agreement:.0%} of the '
            f"patches keep theirs), so that {clusters} groups would show chance. Choose another number.</p>"
        )
    return f'<section class="dvt-pair">{_both(comparison, pair, STATES, f"{clusters} groups")}</section>'


def rest(comparison: Comparison) -> str:
    """The norms, and what was removed."""
    lengths, removed = pairs.lengths(comparison.off, comparison.on), pairs.removed(comparison.off, comparison.on)
    parts = [
        _section(
            "removed",
            "Off minus on. What depends on the place and not on the image is noise.",
            removed[1],
            _both(comparison, removed[0], ("as colors", "its length"), "Removed"),
        )
    ]
    if not pairs.have_one_length(comparison.off, comparison.on):  # two maps alike would say nothing
        words = "Their norm, both maps on one scale. Single bright patches are outlier tokens."
        parts.insert(0, _section("lengths", words, lengths[1], _both(comparison, lengths[0], STATES, "Length")))
    return "".join(parts)


def downloads(key: str, title: str, model: str, patch: tuple[int, int], clusters: int) -> str:
    """Links to the files of a comparison, named after the image and the variant; the picture's shows the patch and the
    clusters that are on the page."""
    chosen = f"?row={patch[0]}&column={patch[1]}&clusters={clusters}"
    stem = re.sub(r"[^\w.-]+", "-", f"{title}_{model}")[-150:].strip("-.")
    links = (
        f'<a href="dvt/{key}/{file}{chosen}" download="{stem}_{file}">{label}</a>' for file, label in KINDS.items()
    )
    return f'<nav class="dvt-files" aria-label="Downloads"><span>Download</span>{"".join(links)}</nav>'


# ---- what can be downloaded


def file(comparison: Comparison, name: str, patch: tuple[int, int], clusters: int) -> bytes:
    """The content of one of `KINDS`: the demo's picture, or both maps, (2, H, W, C) or by name, float32."""
    content = io.BytesIO()
    if name == "picture.png":
        shown = Shown(comparison.image, comparison.off, comparison.on, ("", ""), patch, clusters)
        draw([shown], f"timm-dvt: {comparison.model}", EXPLANATION).save(content, "PNG")
        return content.getvalue()
    if name == "maps.npy":
        np.save(content, np.stack([comparison.off, comparison.on]))
        return content.getvalue()
    from safetensors.numpy import save

    maps = {"off": np.ascontiguousarray(comparison.off), "on": np.ascontiguousarray(comparison.on)}
    return save(maps, {"model": comparison.model})


# ---- pieces


def url(image: Image.Image, kind: str = "PNG") -> str:
    """An image as a data: URL, so that nothing of it lies in a file."""
    content = io.BytesIO()
    image.save(content, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def gradient() -> str:
    """The scale of lengths and similarities for a style sheet."""
    return ", ".join(f"rgb({', '.join(str(round(float(c) * 255)) for c in color)})" for color in SCALE)


def _section(kind: str, text: str, scale: pairs.Scale, maps: str) -> str:
    words = f"<h2>{pairs.WORDS[kind]}</h2><p>{text}</p>"
    return f'<section class="dvt-row"><div class="dvt-text">{words}{_scale(scale)}</div>{maps}</section>'


def _both(comparison: Comparison, pair: Sequence[np.ndarray], captions: Sequence[str], name: str) -> str:
    return "".join(_figure(_map(c, comparison, f"{name}, {s}"), s) for c, s in zip(pair, captions))


def _figure(content: str, caption: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{content}</figure>"


def _map(colors: np.ndarray, comparison: Comparison, alt: str) -> str:
    """One pixel a patch; the browser enlarges it without smoothing."""
    picture = f'<img src="{url(as_image(colors))}" alt="{escape(alt)}">'
    return f'<div class="dvt-map" style="{_aspect(comparison.image)}">{picture}</div>'


def _photograph(image: Image.Image) -> str:
    picture = f'<img src="{url(image, "JPEG")}" alt="The photograph, as the model sees it">'
    return f'<div class="dvt-photograph" style="{_aspect(image)}">{picture}</div>'


def _pick(content: str, comparison: Comparison, name: str, at: str) -> str:
    """A picture in which a patch can be chosen, with a frame around the one that is."""
    return (
        f'<div class="dvt-pick" tabindex="0" role="application" aria-label="{escape(name)}. Patch in {at}. Arrow keys '
        f'choose another." data-rows="{comparison.grid[0]}" data-columns="{comparison.grid[1]}" '
        f'style="{_ratio(comparison.image)}">{content}<span class="dvt-frame"></span></div>'
    )


def _scale(scale: pairs.Scale) -> str:
    low, high = (f"{end:.3g}" for end in scale)
    return f'<div class="dvt-scale"><span>{low}</span><i></i><span>{high}</span></div>'


def _breakable(name: str) -> str:
    """A name that may go on in the next line after an underscore or a dot."""
    return escape(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def _aspect(image: Image.Image) -> str:
    return f"aspect-ratio: {image.width} / {image.height}; {_ratio(image)}"


def _ratio(image: Image.Image) -> str:
    """What the style sheet bounds a portrait's width by, so that it fits the screen."""
    return f"--ratio: {image.width / image.height:.4f}"
