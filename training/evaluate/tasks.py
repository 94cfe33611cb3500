"""The tasks: a table of their names, and their settings.

A task is a module with

    KIND                what annotation it needs: a kind of data/datasets.py
    Settings            a frozen dataclass: the paper's protocol; numbers that may be 0 are named in `ZERO` below
    SMALL               the same, sized for datasets that are `small` and two cores (may be left out)
    STATES              which of "raw", "denoised", "artifacts" it is for; those that the model has are run
    PAIRS               True if --pairs says something for it (may be left out)
    NUMBERS, MEANING    what training.report shows of it: {number: heading}, where a name that ends in "/" stands for
                        all that begin with it, and a sentence for readers who have not read the paper
    run(data, settings, run) -> {name: number}

where `data` is {part: Features} of the parts that a data set has for KIND ("train", "val", ...), and `run` a `Run`.
Data in which it finds nothing raise a `UserError`. Numbers called mIoU, CorLoc, ... are percentages.
"""

from __future__ import annotations

import ast
import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from timm_dvt.errors import UserError
from training.evaluate.data.datasets import named

# A task by its protocols. fast: features extracted once, from whole images resized to a square; repository: as the
# authors' code evaluates.
TASKS = {
    "attentive-probe": {"fast": "attentive_probe"},
    "blank": {"fast": "position.blank"},
    "correspondence": {"fast": "correspondence"},
    "depth": {"fast": "depth.linear", "repository": "depth.repository"},
    "detection": {"fast": "detection.fast", "repository": "detection.repository"},
    "discovery": {"fast": "discovery"},
    "knn-seg": {"fast": "segmentation.knn"},
    "linear-seg": {"fast": "segmentation.linear", "repository": "segmentation.repository"},
    "mic": {"fast": "position.mic"},
    "one-sided": {"fast": "segmentation.one_sided"},
    "position": {"fast": "position.share"},
    "propagation": {"fast": "propagation"},
}
PROTOCOLS = ("fast", "repository")
# Settings that may be 0 though they are not by default; below that none may be.
ZERO = ("weight_decay", "warmup", "loss_warmup", "context", "shuffled")


def tasks_of(protocol: str) -> tuple[str, ...]:
    """The tasks that a protocol is there for."""
    return tuple(name for name, modules in TASKS.items() if protocol in modules)


def load_task(name: str, protocol: str = "fast") -> Any:
    """The module of a task by its name.

    Raises:
        ValueError: no such task, or not by this protocol.
    """
    if name not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, or all, got {name!r}")
    if name not in tasks_of(protocol):
        raise UserError(f"--protocol {protocol} is for {', '.join(tasks_of(protocol))}, not for {name}")
    return importlib.import_module(f"training.evaluate.{TASKS[name][protocol]}")


def task_settings(name: str, dataset: str, words: Sequence[str] = (), protocol: str = "fast") -> Any:
    """A task's settings for a dataset, with `NAME=VALUE` or `TASK.NAME=VALUE` overriding them.

    Raises:
        ValueError: no such dataset or setting, or a value of the wrong type or size; a `TASK.` of another task is left
            alone.
    """
    task = load_task(name, protocol)
    settings = getattr(task, "SMALL", task.Settings()) if named(dataset).small else task.Settings()
    known = {field.name: getattr(settings, field.name) for field in fields(settings)}
    changes = {}
    for word in words:
        match = re.fullmatch(r"(?:([a-z-]+)\.)?(\w+)=(.*)", word)
        if match is None:
            raise UserError(f"--set takes NAME=VALUE or TASK.NAME=VALUE, got {word!r}")
        owner, key, text = match.groups()
        if owner is not None and owner not in TASKS:
            raise UserError(f"--set {word}: there is no task {owner!r}; tasks are {', '.join(TASKS)}")
        if owner not in (None, name):
            continue
        if key not in known:
            raise UserError(f"--set {word}: {name} has the settings {', '.join(known) or 'none'}")
        changes[key] = _parse(word, text, known[key])
        _check_size(word, changes[key], zero=key in ZERO or not (known[key] and getattr(task.Settings(), key)))
    return replace(settings, **changes)


def _parse(word: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"--set {word}: {text!r} is not a value like {default!r}") from None
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        raise UserError(f"--set {word}: must be {type(default).__name__}, like {default!r}, got {text!r}")
    return value


def _check_size(word: str, value: Any, zero: bool) -> None:
    """Raise UserError for a number below 0, at 0 where that is none either, or without end; for one of several too."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, tuple):
            _check_size(word, number, zero)
        elif isinstance(number, (int, float)) and not isinstance(number, bool):
            if not (0 <= number < math.inf and (zero or number > 0)):
                raise UserError(f"--set {word}: must be {'0 or more' if zero else 'above 0'}, got {number}")
