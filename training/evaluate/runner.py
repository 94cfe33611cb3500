"""Runs one task over a model's states and seeds, and keeps what is finished.

A task is a module of training/evaluate/tasks with

    KIND                what annotation it needs: a kind of datasets.py
    Settings            a frozen dataclass: the paper's protocol
    SMALL               the same, sized for datasets that are `small` and two cores (may be left out)
    STATES              which of "raw", "denoised", "artifacts" it is for; those that the model has are run
    PAIRS               True if --pairs says something for it (may be left out)
    NUMBERS, MEANING    what training.report shows of it: {number: heading}, where a name that ends in "/" stands for all
                        that begin with it, and a sentence for who has not read the paper (may be left out: all numbers)
    run(data, settings, run) -> {name: number}

where `data` is {part: Features} and `run` a `Run`. Numbers called mIoU, CorLoc, ... are percentages. Those of
training/evaluate/repository are the same tasks by the protocol of the authors' repository.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

import training.evaluate.repository as repository_package
import training.evaluate.tasks as fast_package
from timm_dvt.version import __version__
from training.evaluate.datasets import named, open_dataset
from training.evaluate.features import Extractor, Features
from training.evaluate.pair_features import SAME, STATES, pair_data
from training.evaluate.tables import summarise, write_json

# fast: features extracted once, from whole images resized to a square; repository: as the authors' code evaluates.
PROTOCOLS = {"fast": fast_package, "repository": repository_package}


def tasks_of(protocol: str) -> tuple[str, ...]:
    """The tasks that a protocol is there for."""
    modules = pkgutil.iter_modules(PROTOCOLS[protocol].__path__)
    return tuple(sorted(module.name.replace("_", "-") for module in modules))


TASKS = tasks_of("fast")


@dataclass(frozen=True)
class Run:
    """What a task is told beside its data and settings.

    Attributes:
        state: "raw", "denoised" or "artifacts".
        seed: of everything random in this run.
        device: where probes are trained.
        checkpoint: file for the state of a training that is under way; None to keep none.
    """

    state: str
    seed: int = 0
    device: torch.device = torch.device("cpu")
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Request:
    """One evaluation as asked for on the command line; see the options of __main__.py."""

    task: str
    model: str
    dataset: str
    data: Path
    out: Path
    cache: Path | None
    protocol: str = "fast"
    pairs: tuple[Path, ...] = ()
    settings: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    repeats: int = 1
    batch_size: int = 16


def load_task(name: str, protocol: str = "fast") -> Any:
    """The module of a task by its name.

    Raises:
        ValueError: no such task, or not by this protocol.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, or all, got {name!r}")
    if name not in tasks_of(protocol):
        raise ValueError(f"--protocol {protocol} is for {', '.join(tasks_of(protocol))}, not for {name}")
    return importlib.import_module(f"{PROTOCOLS[protocol].__name__}.{name.replace('-', '_')}")


def task_settings(name: str, dataset: str, words: Sequence[str] = (), protocol: str = "fast") -> Any:
    """A task's settings for a dataset, with `NAME=VALUE` or `TASK.NAME=VALUE` overriding them.

    Raises:
        ValueError: no such dataset or setting, or a value of the wrong type; a `TASK.` of another task is left alone.
    """
    task = load_task(name, protocol)
    settings = getattr(task, "SMALL", task.Settings()) if named(dataset).small else task.Settings()
    known = {field.name: getattr(settings, field.name) for field in fields(settings)}
    changes = {}
    for word in words:
        match = re.fullmatch(r"(?:([a-z-]+)\.)?(\w+)=(.*)", word)
        if match is None:
            raise ValueError(f"--set takes NAME=VALUE or TASK.NAME=VALUE, got {word!r}")
        owner, key, text = match.groups()
        if owner is not None and owner not in TASKS:
            raise ValueError(f"--set {word}: there is no task {owner!r}; tasks are {', '.join(TASKS)}")
        if owner not in (None, name):
            continue
        if key not in known:
            raise ValueError(f"--set {word}: {name} has the settings {', '.join(known) or 'none'}")
        changes[key] = _parse(word, text, known[key])
    return replace(settings, **changes)


def _parse(word: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise ValueError(f"--set {word}: {text!r} is not a value like {default!r}") from None
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if (
        value is not None
        and default is not None
        and (not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)))
    ):
        raise ValueError(f"--set {word}: must be {type(default).__name__}, like {default!r}, got {text!r}")
    return value


