"""Runs one task over a model's states and seeds, and keeps what is finished."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from timm_dvt.errors import UserError
from timm_dvt.options import option
from timm_dvt.version import __version__
from training.evaluate.data.datasets import DATASETS, open_dataset
from training.evaluate.data.splits import Split
from training.evaluate.features.cached import Features
from training.evaluate.features.extractor import Extractor
from training.evaluate.features.pairs import SAME, STATES, pair_data
from training.evaluate.run import Run
from training.evaluate.tables import summarize, write_json
from training.evaluate.tasks import PROTOCOLS, TASKS, load_task, task_settings, tasks_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """One evaluation as asked for on the command line."""

    task: str
    model: str
    protocol: str = option(
        "fast",
        "fast: features extracted once, images squared (default); repository: augmentation, windows and sizes of the "
        "authors' code, for " + ", ".join(tasks_of("repository")),
        choices=PROTOCOLS,
    )
    dataset: str = option(..., "", choices=list(DATASETS))
    data: Path = option(..., "the dataset in its standard layout", type=Path, metavar="DIR")
    out: Path = option(Path("results"), "results and features (default: %(default)s)", type=Path, metavar="DIR")
    cache: Path | None = option(
        None, "where features are kept (default: OUT/features); off to keep none", type=Path, metavar="DIR"
    )
    pairs: tuple[Path, ...] = option(
        (),
        "evaluate stage 1's outputs instead: raw, F, F + residual = raw - G, mean of both, G (Tabs. 1, 5); a second "
        "folder, solved without G, adds the view-average",
        type=Path,
        nargs="+",
        metavar="DIR",
    )
    limit: int | None = option(None, "at most N images a split, evenly spread over it", least=1, metavar="N")
    seed: int = 0
    pretrained: bool = True
    repeats: int = option(1, "runs with seeds from --seed on (default: %(default)s)", least=1, metavar="N")
    settings: tuple[str, ...] = option(
        (), "settings, or TASK.NAME=VALUE", "--set", dest="set", nargs="+", action="extend", metavar="NAME=VALUE"
    )
    tags: tuple[str, ...] = option(
        (),
        "noted in the result; training.report plots over pairs=N and views=N",
        "--tag",
        dest="tag",
        nargs="+",
        action="extend",
        metavar="NAME=VALUE",
    )
    batch_size: int = option(16, "images in one forward pass", least=1, metavar="N")


def open_splits(requests: Sequence[Request]) -> list[dict[str, Split]]:
    """The images and annotations of each evaluation, read and checked once for those that share them.

    Raises:
        ValueError: a name, setting or dataset that cannot be.
    """
    splits = []
    for opened in try_splits(requests):
        if isinstance(opened, UserError):
            raise opened
        splits.append(opened)
    return splits


def try_splits(requests: Sequence[Request]) -> Iterator[dict[str, Split] | UserError]:
    """As `open_splits`, one by one; in place of those whose annotations cannot be, the reason."""
    opened: dict[tuple, dict[str, Split] | UserError] = {}
    keys = []
    for request in requests:
        kind = load_task(request.task, request.protocol).KIND
        settings = task_settings(request.task, request.dataset, request.settings, request.protocol)
        keys.append((request.dataset, request.data, kind, getattr(settings, "trainaug", None), request.limit))
    for key in keys:
        if key not in opened:
            try:
                opened[key] = open_dataset(*key)
            except UserError as error:
                opened[key] = error
        yield opened[key]


def evaluate(
    request: Request, model: nn.Module, extractor: Extractor, splits: dict[str, Split] | None = None
) -> tuple[dict[str, Any], Path]:
    """Run a task; returns the result and the JSON file that holds it.

    What was finished before is taken from OUT; a finished result is not computed again. The result is

        {"task", "model", "dataset", "settings", ..., "states": {state: {name: summary}},
         "difference": {name: summary}}, a summary being {"mean", "std", "values"}

    with one value a seed; the difference is denoised - raw (of pairs F - raw), seed by seed.

    Args:
        splits: of `open_splits`, where they are open already.

    Raises:
        ValueError: a name, setting or dataset that cannot be.
    """
    task = load_task(request.task, request.protocol)

    def settings_by(*words: str) -> Any:
        return task_settings(request.task, request.dataset, words, request.protocol)

    def changes(word: str) -> bool:
        try:
            return settings_by(word) != settings_by()
        except UserError:  # it can be beside the others alone, as a `least` above the usual `most`
            return True

    settings = settings_by(*request.settings)
    splits = splits or open_splits([request])[0]
    if request.pairs and request.protocol != "fast":
        raise UserError("--pairs holds maps of whole images: it goes with --protocol fast alone")
    if request.pairs and not getattr(task, "PAIRS", False):
        able = [name for name in TASKS if getattr(load_task(name), "PAIRS", False)]
        raise UserError(f"--pairs is for {', '.join(able)}, not for {request.task}")
    groups: list[tuple[Mapping[str, Any], Sequence[str]]]
    if request.pairs:
        parts = {part: split for part, split in splits.items() if part == "val" or task.KIND != "images"}
        groups = [*pair_data(request.pairs, parts, extractor, request.batch_size)]
    else:
        available = {*extractor.states, *(["artifacts"] if "denoised" in extractor.states else [])}
        features = {
            part: Features(extractor, split, request.cache, request.batch_size) for part, split in splits.items()
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
        "annotations": {part: split.digest for part, split in splits.items()},
        "input_size": extractor.reader.input_size,
        "dtype": extractor.dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "version": __version__,
    }
    states: dict[str, list[dict[str, float]]] = {}
    seconds = 0.0
    for data, wanted in groups:
        data_facts = {**facts, "features": {part: features.keys for part, features in data.items()}}
        for state in wanted:
            if SAME.get(state) in states:
                states[state] = states[SAME[state]]
                continue
            runs = [
                _run_once(task, data, settings, data_facts, state, seed, request)
                for seed in range(request.seed, request.seed + request.repeats)
            ]
            states[_label(state, request.model, extractor)] = [run["numbers"] for run in runs]
            seconds += sum(run["seconds"] for run in runs)
    known = _known_tags(request.model) if request.pretrained else {"weights": f"random, seed {request.seed}"}
    tags = {**known, **dict(tag.split("=", 1) for tag in request.tags)}
    if extractor.resized and not request.pairs:
        tags["input"] = f"{extractor.reader.input_size} px"
    if extractor.dtype != "float32":
        tags["dtype"] = extractor.dtype
    if request.pairs:
        facts["pairs"] = [group["val"].keys["pairs"] for group, _ in groups]
        states = {state: states[state] for state in STATES if state in states}
    result = {
        **facts,
        "data": str(request.data.resolve()),
        "pair_folders": [str(folder) for folder in request.pairs],
        "limit": request.limit,
        "changed": [word for word in request.settings if changes(word)],
        "tags": tags,
        "seed": request.seed,
        "repeats": request.repeats,
        "states": {state: _summaries(numbers) for state, numbers in states.items()},
        "difference": _difference(states),
        "seconds": round(seconds, 1),
    }
    how = [*(["pairs"] if request.pairs else []), *([] if request.protocol == "fast" else [request.protocol])]
    path = (
        request.out
        / f"{slug(request.task, request.dataset, request.model, *how)}-{_key({**facts, 'tags': tags})[:8]}.json"
    )
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
    record = {"numbers": numbers, "seconds": time.monotonic() - start}
    write_json(done, record)
    for left in (checkpoint, checkpoint.with_suffix(".validations")):
        left.unlink(missing_ok=True)
    return record


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
    try:
        return {"pairs": str(_trained(model)["pairs"]["count"])}
    except (KeyError, TypeError):
        return {}


def _trained(model: str) -> dict[str, Any]:
    """What a model's folder says of its training; nothing where it says none."""
    try:
        settings = json.loads((Path(model.removeprefix("local-dir:")) / "settings.json").read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _label(state: str, model: str, extractor: Extractor) -> str:
    """A distilled ViT has one state, which is no raw one."""
    if len(extractor.states) > 1:
        return state
    return "distilled" if "distilled" in model or _trained(model).get("task") == "stage 3" else state


def _summaries(numbers: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {name: summarize([run[name] for run in numbers]) for name in numbers[0]}


def _difference(states: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    after = next((state for state in ("denoised", "F", "view-average") if state in states), None)
    if after is None or "raw" not in states:
        return {}
    raw, denoised = states["raw"], states[after]
    shared = [name for name in raw[0] if name in denoised[0]]
    return {name: summarize([b[name] - a[name] for a, b in zip(raw, denoised)]) for name in shared}


def _key(facts: Mapping[str, Any]) -> str:
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def slug(*names: str) -> str:
    """A name for files: of a folder's path the last part."""
    return "_".join(re.sub(r"[^\w.-]+", "-", Path(name).name if "/" in name else name) for name in names)
