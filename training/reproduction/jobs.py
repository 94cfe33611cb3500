"""What has to be run for the rows of the table: commands of this project, each with a record of what came of it.

    OUT/jobs/NAME.json        the result of training.evaluate, or the reason why there is none
    OUT/logs/NAME.log         what the command said
    OUT/results/              --out of training.evaluate, which training.report reads
    OUT/pairs, OUT/denoisers  with --train, of each backbone

Whoever finds a job that is neither done nor claimed does it, so processes of torchrun, of several machines and of an
array of jobs share them, and a killed run goes on.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from timm_dvt.shared_folder import SharedFolder, write_atomically
from timm_dvt.version import __version__
from training.evaluate.data.voc import read_voc
from training.evaluate.runner import slug
from training.evaluate.tables import write_json
from training.evaluate.tasks import tasks_of
from training.reproduction.published import ROWS, Row, evaluated

TRAINING_IMAGES = 10_000  # 5.2: at random of VOC2012 and VOC2007, without those of the evaluation
_VIEW_AVERAGE = ("--solver", "linear", "--no-artifacts", "--crops", "0")  # whatever solves the recipe's other maps
ALONE = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # of torchrun: a job is one process, on the GPU of LOCAL_RANK


@dataclass(frozen=True)
class Options:
    """Of all rows; see the options of training/reproduce.py."""

    data: Path
    out: Path
    protocol: str = "repository"
    recipe: str | None = None
    images: str | None = None
    repeats: int = 3
    limit: int | None = None
    settings: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()  # further words for training.evaluate, of stage 1 and of stage 2
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: by which it is claimed, recorded and logged.
        command: the words after python -m.
        needs: what has to be done before.
        shared: whether several processes do it together.
        row: one of those that it gives, if it is an evaluation.
        made: the last file that it writes; None if its record is what says that it is done.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[Job, ...] = ()
    shared: bool = False
    row: Row | None = field(default=None, compare=False)
    made: Path | None = None


def data_folder(options: Options, dataset: str) -> Path:
    """Where a data set lies, or would: DATA/NAME; or DATA itself, if there is none of them below it."""
    below = any((options.data / row.key[1]).is_dir() for row in ROWS)
    return options.data / dataset if below else options.data


def protocol_of(options: Options, row: Row) -> str:
    """The repository's where it is asked for and there is one."""
    able = options.protocol == "repository" and row.made != "pairs" and row.key[0] in tasks_of("repository")
    return "repository" if able else "fast"


def job_of(row: Row, options: Options) -> Job | str:
    """The evaluation that gives a row, or the reason why there is none."""
    task, dataset, _ = row.key
    needs: tuple[Job, ...] = ()
    model, more = evaluated(row), [*row.settings, *options.settings]
    words: list[str] = []
    if row.made and options.recipe is None:
        made = "stage 1's maps of VOC2012" if row.made == "pairs" else f"the denoiser {row.made}"
        return f"needs --train, which makes {made}"
    if row.made == "pairs":
        needs = tuple(_pairs(row.backbone, "voc12", options, *plain) for plain in ((), _VIEW_AVERAGE))
        model, words = row.backbone, ["--pairs", *(value_of(job.command, "--out") for job in needs)]
    elif options.recipe is not None and row.suffix == "dvt":
        needs = (_denoiser(row.backbone, row.made or "block", options),)
        model = f"local-dir:{value_of(needs[0].command, '--out')}"
    folder = data_folder(options, dataset)
    words += ["--model", model, "--dataset", dataset, "--data", str(folder), "--repeats", str(options.repeats)]
    words += ["--protocol", protocol_of(options, row)] + (["--set", *more] if more else [])
    words += (["--limit", str(options.limit)] if options.limit else []) + list(options.evaluate)
    command = ("training.evaluate", task, *words, "--out", str(options.out / "results"), "--json")
    return _job((task, dataset, model), command, options, needs, row=row)


def _denoiser(backbone: str, arch: str, options: Options) -> Job:
    """Stage 2, of stage 1 of the paper's images."""
    pairs = _pairs(backbone, "train", options)
    out = options.out / "denoisers" / slug(backbone, arch, *_taken(options, "train")[1:])
    words = ["--recipe", str(options.recipe), "--model", backbone, "--pairs", value_of(pairs.command, "--out")]
    command = ("training.train_denoiser", *words, "--arch", arch, *options.stage2, "--out", str(out))
    return _job(("denoiser", backbone, arch), command, options, (pairs,))


def _pairs(backbone: str, images: str, options: Options, *more: str) -> Job:
    """Stage 1, of the images of a list of `write_lists`, or of a folder."""
    taken = _taken(options, images)
    where = options.images if options.images and images == "train" else _list(options, images)
    out = options.out / "pairs" / slug(backbone, *taken, *(["no-artifacts"] if more else []))
    words = ["--recipe", str(options.recipe), "--model", backbone, "--images", where, *options.stage1, *more]
    return _job(("pairs", out.name), ("training.denoise_images", *words, "--out", str(out)), options, shared=True)


def _taken(options: Options, images: str) -> list[str]:
    """By which folders of what is made are told apart: the pairs of a trial are no part of the whole."""
    if not options.images or images != "train":
        return [images, *_limit(options)]
    where = Path(options.images).resolve()
    return [images, f"{where.name}-{sha256(str(where).encode(errors='surrogateescape')).hexdigest()[:6]}"]