def evaluate(request: Request, model: nn.Module, extractor: Extractor) -> tuple[dict[str, Any], Path]:
    """Run a task; returns the result and the JSON file that holds it.

    What was finished before is taken from OUT; a finished result is not computed again. The result is

        {"task", "model", "dataset", "settings", ..., "states": {state: {name: summary}},
         "difference": {name: summary}}, a summary being {"mean", "std", "values"}

    with one value a seed; the difference is denoised - raw (of pairs F - raw), seed by seed.

    Raises:
        ValueError: a name, setting or dataset that cannot be.
    """
    task = load_task(request.task, request.protocol)
    settings = task_settings(request.task, request.dataset, request.settings, request.protocol)
    trainaug = getattr(settings, "trainaug", None)
    splits = open_dataset(request.dataset, request.data, task.KIND, trainaug)
    if request.pairs and request.protocol != "fast":
        raise ValueError("--pairs holds maps of whole images: it goes with --protocol fast alone")
    if request.pairs and not getattr(task, "PAIRS", False):
        able = [name for name in TASKS if getattr(load_task(name), "PAIRS", False)]
        raise ValueError(f"--pairs is for {', '.join(able)}, not for {request.task}")
    limited = {part: split.limit(request.limit) for part, split in splits.items()}
    groups: list[tuple[Mapping[str, Any], Sequence[str]]]
    if request.pairs:
        parts = {part: split for part, split in limited.items() if part == "val" or task.KIND != "images"}
        groups = [*pair_data(request.pairs, parts, extractor, request.batch_size)]
    else:
        available = {*extractor.states, *(["artifacts"] if "denoised" in extractor.states else [])}
        features = {
            part: Features(extractor, split, request.cache, request.batch_size) for part, split in limited.items()
        }
        groups = [(features, [state for state in task.STATES if state in available])]
    data = groups[0][0]
    facts = {
        "task": request.task,
        "protocol": request.protocol,
        "model": request.model,
        "dataset": request.dataset,
        "settings": asdict(settings),
        "images": {part: len(features) for part, features in data.items()},
        "features": {part: features.keys for part, features in data.items()},
        "input_size": extractor.reader.input_size,
        "dtype": extractor.dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "version": __version__,
    }
    states: dict[str, list[dict[str, float]]] = {}
    seconds = 0.0
    for data, wanted in groups:
        own = {**facts, "features": {part: features.keys for part, features in data.items()}}
        for state in wanted:
            if SAME.get(state) in states:
                states[state] = states[SAME[state]]
                continue
            runs = [
                _run_once(task, data, settings, own, state, seed, request)
                for seed in range(request.seed, request.seed + request.repeats)
            ]
            states[_label(state, request.model, extractor)] = [run["numbers"] for run in runs]
            seconds += sum(run["seconds"] for run in runs)
    if request.pairs:
        facts["pairs"] = [group["val"].keys["pairs"] for group, _ in groups]
        states = {state: states[state] for state in STATES if state in states}
    result = {
        **facts,
        "pair_folders": [str(folder) for folder in request.pairs],
        "limit": request.limit,
        "changed": [word for word in request.settings if word.partition(".")[0] in (request.task, word)],
        "tags": {**_known_tags(request.model), **dict(tag.split("=", 1) for tag in request.tags)},
        "seed": request.seed,
        "repeats": request.repeats,
        "states": {state: _summaries(numbers) for state, numbers in states.items()},
        "difference": _difference(states),
        "seconds": round(seconds, 1),
    }
    how = [*(["pairs"] if request.pairs else []), *([] if request.protocol == "fast" else [request.protocol])]
    path = request.out / f"{_slug(request.task, request.dataset, request.model, *how)}-{_key(facts)[:8]}.json"
    write_json(path, result)
    return result, path


def _run_once(
    task: Any,
    data: Mapping[str, Features],
    settings: Any,
    facts: Mapping[str, Any],
    state: str,
    seed: int,
    request: Request,
) -> dict[str, Any]:
    """{"numbers", "seconds"} of one state and seed, or what an earlier run found for exactly this."""
    key = _key({**_facts_of(state, facts), "state": state, "seed": seed})[:20]
    done = request.out / "parts" / f"{key}.json"
    if done.exists():
        return json.loads(done.read_text())
    device = next(iter(data.values())).extractor.reader.device
    checkpoint = done.with_suffix(".safetensors")
    start = time.monotonic()
    numbers = task.run(data, settings, Run(state, seed, device, checkpoint))
    found = {"numbers": numbers, "seconds": time.monotonic() - start}
    write_json(done, found)
    for left in (checkpoint, checkpoint.with_suffix(".validations")):
        left.unlink(missing_ok=True)
    return found


def _facts_of(state: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the numbers of a state. Those of raw features are a backbone's, whatever denoiser is beside it."""
    if state != "raw" or facts["settings"].get("embedding") == "artifacts":
        return dict(facts)
    keys = {
        part: {name: key for name, key in keys.items() if name != "denoised"}
        for part, keys in facts["features"].items()
    }
    return {name: fact for name, fact in facts.items() if name not in ("model", "parameters")} | {"features": keys}


def _known_tags(model: str) -> dict[str, str]:
    """What the folder of a trained denoiser says of itself: the number of pairs it was trained on."""
    path = Path(model.removeprefix("local-dir:")) / "settings.json"
    try:
        return {"pairs": str(json.loads(path.read_text())["pairs"]["count"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _label(state: str, model: str, extractor: Extractor) -> str:
    """A distilled ViT has one state, which is no raw one."""
    return "distilled" if len(extractor.states) == 1 and "distilled" in model else state


def _summaries(numbers: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: summarise([run[name] for run in numbers]) for name in numbers[0]}


def _difference(states: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    after = next((state for state in ("denoised", "F", "view-average") if state in states), None)
    if after is None or "raw" not in states:
        return {}
    raw, denoised = states["raw"], states[after]
    shared = [name for name in raw[0] if name in denoised[0]]
    return {name: summarise([b[name] - a[name] for a, b in zip(raw, denoised)]) for name in shared}


def _key(facts: Mapping[str, Any]) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _slug(*names: str) -> str:
    return "_".join(re.sub(r"[^\w.-]+", "-", Path(name).name if "/" in name else name) for name in names)
