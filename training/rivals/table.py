"""Results of rows as a table: Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_dvt.publish.published import Key
from timm_dvt.weights.files import write_whole
from training.evaluate.results import Row, columns_of, heading, meaning
from training.evaluate.tables import summarize, write_json
from training.rivals.registry import RAW, REGISTERS

Numbers = dict[Key, dict[str, Any]]  # {(task, dataset, number): summary}


def numbers_of(result: Mapping[str, Any], dataset: str) -> Numbers:
    """What a result of training.evaluate says of its model as it is: denoised, where it has a denoiser.

    Of a model that was changed inside and has no denoiser, ratios to its own raw features say nothing.

    Args:
        dataset: what the table calls the result's.
    """
    states = result["states"]
    numbers = states.get("denoised") or next(iter(states.values()))
    if result["tags"]["rival"] == REGISTERS:
        numbers = {name: summary for name, summary in numbers.items() if not name.startswith("ratio")}
    return {(result["task"], dataset, name): summary for name, summary in numbers.items()}


def gains(numbers: Numbers, raw: Numbers) -> Numbers:
    """Differences to the raw features, seed by seed."""
    pairs = {key: (numbers[key]["values"], raw[key]["values"]) for key in numbers if key in raw}
    return {key: summarize([a - b for a, b in zip(*pair, strict=True)]) for key, pair in pairs.items()}


def write(out: Path, model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Write OUT/rivals.md and OUT/rivals.json, each whole; returns the Markdown.

    Args:
        rows: {row: {"learned": words, "numbers": Numbers}}, or {"left_out": why}.
    """
    raw = rows.get(RAW, {}).get("numbers", {})
    record: dict[str, Any] = {"model": model, "rows": {}}
    for name, row in rows.items():
        entry = {key: value for key, value in row.items() if key != "numbers"}
        for kind, numbers in (("numbers", row.get("numbers", {})), ("gains", gains(row.get("numbers", {}), raw))):
            entry[kind] = {"/".join(key): summary for key, summary in numbers.items()}
        record["rows"][name] = entry
    write_json(out / "rivals.json", record)
    text = markdown(model, rows)
    write_whole(out / "rivals.md", lambda path: path.write_text(text))
    return text


def markdown(model: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a row, a column a number that its task shows; behind it the difference to the raw features."""
    raw = rows.get(RAW, {}).get("numbers", {})
    of_all = [
        Row(name, RAW, {}, 0, {key: (summary["mean"], None, True) for key, summary in row["numbers"].items()})
        for name, row in rows.items()
        if "numbers" in row
    ]
    columns = columns_of(of_all)
    lines = [
        f"| `{model}` | {' | '.join([*map(heading, columns), 'learned'])} |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for name, row in rows.items():
        numbers = row.get("numbers", {})
        gain = {} if name == RAW else gains(numbers, raw)
        cells = [_cell(numbers.get(key), gain.get(key)) for key in columns]
        lines.append(f"| {' | '.join([name, *cells, row.get('left_out') or row.get('learned', '')])} |")
    meanings = [text for task in dict.fromkeys(key[0] for key in columns) if (text := meaning(task))]
    return "\n".join([*lines, "", "In parentheses the difference to the raw features.", *meanings]) + "\n"


def _cell(summary: Mapping[str, Any] | None, gain: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    return _number(summary, "") + (f" ({_number(gain, '+')})" if gain else "")


def _number(summary: Mapping[str, Any], sign: str) -> str:
    spread = f" ± {summary['std']:.2f}" if len(summary["values"]) > 1 else ""
    return f"{summary['mean']:{sign}.2f}{spread}"
