"""Evaluate frozen features, raw against denoised, on one of the paper's tasks or on all.

    python -m training.evaluate linear-seg --model vit_base_patch14_dinov2.lvd142m_dvt --dataset voc --data DIR
    python -m training.evaluate all --model vit_small_patch14_dinov2.focus_dvt --dataset stamps --data DIR

Each task prints a table (raw, denoised, difference) and writes it as JSON to OUT. Kill it whenever you like, and
run the same command again to continue. python -m training.report OUT makes one table of all results in OUT.

Exit code: 0 done; 1 a probe diverged; 2 the command or the data is wrong; 130 stopped by Ctrl-C.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from timm_dvt.errors import UserError
from timm_dvt.loading import load_model, pick_device
from timm_dvt.options import add_options, build
from training.common.backbone import DTYPES
from training.common.command import (
    Diverged,
    add_model_arguments,
    command_parser,
    complain,
    exit_code_of,
    flush_subnormals,
    positive,
)
from training.evaluate.data.datasets import DATASETS, kinds_of
from training.evaluate.features.extractor import Extractor
from training.evaluate.features.pairs import input_size_of
from training.evaluate.results import OF_FEATURES
from training.evaluate.runner import Request, evaluate, open_splits, try_splits
from training.evaluate.tables import result_table
from training.evaluate.tasks import TASKS, load_task, task_settings, tasks_of


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    flush_subnormals()
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for."""
    bad = [tag for tag in args.tag if "=" not in tag or tag.split("=")[0] in OF_FEATURES]
    if bad:
        raise UserError(f"--tag takes NAME=VALUE, and of names not {' or '.join(OF_FEATURES)}, got {bad[0]!r}")
    tags = [tag.split("=")[0] for tag in args.tag]
    if twice := [tag for tag in tags if tags.count(tag) > 1]:
        raise UserError(f"--tag gives {twice[0]} twice; leave out one of the two")
    names = [args.task]
    if args.task == "all":
        kinds = kinds_of(args.dataset, args.data)
        names = [name for name in tasks_of(args.protocol) if load_task(name, args.protocol).KIND in kinds]
        if args.pairs:
            names = [name for name in names if getattr(load_task(name, args.protocol), "PAIRS", False)]
    request = build(Request, args)
    cache = None if args.cache == Path("off") else args.cache or args.out / "features"
    requests = [replace(request, task=name, cache=cache) for name in names]
    # Before anything slow.
    splits = [*try_splits(requests)] if args.task == "all" else open_splits(requests)
    device = pick_device(args.device)
    model = load_model(args.model, pretrained=args.pretrained, seed=args.seed).to(device)
    extractor = Extractor(model, args.input_size or input_size_of(request.pairs), args.dtype)
    code = 0
    for request, opened in zip(requests, splits):
        try:
            if isinstance(opened, UserError):
                raise opened
            result, path = evaluate(request, model, extractor, opened)
        except FileNotFoundError as error:  # an image or mask that a list names
            if not Path(error.filename or "").is_relative_to(args.data):
                raise
            layout = DATASETS[args.dataset].layout
            raise UserError(f"there is no file {error.filename}\nExpected layout:\n{layout}") from error
        except (UserError, Diverged) as error:
            if args.task != "all":
                raise
            code = complain(1 if isinstance(error, Diverged) else 2, f"left out {request.task}: {error}")
            continue
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            print(f"{result_table(result)}\n  {result['seconds']} s, {path}\n", flush=True)
    return code


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    small = ", ".join(name for name, dataset in DATASETS.items() if dataset.small)
    parser = command_parser("evaluate", __doc__)
    parser.epilog = (
        f"{parser.epilog}\nSettings (--set), the paper's / on {small} where they differ:\n{describe_settings()}"
    )
    parser.add_argument("task", choices=[*TASKS, "all"], metavar="TASK", help=", ".join([*TASKS, "all"]))
    add_model_arguments(parser)
    add_options(parser, Request)
    parser.add_argument(
        "--input-size",
        type=positive,
        metavar="PX",
        help="side of the square input (default: that of --pairs, or the model's)",
    )
    parser.add_argument("--json", action="store_true", help="print results as lines of JSON instead of tables")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of forward passes (default: %(default)s)"
    )
    return parser


def describe_settings() -> str:
    """One line a task and protocol: its settings with their defaults."""
    lines = []
    for name in TASKS:
        paper, small = (asdict(task_settings(name, dataset)) for dataset in ("voc", "stamps"))
        words = [f"{k}={v}" if v == small[k] else f"{k}={v}/{small[k]}" for k, v in paper.items()]
        lines.append(f"  {name}: {', '.join(words)}")
    for name in tasks_of("repository"):
        settings = asdict(task_settings(name, "voc", protocol="repository"))
        lines.append(f"  {name} --protocol repository: {', '.join(f'{k}={v}' for k, v in settings.items())}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
