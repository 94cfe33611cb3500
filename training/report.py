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

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_dvt.publish.published import SEVEN, Key, Numbers, Source, numbers_for
from timm_dvt.shared_folder import write_atomically
from timm_dvt.variants import SUFFIXES
from training.common.command import command_parser, exit_code_of
from training.evaluate.results import OF_PAIRS, Row, columns_of, heading, meaning, read_rows
from training.evaluate.tasks import TASKS, load_task
from training.figures.page import Picture, Section, Table, Text, page
from training.figures.plots import Line, draw_lines

# By what results can differ along a figure: its file, the name of its axis, and what it shows.
AXES = {
    "parameters": ("fig7a", "parameters (millions)", "By the size of the model."),
    "pairs": ("fig7b", "training pairs", "By the number of images that the denoiser was trained on."),
    "views": ("fig7c", "views of an image", "By the number of views from which each training target was made."),
}
LEGEND = "Solid: denoiser on; broken: off; faint: as published. Bars are the spread over seeds, where there is one."
FEATURES = {  # what the published files hold, in words
    "voc_denoised": "denoised, of VOC",
    "imgnet_denoised": "denoised, of ImageNet",
    "voc_distilled": "distilled, of VOC",
    "imgnet_distilled": "distilled, of ImageNet",
}
_STYLES = {"raw": "--", "denoised": "-", "raw, published": ":", "denoised, published": "-."}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 if there is nothing to report, 3 if DIR cannot be written."""
    parser = command_parser("report", __doc__)
    parser.add_argument("folder", metavar="DIR", help="where training.evaluate wrote its results (its --out)")
    args = parser.parse_args(argv)
    return exit_code_of(lambda: report(Path(args.folder)))


def report(folder: Path) -> None:
    """Write what the results of a folder say, then print it. Raises UserError, OutputError."""
    rows = read_rows(folder)
    lines = [markdown(rows)]
    write_atomically(folder / "report.md", lines[0].encode())
    pictures: dict[str, bytes] = {}
    for axis, (name, *_) in AXES.items():
        picture = draw(rows, axis)
        if picture is None:
            lines.append(f"{name}.png left out: fewer than two results differ in {axis}")
        else:
            pictures[axis] = picture
            write_atomically(folder / f"{name}.png", picture)
            lines.append(str(folder / f"{name}.png"))
    write_atomically(folder / "report.html", results_page(rows, pictures))
    print(*lines, folder / "report.html", sep="\n", flush=True)


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
            published += _published([f"`{name}`", FEATURES.get(features, features)], numbers_for(name, features), SEVEN)
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
    measured, published = (
        [[cell.replace("`", "").replace("\\*", "*") for cell in line] for line in table] for table in tables(rows)
    )
    tasks = dict.fromkeys(task for task, *_ in columns_of(rows))
    words = [Text(text) for text in (notes(rows), *map(meaning, tasks)) if text]
    sections = [Section("Measured, beside published", [Table(measured[0], measured[1:], words=3), *words])]
    if pictures:
        drawn = [Picture(png, f"{AXES[axis][2]} {LEGEND}") for axis, png in pictures.items()]
        sections.append(Section("What it depends on", drawn))
    if len(published) > 1:
        sections.append(Section("Published linear probes", [Table(published[0], published[1:], words=3)]))
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
        axis: one of `AXES`.
    """
    plots = {heading(key): _lines(rows, key, axis) for key in columns_of(rows) if _is_use(key[0])}
    plots = {title: lines for title, lines in plots.items() if lines}
    return draw_lines(plots, AXES[axis][1]) if plots else None


def _is_use(task: str) -> bool:
    """Whether a task uses features. Those that look at images alone (MIC, position) have no part in Fig. 7."""
    return task not in TASKS or load_task(task).KIND != "images"


def _lines(rows: Sequence[Row], key: Key, axis: str) -> list[Line]:
    """Points of one number, by family of models and state; families at one place are left out."""
    lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for row in rows:
        place = _place(row, axis)
        if key in row.cells and place is not None and row.state in _STYLES and OF_PAIRS not in row.tags:
            mean, spread, _ = row.cells[key]
            lines.setdefault((_family(row, axis), row.state), []).append((place, mean, spread or 0.0))
            known = numbers_for(backbone(row.model), kind(row))
            values = [numbers[key] for numbers in known.values() if key in numbers]
            if axis == "parameters" and values:  # of two sources the first, as all sizes are in it
                published = lines.setdefault((_family(row, axis), f"{row.state}, published"), [])
                published.append((place, values[0], 0.0))
    return [
        Line(family, state, _STYLES[state], "published" in state, points)
        for (family, state), points in lines.items()
        if len({x for x, *_ in points}) > 1
    ]


def _family(row: Row, axis: str) -> str:
    """Models that a line joins: of one kind and all sizes for Fig. 7a, of one backbone or place for b and c."""
    name = backbone(row.model)
    if axis == "parameters":
        return re.sub(r"_(tiny|small|base|large|huge|giant|gigantic)", "", name)
    return "" if name.startswith("local-dir:") else name


def _place(row: Row, axis: str) -> float | None:
    if axis == "parameters":  # a run of other axes would give one size several numbers, and the line any of them
        return None if AXES.keys() & row.tags.keys() else round(row.parameters / 1e6, 1)
    try:
        return float(row.tags[axis])
    except (KeyError, ValueError):
        return None


def _cell(mean: float, spread: float | None, whole: bool) -> str:
    digits = 2 if abs(mean) >= 2 else 4
    text = f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    return text if whole else f"{text}\\*"


if __name__ == "__main__":
    sys.exit(main())
