"""Results as files and as text: one row a number, one column a state, and the difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from timm_dvt.tables import aligned
from timm_dvt.weights.files import write_whole


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all, also if another process writes the same file; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, spread (sample standard deviation, 0 for one value) and the values themselves."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


def result_table(result: Mapping[str, Any]) -> str:
    """A result (see runner.py) as aligned text: numbers | states | difference, with spread if repeated."""
    states = result["states"]
    columns = [*states, *(["difference"] if result["difference"] else [])]
    names = list(dict.fromkeys(name for state in states.values() for name in state))
    rows = [["", *columns]]
    for name in names:
        cells = [_cell(states[state].get(name)) for state in states]
        if result["difference"]:
            cells.append(_cell(result["difference"].get(name), sign=True))
        rows.append([name, *cells])
    head = f"{result['task']} | {result['model']} | {result['dataset']}"
    return "\n".join([head, *(f"  {line}" for line in aligned(rows))])


def _cell(summary: Mapping[str, Any] | None, sign: bool = False) -> str:
    if summary is None:
        return "-"
    mean = summary["mean"]
    digits = 2 if abs(mean) >= 10 else 4
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return f"{text} +- {summary['std']:.{digits}f}" if len(summary["values"]) > 1 else text
