"""Ours beside the published: a page and a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from string import ascii_lowercase
from typing import Any

from timm_dvt.publish.published import LOST07, LOST12, LOST20K, MIC, TOP1
from training.evaluate.results import heading
from training.evaluate.tasks import tasks_of
from training.figures.page import Picture, Section, Table, Text, page
from training.reproduction.published import ROWS, TABLES, Row

TITLES = {
    "1": "Table 1: how much single channels tell of position",
    "2": "Table 2: segmentation and depth by linear probes",
    "3": "Table 3: detection",
    "4": "Table 4: object discovery",
    "5": "Table 5: k-NN segmentation by stage 1's maps",
    "6": "Table 6: architectures of the denoiser",
    "7": "Figure 7 (a): sizes of DINOv2, by the numbers of the authors' README",
    "S2": "Table S2: detection with fixed position embeddings; its DeiT-III and CLIP interchanged, as Table 3 has them",
    "S3": "Table S3: classification by an attentive probe",
    "README": "The authors' README",
}
# As the paper heads its columns, where it does not as we do.
COLUMNS = {
    MIC: "ImageNet MIC",
    TOP1: "ImageNet top-1",
    LOST07: "VOC07 CorLoc",
    LOST12: "VOC12 CorLoc",
    LOST20K: "COCO-20k CorLoc",
}
# Tab. 5 names the fields that were fitted, results the map that was taken.
MAPS = {
    "view-average": "view-average, the paper's (b) F",
    "F": "F, the paper's (c) F + G",
    "F+residual": "F+residual, the paper's (d) F + G + Δ",
}
AS_PRINTED = "Ours, and in parentheses the published; - and a letter for what could not be run:"
REASONS = ["", "why", "of what"]
HEADINGS = ["model", "state", "number", "published", "ours", "difference", "spread", "verdict"]
LEAD = (
    "Ours is the mean over seeds, the spread their standard deviation and, in parentheses, how many they are. A "
    "difference is within the spread, and green, if it is at most two standard deviations plus the rounding of the "
    "published number. * is not the authors' protocol: the quick one, or images were limited, settings or the size of "
    "the input changed."
)


@dataclass(frozen=True)
class Outcome:
    """What came of a row: numbers, or the reason why there are none.

    Attributes:
        mean, spread: of ours, over `count` seeds.
        whole: whether it is the authors' protocol.
    """

    row: Row
    reason: str = ""
    mean: float | None = None
    spread: float = 0.0
    count: int = 0
    whole: bool = True

    @property
    def difference(self) -> float | None:
        """Ours - published."""
        return None if self.mean is None or self.row.value is None else self.mean - self.row.value

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.mean is None:
            return "not run"
        if self.difference is None:
            return "not published"
        rounding = 0.5 * 10.0 ** -decimals(self.row.key[2], self.row.source)
        return "within" if abs(self.difference) <= 2 * self.spread + rounding + 1e-9 else "outside"


@lru_cache(maxsize=None)
def decimals(number: str, source: str) -> int:
    """Of a published number, as its table prints them: 83.60, not 83.6."""
    values = (row.value for row in ROWS if (row.key[2], row.source) == (number, source) and row.value is not None)
    return max(-int(Decimal(repr(value)).as_tuple().exponent) for value in values)


def outcome(row: Row, record: Mapping[str, Any]) -> Outcome:
    """Of a row, from the record of its job."""
    if "result" not in record:
        return Outcome(row, record.get("error", "not run yet"))
    result, number = record["result"], row.key[2]
    states = result["states"]
    if row.state not in states:
        return Outcome(row, f"the model has no {number} of state {row.state}; it has {', '.join(states)}")
    if number not in states[row.state]:
        return Outcome(row, f"{row.key[1]} has no images for {number}")
    summary = states[row.state][number]
    changed = {*result["changed"], *(word for word in record.get("command", ()) if word.startswith("--input-size"))}
    quick = result.get("protocol") == "fast" and row.key[0] in tasks_of("repository") and row.made != "pairs"
    whole = not (quick or result["limit"] or changed - set(row.settings))
    return Outcome(row, "", summary["mean"], summary["std"], len(summary["values"]), whole)


def results_page(outcomes: Sequence[Outcome]) -> bytes:
    """The page: a section a table, and what could not be run."""
    reasons = _reasons(outcomes)
    sections = []
    for table, chosen in _by_table(outcomes):
        green = [i for i, one in enumerate(chosen) if one.verdict == "within"]
        headings, lines = grid(chosen, list(reasons))
        rows = [cells(one, list(reasons)) for one in chosen]
        parts: list[Text | Table | Picture] = [
            Text(AS_PRINTED),
            Table(headings, lines, 2),
            Text("One by one:"),
            Table(HEADINGS, rows, 3, green),
        ]
        sections.append(Section(TITLES[table], parts))
    if reasons:
        sections.append(Section("What could not be run", [Table(REASONS, _reason_cells(reasons), len(REASONS))]))
    sections.append(Section("Figures", [Text("python -m training.report OUT/results plots them over model size.")]))
    return page("The paper's numbers, again", LEAD, sections)


def results_table(outcomes: Sequence[Outcome]) -> str:
    """The same in Markdown."""
    text = f"# The paper's numbers, again\n\n{LEAD}\n"
    reasons = _reasons(outcomes)
    for table, chosen in _by_table(outcomes):
        text += f"\n## {TITLES[table]}\n\n{AS_PRINTED}\n\n" + _markdown(*grid(chosen, list(reasons)))
        text += "\nOne by one:\n\n" + _markdown(HEADINGS, [cells(one, list(reasons)) for one in chosen])
    return text + ("\n## What could not be run\n\n" + _markdown(REASONS, _reason_cells(reasons)) if reasons else "")


def grid(outcomes: Sequence[Outcome], reasons: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A table as the paper prints it, headings and rows: a line a model and state, a column a number."""
    columns = list(dict.fromkeys(_title(one.row) for one in outcomes))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for one in outcomes:
        left_out = f"- {_letters(reasons.index(one.reason))}" if one.reason in reasons else "-"
        value = "" if one.row.value is None else f" ({_published(one.row)})"
        lines.setdefault((one.row.backbone, _state(one.row)), {})[_title(one.row)] = (_ours(one) or left_out) + value
    models = [backbone for backbone, _ in lines]
    ordered = sorted(lines, key=lambda line: models.index(line[0]))  # what a model gives with denoiser below it without
    return ["model", "state", *columns], [
        [*line, *(lines[line].get(column, "") for column in columns)] for line in ordered
    ]


