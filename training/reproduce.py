"""The paper's tables again: ours beside every number that the authors published, with the difference and the spread.

    python -m training.reproduce --data DIR --out OUT --plan         # what will run, what is missing, how long it takes
    python -m training.reproduce --data DIR --out OUT
    torchrun --nproc-per-node 8 -m training.reproduce ... (the same; with --nnodes on several machines)
    python -m training.reproduce ... --part 3/16                     # in an array of jobs

DIR holds the data sets as DIR/voc, DIR/ade20k, DIR/nyu, DIR/coco and DIR/imagefolder (ImageNet), each in its standard
layout (python -m training.evaluate TASK --dataset NAME --data DIR says which), or is itself one of them. Each number is
that of a python -m training.evaluate, which is printed. What cannot be run is reported, and the rest continues. Kill it
whenever you like, and run the same command again to continue. Where annotations in DIR were corrected, delete OUT/jobs
first: what they do not change is not computed again. OUT/reproduction.html is the page, OUT/RESULTS.md the table;
python -m training.report OUT/results draws Fig. 7.

The denoisers are the published ones. With --train paper or repository they are made first, by that recipe, from 10,000
images of VOC (5.2) or of --images; Tabs. 5 and 6 need that.

Exit code: 0 every number is there; 1 some could not be had; 2 the command is wrong; 3 OUT cannot be written;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm_dvt.errors import UserError
from timm_dvt.inspection.findings import duration
from timm_dvt.options import part
from timm_dvt.shared_folder import SharedFolder, write_atomically
from training.common.command import command_parser, exit_code_of, flush_subnormals, positive
from training.reproduction.jobs import Job, Options, Runner, job_of, write_lists
from training.reproduction.plan import missing_data, numbers_missing, plan
from training.reproduction.published import BACKBONES, TABLES, Row, select
from training.reproduction.results import outcome, results_page, results_table, short_title


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    flush_subnormals()
    return exit_code_of(lambda: run(args))


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = command_parser("reproduce", __doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="the data sets")
    parser.add_argument("--out", required=True, metavar="OUT", help="made, or continued if it exists")
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(BACKBONES),
        metavar="NAME",
        help="backbones (default: all that the authors published); for others nothing was published",
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="(default: all)")
    parser.add_argument(
        "--protocol",
        choices=("repository", "fast"),
        default="repository",
        help="of segmentation, depth and detection: that of the authors' code (default), or a quicker one",
    )
    parser.add_argument("--plan", action="store_true", help="only say what would be run, and how long it takes")
    parser.add_argument("--part", type=part, default=(1, 1), metavar="I/N", help="only the I-th of N parts of the work")
    parser.add_argument("--train", choices=("paper", "repository"), help="make the denoisers first, by this recipe")
    parser.add_argument("--images", metavar="DIR", help="what --train learns from (default: 10,000 of VOC's)")
    parser.add_argument("--repeats", type=positive, default=3, help="seeds of each evaluation (default: %(default)s)")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N images of a split, for a trial")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="TASK.NAME=VALUE", help="settings, for a trial"
    )
    for name, command in (("evaluate", "evaluate"), ("stage1", "denoise_images"), ("stage2", "train_denoiser")):
        parser.add_argument(
            f"--{name}", type=shlex.split, default=[], metavar="'WORDS'", help=f"more options of training.{command}"
        )
    return parser


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for. Raises ValueError, OutputError."""
    options = Options(
        data=Path(args.data),
        out=Path(args.out),
        protocol=args.protocol,
        recipe=args.train,
        images=args.images,
        repeats=args.repeats,
        limit=args.limit,
        settings=tuple(args.set),
        evaluate=tuple(args.evaluate),
        stage1=tuple(args.stage1),
        stage2=tuple(args.stage2),
    )
    if not options.data.is_dir():
        raise UserError(f"--data must be a folder of data sets, got {args.data}")
    rows = select(args.tables, args.models)
    if not rows:
        raise UserError(f"--tables {' '.join(args.tables)} say nothing of --models {' '.join(args.models)}")
    found = {row: job_of(row, options) for row in rows}
    jobs = list({job.name: job for job in found.values() if isinstance(job, Job)}.values())
    with SharedFolder(options.out) as folder:
        runner = Runner(folder)
        if options.recipe:
            try:
                write_lists(folder, options)
            except (FileNotFoundError, RuntimeError) as error:  # of VOC; what needs it will say so
                print(f"no VOC to learn from: {error}", file=sys.stderr)
        if args.plan:
            print(describe(found, runner))
            return 0
        number, parts = args.part
        able = []
        for job in jobs[number - 1 :: parts]:
            reason = None if runner.done(job) else missing_data(job)
            if reason:
                runner.fail(job, reason)
            else:
                able.append(job)
        runner.run(able)
        with folder.alone():  # whoever ends last writes all that there is
            outcomes = [
                outcome(row, runner.record(job) if isinstance(job, Job) else {"error": job})
                for row, job in found.items()
            ]
            write_atomically(options.out / "reproduction.html", results_page(outcomes))
            write_atomically(options.out / "RESULTS.md", results_table(outcomes).encode())
    had = sum(one.mean is not None for one in outcomes)
    print(f"{had} of {len(outcomes)} numbers: {options.out / 'reproduction.html'}, {options.out / 'RESULTS.md'}")
    return 0 if had == len(outcomes) else 1


def describe(found: Mapping[Row, Job | str], runner: Runner) -> str:
    """The plan in words: a line a job, with what it is for, the sum, and a line a reason for what no job gives."""
    uses: dict[str, dict[str, None]] = {}  # of each job, or of each reason why there is none
    numbers: dict[str, dict[str, None]] = {}
    jobs = {}
    for row, job in found.items():
        name = job if isinstance(job, str) else job.name
        uses.setdefault(name, {}).update(dict.fromkeys((short_title(row.table), *row.settings)))
        numbers.setdefault(name, {})[row.key[2]] = None
        if isinstance(job, Job):
            jobs[name] = job
    plans = plan(list(jobs.values()), runner.done)
    lines = []
    for one in plans:
        name = one.job.name
        state = f"missing: {one.missing}" if one.missing else f"about {duration(one.seconds)}"
        if one.job.row and (lost := numbers_missing(one.job, numbers[name])):
            state += f", but for {', '.join(lost)}: no images"
        lines.append(
            f"{name} ({', '.join(uses.get(name, ['for what follows']))}): {'done' if runner.done(one.job) else state}"
        )
    short = sum(one.missing is not None for one in plans)
    seconds = sum(one.seconds for one in plans)
    lines.append(
        f"{len(plans)} jobs, {short} of them without data or weights"
        + (f"; the others take about {duration(seconds)} in one process here" if seconds else "")
    )
    lines += [f"not run ({', '.join(tables)}): {reason}" for reason, tables in uses.items() if reason not in jobs]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
