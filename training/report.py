"""Tables, plots and a page of the results that training.evaluate wrote: python -m training.report DIR

    DIR/report.md      rows: model and state, measured, and published where the paper or its repository say something;
                       below them all that is published of these backbones' linear probes
    DIR/fig7a.png      numbers over model size                                           (paper, Fig. 7)
    DIR/fig7b.png      over the number of training pairs: results tagged pairs=N
    DIR/fig7c.png      over the number of views in stage 1: results tagged views=N
    DIR/report.html    all of these as one page, for a browser

A figure needs results at two places of its axis, else it is left out and that is said. A number marked * is not of
the full protocol: images were limited or settings changed; its file in DIR says how. Of two results for the same
cell the later one counts.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_dvt.published import SEVEN, Key, Numbers, Source, numbers_for
from timm_dvt.variants import SUFFIXES
from training.common.shared_folder import OutputError, write_atomically
from training.figures.page import Picture, Section, Table, Text, page

# The paper's columns in its order (Tabs. 2, 3, 4, S3, 5, 1, and Fig. 3 in a number): task, number, heading.
COLUMNS = (
    ("linear-seg", "mIoU", "mIoU"),
    ("linear-seg", "mAcc", "mAcc"),
    ("depth", "delta1", "delta1"),
    ("depth", "AbsRel", "AbsRel"),
    ("depth", "RMSE", "RMSE"),
    ("detection", "mAP_11", "mAP, 11 points"),
    ("discovery", "CorLoc/", "CorLoc"),
    ("attentive-probe", "top1", "top-1"),
    ("knn-seg", "mIoU", "k-NN mIoU"),
    ("mic", "mic", "MIC"),
    ("mic", "mic_shuffled", "MIC by chance"),
    ("position", "share", "position %"),
    ("position", "zero_correlation", "zero-image corr."),
)
NAMES = {"voc": "VOC12", "ade20k": "ADE20k", "nyu": "NYUv2", "coco": "COCO", "imagefolder": "ImageFolder"}
STATES = ("raw", "denoised", "artifacts", "distilled")
_STYLES = {"raw": "--", "denoised": "-", "raw, published": ":", "denoised, published": "-."}


@dataclass
class Row:
    """What is known of one model in one state.

    Attributes:
        model: as it was named.
        state: "raw", "denoised", "artifacts" or "distilled".
        tags: pairs=N and so on.
        parameters: of the whole model.
        cells: {column: (mean, spread or None, whether of the full protocol)}.
    """

    model: str
    state: str
    tags: dict[str, str]
    parameters: int
    cells: dict[Key, tuple[float, float | None, bool]] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 if there is nothing to report."""
    head, tail = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m training.report",
        description=head,
        epilog=tail,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="where training.evaluate wrote its results (its --out)")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    try:
        rows = read_rows(folder)
        table = markdown(rows)
        print(table)
        write_atomically(folder / "report.md", table.encode())
        pictures: dict[str, bytes] = {}
        for name, axis in (("fig7a", "parameters"), ("fig7b", "pairs"), ("fig7c", "views")):
            picture = draw(rows, axis)
            if picture is None:
                print(f"{name}.png left out: fewer than two results differ in {axis}")
            else:
                pictures[f"against {axis}"] = picture
                write_atomically(folder / f"{name}.png", picture)
                print(f"{folder / name}.png")
        write_atomically(folder / "report.html", results_page(rows, pictures))
        print(folder / "report.html")
    except (ValueError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_rows(folder: Path) -> list[Row]:
    """The results of a folder by model, tags and state, in order of their names.

    Raises:
        ValueError: there is no result in the folder.
    """
    rows: dict[tuple, Row] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        result: dict[str, Any] = json.loads(path.read_text())
        if "task" not in result or "states" not in result:
            continue
        whole = not result["limit"] and not result["changed"]
        protocol = result.get("protocol", "fast")  # results before there were several do not say
        tags = result["tags"] | ({} if protocol == "fast" else {"protocol": protocol})
        for state, numbers in result["states"].items():
            key = (result["model"], tuple(sorted(tags.items())), state)
            row = rows.setdefault(key, Row(result["model"], state, tags, result["parameters"]))
            for name, summary in numbers.items():
                spread = summary["std"] if len(summary["values"]) > 1 else None
                row.cells[(result["task"], result["dataset"], name)] = (summary["mean"], spread, whole)
    if not rows:
        raise ValueError(f"no results in {folder}: python -m training.evaluate TASK --out {folder} writes them")
    return sorted(rows.values(), key=lambda row: (row.model, sorted(row.tags.items()), STATES.index(row.state)))


def columns_of(rows: Sequence[Row]) -> list[Key]:
    """The columns that have a measured number, in the paper's order."""
    present = list(dict.fromkeys(key for row in rows for key in row.cells))
    ordered = []
    for task, number, _ in COLUMNS:
        ordered += sorted(
            (key for key in present if key[0] == task and _is_number(key[2], number)),
            key=lambda key: [*NAMES, "stamps", "folder"].index(key[1]),
        )
    return ordered


def heading(key: Key) -> str:
    """A column's name: dataset and number."""
    task, dataset, number = key
    if task == "discovery":
        return f"{number.removeprefix('CorLoc/')} CorLoc"
    if (task, dataset) == ("detection", "voc"):
        return "VOC07 mAP (11 points)"
    title = next(title for t, n, title in COLUMNS if t == task and _is_number(number, n))
    return f"{NAMES.get(dataset, dataset)} {title}"


def tables(rows: Sequence[Row]) -> tuple[list[list[str]], list[list[str]]]:
    """What is measured, under each row what is published for it; and the published linear probes of the backbones.

    The first line of each is its headings; the second table may have no other.
    """
    columns = columns_of(rows)
    measured = [["model", "state", "source", *map(heading, columns)]]
    for row in rows:
        tags = "".join(f", {name} {value}" for name, value in sorted(row.tags.items()))
        cells = [_cell(*row.cells[key]) if key in row.cells else "" for key in columns]
        measured.append([f"`{row.model}`{tags}", row.state, "measured", *cells])
        measured += _published(["", row.state], numbers_for(backbone(row.model), kind(row)), columns)
    published = [["backbone", "features", "source", *map(heading, SEVEN)]]
    for name in sorted({backbone(row.model) for row in rows}):
        for features in ("raw", *SUFFIXES):
            published += _published([f"`{name}`", features], numbers_for(name, features), SEVEN)
    return measured, published


def notes(rows: Sequence[Row]) -> str:
    """What the cells' signs mean, where there are any."""
    short = any(not whole for row in rows for _, _, whole in row.cells.values())
    return "* not the full protocol: images limited or settings changed." if short else ""


def markdown(rows: Sequence[Row]) -> str:
    """The tables as Markdown."""
    measured, published = tables(rows)
    text = _table([measured[0], ["---"] * len(measured[0]), *measured[1:]])
    if notes(rows):
        text += f"\n\\{notes(rows)}\n"
    if len(published) > 1:
        lines = [published[0], ["---"] * len(published[0]), *published[1:]]
        text += "\nPublished linear probes:\n\n" + _table(lines)
    return text


def results_page(rows: Sequence[Row], pictures: Mapping[str, bytes]) -> bytes:
    """The tables and pictures as one HTML page; see training/figures/page.py."""
    measured, published = ([[cell.replace("`", "") for cell in line] for line in one] for one in tables(rows))
    sections = [Section("Measured, beside published", [Table(measured[0], measured[1:]), Text(notes(rows))])]
    if pictures:
        sections.append(Section("Along one axis (Fig. 7)", [Picture(png, name) for name, png in pictures.items()]))
    if len(published) > 1:
        sections.append(Section("Published linear probes", [Table(published[0], published[1:])]))
    lead = "Frozen features with the denoiser off (raw) and on (denoised); means and spreads over seeds."
    return page("Evaluation of denoised features", lead, sections)


def _published(head: list[str], known: dict[Source, Numbers], columns: Sequence[Key]) -> list[list[str]]:
    """A line a source that has something in these columns."""
    return [
        [*head, f"published, {source.short}", *(f"{numbers[key]:g}" if key in numbers else "" for key in columns)]
        for source, numbers in known.items()
        if any(key in numbers for key in columns)
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def kind(row: Row) -> str:
    """What `numbers_for` calls a row's features: those of a folder of published checkpoints, raw ones or artifacts."""
    if row.state in ("denoised", "distilled"):
        return f"{'imgnet' if '_dvt_in1k' in row.model else 'voc'}_{row.state}"
    return row.state


def backbone(model: str) -> str:
    """A variant's backbone: its name without `_dvt`, `_dvt_in1k`, `_dvt_distilled`, ..."""
    return re.sub(r"_dvt(_in1k)?(_distilled)?$", "", model)


def draw(rows: Sequence[Row], axis: str) -> bytes | None:
    """One of Fig. 7's panels as a PNG, a plot a number; None if there are fewer than two places on the axis.

    Args:
        rows: the results.
        axis: "parameters", or a tag: "pairs", "views".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted = [task for task, *_ in COLUMNS[:-4]]  # MIC and position's share have no part in Fig. 7
    figures = {key: _lines(rows, key, axis) for key in columns_of(rows) if key[0] in wanted}
    figures = {key: lines for key, lines in figures.items() if lines}
    if not figures:
        return None
    across = min(3, len(figures))
    down = -(-len(figures) // across)
    figure, plots = plt.subplots(down, across, figsize=(4.2 * across, 3.2 * down), squeeze=False, layout="constrained")
    for plot in plots.flat[len(figures) :]:
        plot.set_axis_off()
    for plot, (key, lines) in zip(plots.flat, figures.items()):
        families = sorted({family for family, _ in lines})
        for (family, state), points in sorted(lines.items()):
            xs, ys, spreads = zip(*sorted(points))
            plot.errorbar(
                xs,
                ys,
                yerr=spreads,
                marker="o",
                markersize=4,
                capsize=3,
                color=f"C{families.index(family)}",
                label=f"{family} {state}",
                linestyle=_STYLES[state],
                alpha=0.5 if "published" in state else 1,
            )
        plot.set_xscale("log")
        ticks = sorted({x for points in lines.values() for x, *_ in points})
        plot.set_xticks(ticks, [f"{x:g}" for x in ticks])
        plot.minorticks_off()
        plot.set(xlabel={"parameters": "parameters (M)"}.get(axis, axis), ylabel=heading(key))
        plot.grid(alpha=0.3)
        plot.legend(fontsize=7)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    plt.close(figure)
    return data.getvalue()


def _lines(rows: Sequence[Row], key: Key, axis: str) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Points (x, mean, spread) of one number, by family of models and state; families at one place are left out."""
    lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        place = _place(row, axis)
        if key in row.cells and place is not None and row.state in ("raw", "denoised"):
            mean, spread, _ = row.cells[key]
            lines.setdefault((_family(row, axis), row.state), []).append((place, mean, spread or 0.0))
            known = numbers_for(backbone(row.model), kind(row))
            values = [numbers[key] for numbers in known.values() if key in numbers]
            if axis == "parameters" and values:  # of two sources the first, as all sizes are in it
                published = lines.setdefault((_family(row, axis), f"{row.state}, published"), [])
                published.append((place, values[0], 0.0))
    return {name: points for name, points in lines.items() if len({x for x, *_ in points}) > 1}


def _family(row: Row, axis: str) -> str:
    """Models that a line joins: of one kind and all sizes for Fig. 7a, of one backbone or place for b and c."""
    name = backbone(row.model)
    if axis == "parameters":
        return re.sub(r"_(tiny|small|base|large|huge|giant|gigantic)", "", name)
    return "" if name.startswith("local-dir:") else name


def _place(row: Row, axis: str) -> float | None:
    if axis == "parameters":
        return round(row.parameters / 1e6, 1)
    try:
        return float(row.tags[axis])
    except (KeyError, ValueError):
        return None


def _is_number(name: str, wanted: str) -> bool:
    return name.startswith(wanted) if wanted.endswith("/") else name == wanted


def _cell(mean: float, spread: float | None, whole: bool) -> str:
    digits = 2 if abs(mean) >= 2 else 4
    text = f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    return text if whole else f"{text}\\*"


if __name__ == "__main__":
    sys.exit(main())