def cells(one: Outcome, reasons: Sequence[str] = ()) -> list[str]:
    """A row of the table, under `HEADINGS`; `reasons` are those that are told below it."""
    row, digits = one.row, _digits(one.row.key[2])
    published = "" if row.value is None else f"{_published(row)} ({row.source})"
    difference = "" if one.difference is None else f"{one.difference:+.{digits}f}"
    spread = "" if one.mean is None else f"± {one.spread:.{digits}f} ({one.count})" if one.count > 1 else "one seed"
    note = f" ({_letters(reasons.index(one.reason))})" if one.reason in reasons else ""
    verdict = one.verdict + note
    return [row.backbone, _state(row), _title(row), published, _ours(one), difference, spread, verdict]


def _published(row: Row) -> str:
    return f"{row.value:.{decimals(row.key[2], row.source)}f}"


def _ours(one: Outcome) -> str:
    return "" if one.mean is None else f"{one.mean:.{_digits(one.row.key[2])}f}{'' if one.whole else '*'}"


@lru_cache(maxsize=None)
def _digits(number: str) -> int:
    """Of ours: two of percentages, four of what is about 1 or less."""
    return 4 if all(abs(row.value or 0) < 2 for row in ROWS if row.key[2] == number) else 2


def _state(row: Row) -> str:
    """A row's state, and what was made for it."""
    if row.made == "pairs":
        return MAPS.get(row.state, row.state)
    return row.state + (f" ({row.made})" if row.made else "")


def _title(row: Row) -> str:
    return COLUMNS.get(row.key) or heading(row.key) + "".join(f", {word}" for word in row.settings)


def _by_table(outcomes: Sequence[Outcome]) -> list[tuple[str, list[Outcome]]]:
    found = ((table, [one for one in outcomes if one.row.table == table]) for table in TABLES)
    return [(table, chosen) for table, chosen in found if chosen]


def _reasons(outcomes: Sequence[Outcome]) -> dict[str, list[Row]]:
    """Each reason once, with the numbers that it is of."""
    reasons: dict[str, list[Row]] = {}
    for _, chosen in _by_table(outcomes):
        for one in chosen:
            if one.reason:
                reasons.setdefault(one.reason, []).append(one.row)
    return reasons


def _reason_cells(reasons: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """Rows under `REASONS`."""
    cells = []
    for i, (reason, rows) in enumerate(reasons.items()):
        tables, tasks, models = map(
            dict.fromkeys, zip(*((short_title(row.table), row.key[0], row.backbone) for row in rows))
        )
        cells.append([_letters(i), reason, f"{', '.join(tables)}: {', '.join(tasks)} of {', '.join(models)}"])
    return cells


def _letters(number: int) -> str:
    """a to z, then aa, ab and so on."""
    return ("" if number < 26 else _letters(number // 26 - 1)) + ascii_lowercase[number % 26]


def short_title(table: str) -> str:
    """Of a table: "Table 2"."""
    return TITLES[table].split(":")[0]


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
