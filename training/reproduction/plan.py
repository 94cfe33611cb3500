"""What a run needs and how long it takes here: data and weights looked for, and each evaluation timed on a few images.

Seconds of an evaluation are taken to be a + b images + c steps (of a head; or epochs of as many images), as three small
runs of it say: the same on twice the images, and with a step more.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from timm_dvt import add_denoiser
from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError
from timm_dvt.loading import load_model, pick_device
from timm_dvt.options import build
from training.common.models import load_backbone
from training.evaluate.__main__ import make_parser
from training.evaluate.data.datasets import named, reason
from training.evaluate.features.extractor import Extractor
from training.evaluate.features.pairs import STATES
from training.evaluate.runner import Request, evaluate, open_splits
from training.evaluate.tasks import load_task, task_settings
from training.reproduction.jobs import Job, value_of
from training.reproduction.making import seconds_to_make

FEW, SAMPLE = 2, 8  # images of a split: few where they take LONG, as detectors do
LONG = 5.0  # seconds


@dataclass
class Plan:
    """What is known of a job: why it cannot be run, or how many seconds it takes; 0 if it is done."""

    job: Job
    missing: str | None = None
    seconds: float = 0.0


def missing_data(job: Job) -> str | None:
    """Why an evaluation's data cannot be read, in a line; None if they can. Annotations are not looked into."""
    found = _counts(make_parser().parse_args(job.command[1:]))
    return found if isinstance(found, str) else None


def numbers_missing(job: Job, numbers: Iterable[str]) -> list[str]:
    """Those of an evaluation's numbers, such as CorLoc/voc2007, whose images are not there, where others' are."""
    counts = _counts(make_parser().parse_args(job.command[1:]))
    return [] if isinstance(counts, str) else [name for name in numbers if name.split("/")[-1] not in {*counts, name}]


def plan(jobs: Sequence[Job], done: Callable[[Job], bool]) -> list[Plan]:
    """What is known of each job, and before them of those that they need. The models are loaded."""
    needs = {need.name: need for job in jobs for each in job.needs for need in (*each.needs, each)}
    model = _Model()
    ways = [(job, seconds_to_make) for job in needs.values()] + [(job, model.seconds) for job in jobs]
    return [_plan(job, done, way) for job, way in tqdm(ways, desc="timing", leave=False)]


def _plan(job: Job, done: Callable[[Job], bool], seconds: Callable[[Job], float]) -> Plan:
    if done(job):
        return Plan(job)
    if job.row is not None and (missing := missing_data(job)):
        return Plan(job, missing)
    try:
        return Plan(job, seconds=seconds(job))
    except (UserError, OSError) as error:
        return Plan(job, str(error).splitlines()[0])


class _Model:
    """The model of an evaluation, kept for those that follow; where its denoiser is not made yet, one of noise."""

    def __init__(self) -> None:
        self._name, self._model = "", nn.Module()

    def seconds(self, job: Job) -> float:
        """How long an evaluation takes. Raises ValueError, TypeError where there is no such model, or no weights."""
        args = make_parser().parse_args(job.command[1:])
        if self._name != args.model:
            unmade = args.model.startswith("local-dir:") and job.needs and not Path(args.model[10:]).exists()
            name = value_of(job.needs[0].command, "--model") if unmade else args.model
            load = load_backbone if unmade else load_model
            model = load(name, pretrained=args.pretrained, seed=args.seed)
            model = add_denoiser(model) if unmade else model
            self._name, self._model = args.model, model.to(pick_device(args.device))
        states = len(STATES) if args.pairs else 1  # of pairs each is an evaluation, of one state, of the raw model
        return states * _seconds(args, self._model, Extractor(self._model, args.input_size, args.dtype))


def _seconds(args: Any, model: nn.Module, extractor: Extractor) -> float:
    """Of the whole evaluation, all its states and repeats."""
    counts = _counts(args)
    assert not isinstance(counts, str)
    request = replace(build(Request, args), out=Path(), cache=None, pairs=(), tags=(), seed=0, repeats=1)
    settings = task_settings(args.task, args.dataset, args.set, args.protocol)
    unit = next((field.name for field in fields(settings) if field.name in ("steps", "epochs")), None)
    more = ["validate_every=1000000"] if hasattr(settings, "validate_every") else []

    def run(limit: int, steps: int) -> tuple[int, float]:
        """Images and seconds of a small run."""
        few = (*request.settings, *more, *([f"{unit}={steps}"] if unit else []))
        with tempfile.TemporaryDirectory() as folder:
            sample = replace(request, out=Path(folder), limit=limit, settings=few)
            splits = open_splits([sample])[0]
            result, _ = evaluate(sample, model, extractor, splits)
            return sum(map(len, splits.values())), _exact(Path(folder), result["seconds"])

    few, sample = (min(number, args.limit or number) for number in (FEW, SAMPLE))
    base = 0.0
    if few < sample:
        with suppress(ValueError):  # among so few there may be none that counts
            count, base = run(few, 1)
    if base < LONG:
        count, base = run(sample, 1)
    else:
        sample = few
    whole = sum(min(number, args.limit or number) for number in counts.values())
    total = base
    if whole > count:
        twice, double = run(2 * sample, 1)
        total += max(double - base, 0) / max(twice - count, 1) * (whole - count)
    if unit:
        step = max(run(sample, 2)[1] - base, 0) * (whole / count if unit == "epochs" else 1)
        total += step * (getattr(settings, unit) - 1)
    return total * args.repeats


def _exact(folder: Path, rounded: float) -> float:
    """The seconds of a small run, which its result rounds to tenths."""
    return sum(json.loads(path.read_text())["seconds"] for path in (folder / "parts").glob("*.json")) or rounded


def _counts(args: Any) -> dict[str, int] | str:
    """How many images an evaluation's parts have, or why they cannot be read."""
    return _read_counts(args.dataset, Path(args.data), load_task(args.task, args.protocol).KIND)


@lru_cache(maxsize=64)
def _read_counts(dataset: str, folder: Path, kind: str) -> dict[str, int] | str:
    try:
        counts = {part: len(split) for part, split in named(dataset).read(folder, kind).items()}
    except (OSError, RuntimeError, UnicodeError, UserError) as error:  # as `open_dataset`
        return f"{dataset} under {folder}: {reason(error).splitlines()[0]}"
    return counts if all(counts.values()) else f"{dataset} under {folder}: no images"
