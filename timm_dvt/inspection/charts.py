"""The curve and the histograms of the page, as SVG in the page's own colors."""

from collections.abc import Sequence
from html import escape

import numpy as np

from timm_dvt.inspection.results import Layer, Outliers

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 44, 34
NARROW = 400  # a histogram, of which several stand beside each other


def shares(layers: Sequence[Layer]) -> str:
    """Position's share over the blocks and the features, with bars of two errors and the line of chance."""
    columns = [layer for layer in layers if not layer.denoised]
    place = {(layer.block, layer.final): LEFT + 24 + i * _pitch(len(columns)) for i, layer in enumerate(columns)}
    top = max(max(layer.share.value + 2 * layer.share.error, layer.share.chance) for layer in layers)
    ticks = _ticks(100 * max(top, 1e-4))

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * min(max(100 * share / ticks[-1], 0.0), 1.0)

    parts = [_axis(tick, y(tick / 100), "%") for tick in ticks]
    parts += [
        f'<text x="{place[layer.block, layer.final]:.1f}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{'features' if layer.final else layer.block}</text>"
        for layer in columns
    ]
    line = [f"{place[layer.block, layer.final]:.1f},{y(layer.share.chance):.1f}" for layer in columns]
    parts.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="currentColor" stroke-dasharray="4 4"/>')
    for kind, denoised in (("off", False), ("on", True)):
        these = [layer for layer in layers if layer.denoised == denoised]
        if not these:
            continue
        at = [(place[layer.block, layer.final], layer.share) for layer in these]
        drawn = f'<g class="{kind}" stroke="currentColor" fill="currentColor">'
        if not denoised:
            line = [f"{x:.1f},{y(share.value):.1f}" for x, share in at]
            drawn += f'<polyline points="{" ".join(line)}" fill="none" stroke-width="2"/>'
        for (x, share), layer in zip(at, these):
            low, high = share.value - 2 * share.error, share.value + 2 * share.error
            drawn += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
            title = f"<title>{escape(f'{layer.name}: {share}')}</title>"
            drawn += f'<circle cx="{x:.1f}" cy="{y(share.value):.1f}" r="4">{title}</circle>'
        parts.append(drawn + "</g>")
    if any(layer.denoised for layer in layers):
        for number, (kind, words) in enumerate((("off", "denoiser off"), ("on", "denoiser on"))):
            parts.append(
                f'<g class="{kind}"><circle cx="{LEFT + 12 + 110 * number}" cy="2" r="4" fill="currentColor"/></g>'
                f'<text class="ink" x="{LEFT + 20 + 110 * number}" y="6">{words}</text>'
            )
    return _svg(parts, "Position's share by block")


def norms(edges: np.ndarray, counts: np.ndarray, outliers: Outliers) -> str:
    """The histogram of norms, counts and norms on logarithmic scales; outliers are red."""
    left, right = np.log(edges[0]), np.log(edges[-1])
    most = np.log1p(counts.max())

    def x(norm: float) -> float:
        return LEFT + (NARROW - LEFT) * (np.log(norm) - left) / (right - left)

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 12) * np.log1p(count) / most

    ticks = [10**power for power in range(int(np.log10(counts.max())) + 1)]
    parts = [_axis(tick, y(tick), "", NARROW) for tick in ticks]
    for low, high, count in zip(edges, edges[1:], counts):
        marked = outliers.cut is not None and (low * high) ** 0.5 > outliers.cut
        parts.append(
            f'<rect class="{"marked" if marked else "bar"}" '
            f'x="{x(low):.1f}" width="{max(x(high) - x(low) - 1, 1):.1f}" '
            f'y="{y(count):.1f}" height="{HEIGHT - BOTTOM - y(count):.1f}"/>'
        )
    for cut, style in ((outliers.cut, "2 3"), (outliers.robust_cut, "none")):
        if cut is not None and edges[0] < cut < edges[-1]:
            parts.append(
                f'<line x1="{x(cut):.1f}" x2="{x(cut):.1f}" y1="12" y2="{HEIGHT - BOTTOM}" stroke="currentColor" '
                f'stroke-dasharray="{style}"/>'
            )
    for anchor, norm in zip(("middle", "middle", "middle", "middle", "end"), np.geomspace(edges[0], edges[-1], 5)):
        parts.append(f'<text x="{x(norm):.1f}" y="{HEIGHT - 12}" text-anchor="{anchor}">{norm:.3g}</text>')
    return _svg(parts, "Histogram of norms", NARROW)


def _pitch(columns: int) -> float:
    return (WIDTH - LEFT - 60) / max(columns - 1, 1)


def _ticks(top: float) -> list[float]:
    """From 0 to the top or above it, in at most five steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(top / 5))
    step = next(power * times for times in (1, 2, 5, 10) if power * times * 5 >= top)
    return [float(f"{step * i:.6g}") for i in range(int(np.ceil(top / step)) + 1)]


def _axis(tick: float, y: float, unit: str, width: int = WIDTH) -> str:
    return (
        f'<line x1="{LEFT}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}{unit}</text>'
    )


def _svg(parts: Sequence[str], name: str, width: int = WIDTH) -> str:
    return f'<svg viewBox="0 -8 {width} {HEIGHT + 8}" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'
