"""The results that training.evaluate wrote: read from their folder, and what their numbers are called."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_dvt.errors import UserError
from timm_dvt.publish.published import Key
from training.evaluate.data.datasets import DATASETS
from training.evaluate.features import pairs as pair_features
from training.evaluate.tasks import TASKS, load_task

# The tasks of the paper's tables in their order (Tabs. 2, 3, 4, S3, 5, 1, and Fig. 3 in a number); others come behind.
PAPER = ("linear-seg", "depth", "detection", "discovery", "attentive-probe", "knn-seg", "mic", "position")
STATES = ("raw", "denoised", "artifacts", "distilled", *list(pair_features.STATES)[1:])
OF_FEATURES = ("weights", "input", "dtype")  # tags that say how features were made, where not as usual
OF_PAIRS = "maps of"  # tag of results of --pairs, whose raw maps are the pairs' own


@dataclass
class Row:
    """What is known of one model in one state.

    Attributes:
        model: as it was named.
        state: one of `STATES`.
        tags: pairs=N and so on; OF_PAIRS of what --pairs gave.
        parameters: of the whole model.
        cells: {column: (mean, spread or None, whether of the full protocol)}.
    """

    model: str
    state: str
    tags: dict[str, str]
    parameters: int
    cells: dict[Key, tuple[float, float | None, bool]] = field(default_factory=dict)


def read_rows(folder: Path) -> list[Row]:
    """The results of a folder by model, tags and state, in order of their names.

    Raises:
        ValueError: there is no result in the folder.
    """
    rows: dict[tuple, Row] = {}
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    read = [(path, _read(path)) for path in files]
    results = [(path, result) for path, result in read if {"task", "dataset", "model", "states"} <= result.keys()]
    label = labels(place_of(result) for _, result in results)
    for path, result in results:
        tags = dict(result.get("tags", {}))
        whole = not (result.get("limit") or result.get("changed") or tags.keys() & {*OF_FEATURES})
        protocol = result.get("protocol", "fast")  # results before there were several do not say
        if protocol != "fast":
            tags["protocol"] = protocol
        if result.get("pairs"):
            tags[OF_PAIRS] = " + ".join(result.get("pair_folders") or ["pairs"])
        try:
            for state, numbers in result["states"].items():
                key = (result["model"], tuple(sorted(tags.items())), state)
                row = rows.setdefault(key, Row(result["model"], state, tags, int(result["parameters"])))
                for name, summary in numbers.items():
                    spread = float(summary["std"]) if len(summary["values"]) > 1 else None
                    cell = (result["task"], label[place_of(result)], name)
                    row.cells[cell] = (float(summary["mean"]), spread, whole)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no result: {type(error).__name__}: {error}; remove it") from error
    if not rows:
        raise UserError(f"no results in {folder}: python -m training.evaluate TASK --out {folder} writes them")
    return sorted(rows.values(), key=lambda row: (row.model, sorted(row.tags.items()), _place(row.state, STATES)))


def place_of(result: Mapping[str, Any]) -> tuple[str, str]:
    """A result's dataset, and the folder that it was read from, "" where an older result does not say."""
    return str(result["dataset"]), str(result.get("data", ""))


def labels(places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What datasets are called in tables: by their names, where one is of several folders with the folder's behind."""
    known = list(dict.fromkeys(places))
    called = {}
    for dataset, data in known:
        others = [Path(other).name for same, other in known if same == dataset and other != data]
        short = Path(data).name
        called[dataset, data] = f"{dataset} {data if short in others else short}".strip() if others else dataset
    return called


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no result, nor any other JSON: {error}; remove it") from error
    return record if isinstance(record, dict) else {}


def columns_of(rows: Sequence[Row]) -> list[Key]:
    """The columns that have a measured number: tasks in the paper's order, then others; a task's numbers in its own."""
    present = [key for key in dict.fromkeys(key for row in rows for key in row.cells) if _title(key) is not None]

    def order(key: Key) -> tuple:
        task, dataset, number = key
        return _place(task, PAPER), _place(_entry(key), list(numbers_of(task))), _place(dataset, list(DATASETS)), number

    return sorted(present, key=order)


def heading(key: Key) -> str:
    """A column's name: dataset and number."""
    task, dataset, number = key
    if (task, dataset) == ("detection", "voc"):
        return "VOC07 mAP (11 points)"
    entry = _entry(key)
    if entry.endswith("/"):  # what follows says of which part of which dataset it is
        return f"{number.removeprefix(entry)} {_title(key)}"
    name, _, folder = dataset.partition(" ")  # as `labels` calls it
    title = (DATASETS[name].title if name in DATASETS else "") or name
    where = folder if name == "folder" and folder else f"{title} {folder}".strip()
    return f"{where} {_title(key)}"


def numbers_of(task: str) -> dict[str, str]:
    """{number: heading} of what is shown of a task; nothing if it does not say."""
    return getattr(load_task(task), "NUMBERS", {}) if task in TASKS else {}


def meaning(task: str) -> str:
    """What its numbers mean, for readers who have not read the paper; "" if it does not say."""
    return getattr(load_task(task), "MEANING", "") if task in TASKS else ""


def _entry(key: Key) -> str:
    """Under which name a task's NUMBERS have a number."""
    task, _, number = key
    return next((name for name in numbers_of(task) if name.endswith("/") and number.startswith(name)), number)


def _title(key: Key) -> str | None:
    """The heading of a number without its dataset; None of one that is not shown."""
    numbers = numbers_of(key[0])
    return numbers.get(_entry(key)) if numbers else f"{key[0]} {key[2]}"


def _place(name: str, order: Sequence[str]) -> tuple[int, str]:
    """Where a name stands in an order; those that it does not have come behind, by name."""
    return (order.index(name), "") if name in order else (len(order), name)
