"""What a run needs and how long it takes here: data and weights looked for, and each evaluation timed on a few images.

Seconds of an evaluation are taken to be a + b images + c steps (of a head; or epochs of as many images), as three small
runs of it say: the same on twice the images, and with a step more.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from timm_dvt.bars import tqdm
from training.common.models import load_model, pick_device
from training.evaluate.__main__ import make_parser
from training.evaluate.datasets import named
from training.evaluate.features import Extractor
from training.evaluate.registry import load_task, task_settings
from training.evaluate.runner import Request, evaluate, open_splits
from training.reproduction.jobs import Job

SAMPLE = 8  # images of a split


@dataclass
class Plan:
    """What is known of a job: why it cannot be run, or how many seconds it takes (None: not timed)."""

    job: Job
    missing: str | None = None
    seconds: float | None = None


def missing_data(job: Job) -> str | None:
    """Why an evaluation's data cannot be read, in a line; None if they can. Annotations are not looked into."""
    assert job.row is not None
    args = make_parser().parse_args(job.command[1:])
    found = _images(args.dataset, Path(args.data), load_task(args.task, args.protocol).KIND)
    return found if isinstance(found, str) else None


def plan(jobs: Sequence[Job], done: Any) -> list[Plan]:
    """What is known of each job; those that are `done` take no time. The models are loaded, once each."""
    plans = []
    models = _Models()
    for job in tqdm(jobs, desc="timing", unit="evaluation", leave=False):
        if done(job):
            plans.append(Plan(job, seconds=0.0))
        elif missing := missing_data(job):
            plans.append(Plan(job, missing=missing))
        elif any(not done(need) for need in job.needs):
            plans.append(Plan(job))  # its denoiser is yet to be made
        else:
            plans.append(models.timed(job))
    return plans


class _Models:
    """The last model that was loaded: jobs of one follow each other."""

    def __init__(self) -> None:
        self._name = ""
        self._loaded: nn.Module | None = None

    def timed(self, job: Job) -> Plan:
        args = make_parser().parse_args(job.command[1:])
        try:
            if self._name != args.model:
                self._name, self._loaded = args.model, None
                model = load_model(args.model, pretrained=args.pretrained, seed=args.seed)
                self._loaded = model.to(pick_device(args.device))
            if self._loaded is None:
                return Plan(job, missing=f"no weights of {args.model}")
            extractor = Extractor(self._loaded, args.input_size, args.dtype)
            return Plan(job, seconds=_seconds(args, self._loaded, extractor))
        except (ValueError, TypeError, OSError) as error:
            return Plan(job, missing=str(error).splitlines()[0])


def _seconds(args: Any, model: Any, extractor: Extractor) -> float:
    """Of the whole evaluation, all its states and repeats."""
    images = _images(args.dataset, Path(args.data), load_task(args.task, args.protocol).KIND)
    assert isinstance(images, int)
    request = Request(
        task=args.task,
        model=args.model,
        dataset=args.dataset,
        data=Path(args.data),
        out=Path(),
        cache=None,
        protocol=args.protocol,
        settings=tuple(args.set),
        batch_size=args.batch_size,
    )
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

    (count, base), (twice, double) = run(SAMPLE, 1), run(2 * SAMPLE, 1)
    whole = min(images, args.limit * 2) if args.limit else images
    total = base + max(double - base, 0) / max(twice - count, 1) * max(whole - count, 0)
    if unit:
        step = max(run(SAMPLE, 2)[1] - base, 0) * (whole / count if unit == "epochs" else 1)
        total += step * (getattr(settings, unit) - 1)
    return total * args.repeats


def _exact(folder: Path, rounded: float) -> float:
    """The seconds of a small run, which its result rounds to tenths."""
    return sum(json.loads(path.read_text())["seconds"] for path in (folder / "parts").glob("*.json")) or rounded


@lru_cache(maxsize=64)
def _images(dataset: str, folder: Path, kind: str) -> int | str:
    """How many images there are of a kind in all parts, or why they cannot be read."""
    try:
        count = sum(map(len, named(dataset).read(folder, kind).values()))
    except (OSError, RuntimeError, ValueError) as error:
        return f"{dataset} under {folder}: {str(error).splitlines()[0]}"
    return count or f"{dataset} under {folder}: no images"