def _limit(options: Options) -> list[str]:
    return [f"limit-{options.limit}"] if options.limit else []


def _list(options: Options, images: str) -> str:
    return str(options.out / "lists" / f"{'-'.join([images, *_limit(options)])}.txt")


def write_lists(folder: SharedFolder, options: Options) -> None:
    """The images that denoisers learn from (5.2), and those of Tab. 5. Raises OSError, RuntimeError without VOC."""
    voc = data_folder(options, "voc")
    masks = read_voc(voc, "masks", trainaug=False)
    judged = {path.resolve() for path in masks["val"].images}
    boxes = [path.resolve() for path in read_voc(voc, "boxes")["train"].images]
    learned = [path for path in dict.fromkeys(boxes) if path not in judged]
    if options.limit is None:
        learned = random.Random(0).sample(learned, min(TRAINING_IMAGES, len(learned)))
        shown = [*masks["train"].images, *masks["val"].images]
    else:
        learned = learned[: options.limit]
        shown = [path for split in masks.values() for path in split.limit(options.limit).images]
    for name, paths in (("train", learned), ("voc12", shown)):
        with folder.alone():
            text = "".join(f"{path.resolve()}\n" for path in paths)
            write_atomically(Path(_list(options, name)), text.encode(errors="surrogateescape"))


class Runner:
    """Runs jobs in a folder that others may work in too."""

    def __init__(self, folder: SharedFolder) -> None:
        self.folder, self._started = folder, time.time()

    def record(self, job: Job) -> Mapping[str, Any]:
        """What came of a job: "result" or "error", beside its command; empty if it was not run."""
        try:
            return json.loads(self._record(job).read_text())
        except FileNotFoundError:
            return {}

    def done(self, job: Job) -> bool:
        """Whether a job was done, by whomever, and not of other data, unless those are elsewhere by now."""
        if job.made is not None:
            return job.made.exists()
        record = self.record(job)
        if "result" not in record or "--data" not in job.command:
            return "result" in record
        before, now = (Path(value_of(command, "--data")) for command in (record["command"], job.command))
        return before.resolve() == now.resolve() or not before.exists()

    def failure(self, job: Job) -> str | None:
        """Why a job failed, for this process or for another one since this one began: it is not tried again."""
        path = self._record(job)
        return self.record(job).get("error") if path.exists() and path.stat().st_mtime >= self._started else None

    def run(self, jobs: Sequence[Job]) -> None:
        """See to it that all of the jobs are done or have failed, whoever does them."""
        for last_round in (False, True):
            for job in jobs:
                self._do(job, wait=last_round)

    def fail(self, job: Job, reason: str) -> None:
        """Note that a job cannot be done."""
        write_json(self._record(job), {"command": job.command, "error": reason})

    def _settled(self, job: Job) -> bool:
        return self.done(job) or self.failure(job) is not None

    def _do(self, job: Job, wait: bool) -> None:
        if self._settled(job):
            return
        for need in job.needs:
            self._do(need, wait=True)
            if not self.done(need):
                return self.fail(job, f"{need.name}: {self.failure(need)}")
        if job.shared:  # several processes do it together
            return self._start(job)
        with self.folder.claim(job.name, wait) as mine:
            if mine and not self._settled(job):
                self._start(job)

    def _start(self, job: Job) -> None:
        command = [sys.executable, "-m", *job.command]
        print(shlex.join(job.command), flush=True)
        log = self.folder.path / "logs" / f"{job.name}{f'-{os.getpid()}' if job.shared else ''}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in ALONE}
        with log.open("wb") as said:
            ended = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=said, preexec_fn=_die_with_parent
            )
        if ended.returncode == 130:
            raise KeyboardInterrupt
        if ended.returncode:
            return self.fail(job, _reason(log, ended.returncode))
        result = json.loads(ended.stdout.splitlines()[-1]) if job.row else {}
        write_json(self._record(job), {"command": job.command, "result": result})

    def _record(self, job: Job) -> Path:
        return self.folder.path / "jobs" / f"{job.name}.json"


def _die_with_parent() -> None:
    """Have Linux end this process when the one that started it dies, be it by kill -9: its work is free to others."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM


def _reason(log: Path, code: int) -> str:
    """Why a command failed: its error, or how it ended."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if code < 0:
        return f"was killed by signal {-code}; see {log}"
    return f"{lines[-1] if lines else f'ended with code {code}'}; see {log}"


def _job(
    title: Sequence[str], command: tuple[str, ...], options: Options, needs: tuple[Job, ...] = (), **more: Any
) -> Job:
    """A job whose name says all that decides its result, and not where folders lie on this machine."""
    words = list(command)
    for folder, name in ((options.out, "OUT"), (options.data, "DATA")):
        words = [re.sub(rf"^(local-dir:)?{re.escape(str(folder))}(?=/|$)", rf"\1{name}", word) for word in words]
    key = sha256(json.dumps([words, __version__]).encode()).hexdigest()[:8]
    return Job(f"{slug(*title)}-{key}", command, needs, **more)


def value_of(command: Sequence[str], option: str) -> str:
    """What a command gives for one of its options."""
    return command[command.index(option) + 1]
