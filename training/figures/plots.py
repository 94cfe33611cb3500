"""Lines of numbers along an axis, a plot a number, with one legend below all of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from timm_dvt.viewer.colors import PALETTE
from timm_dvt.viewer.panel import FAINT, INK

# Those of the palette that are dark enough for a line on white, neighbors far from each other.
COLORS = [tuple(PALETTE[i]) for i in (0, 6, 2, 4, 8, 3, 7)]
ACROSS = 3  # plots beside each other
MARKERS = "osD^vP*"


@dataclass(frozen=True)
class Line:
    """Points of one kind of models in one state.

    Attributes:
        family: decides color and marker, and stands in the legend.
        state: stands there too.
        style: of matplotlib's lines.
        faint: for what others measured.
        points: (x, mean, spread) of each.
    """

    family: str
    state: str
    style: str
    faint: bool
    points: Sequence[tuple[float, float, float]]


def draw_lines(plots: Mapping[str, Sequence[Line]], axis: str) -> bytes:
    """A PNG with a plot for each title, whose x, on a logarithmic scale, is the same thing in all.

    Args:
        plots: lines by the name of what they are of.
        axis: the name of what x is.
    """
    across = min(ACROSS, len(plots))
    down = -(-len(plots) // across)
    figure = Figure(figsize=(max(4.2 * across, 5.5), 3.2 * down + 0.6), layout="constrained", facecolor="white")
    families = sorted({line.family for lines in plots.values() for line in lines})
    ink, faint = (tuple(part / 255 for part in color) for color in (INK, FAINT))
    labels: dict[str, Any] = {}
    for place, (title, lines) in enumerate(plots.items(), start=1):
        plot = figure.add_subplot(down, across, place)
        for line in sorted(lines, key=lambda line: (line.family, line.state)):
            xs, means, spreads = zip(*sorted(line.points))
            kind = families.index(line.family)
            drawn = plot.errorbar(
                xs,
                means,
                yerr=spreads if any(spreads) else None,
                marker=MARKERS[kind % len(MARKERS)],
                markersize=5,
                capsize=3,
                color=COLORS[kind % len(COLORS)],
                linestyle=line.style,
                alpha=0.55 if line.faint else 1,
            )
            labels.setdefault(f"{line.family}, {line.state}".removeprefix(", "), drawn)
        ticks = sorted({x for line in lines for x, *_ in line.points})
        plot.set_xscale("log")
        plot.set_xticks(ticks, [f"{x:g}" for x in ticks])
        plot.minorticks_off()
        plot.set_xlabel(axis, color=ink)
        plot.set_title(title, loc="left", fontsize=11, color=ink)
        plot.grid(alpha=0.25)
        plot.tick_params(colors=faint)
        plot.spines[["top", "right"]].set_visible(False)
    legend = figure.legend([*labels.values()], [*labels], loc="outside lower left", ncols=min(across, 2), fontsize=8)
    legend.set_frame_on(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
