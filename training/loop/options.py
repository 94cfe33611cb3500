"""What the trainings of stages 2 and 3 share on a command line: length, batch, schedule and what is written when."""

from __future__ import annotations

import argparse
from typing import Any

from timm_dvt.errors import UserError
from training.common.backbone import DTYPES
from training.common.command import at_least_zero, positive, whole
from training.loop.distance import DISTANCES
from training.loop.distributed import Processes
from training.loop.order import split_places
from training.loop.settings import TrainingSettings


class _Instead(argparse.Action):
    """An option that takes the place of another one, whatever a recipe says of that."""

    def __init__(self, *args: Any, instead_of: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self.instead_of = instead_of

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.instead_of, None)
        setattr(namespace, self.dest, values)


def steps_or_share(text: str) -> int | float:
    """A number of steps, or with a percent sign a share of all steps below 1, for argparse."""
    if not text.endswith("%"):
        return whole(text)
    share = float(text[:-1]) / 100
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"must be from 0% to below 100%, got {text}")
    return share


def add_training_arguments(parser: argparse.ArgumentParser, of: str, defaults: TrainingSettings, **more: Any) -> None:
    """Give a command line what stages 2 and 3 share: length, batch, schedule and what is written when.

    Args:
        of: "pairs" or "images", what is trained on.
        defaults: whose weight decay and validation fraction are the command's.
        more: further defaults, by option.
    """
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=positive, default=10, action=_Instead, instead_of="steps", help="(default: the paper's 10)"
    )
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps, instead of epochs")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=defaults.batch_size,
        help="of each process, so that 2 processes at 32 do what one does at 64 (default: the paper's %(default)s)",
    )
    group.add_argument("--loss", choices=DISTANCES, default=defaults.loss, help="see training/loop/distance.py")
    rate = group.add_mutually_exclusive_group()
    rate.add_argument(
        "--lr",
        type=at_least_zero,
        action=_Instead,
        instead_of="base_lr",
        help=f"highest; a cosine from there (default: {defaults.lr:g}, or as --base-lr has it)",
    )
    rate.add_argument(
        "--base-lr",
        type=at_least_zero,
        action=_Instead,
        instead_of="lr",
        metavar="LR",
        help="highest at a batch of 256, and times sqrt(batch / 256) at others",
    )
    group.add_argument("--min-lr", type=at_least_zero, default=defaults.min_lr, help="at the end (%(default)s)")
    group.add_argument(
        "--warmup", type=steps_or_share, default=defaults.warmup, metavar="N", help="steps, or N%%, that lr rises first"
    )
    group.add_argument(
        "--weight-decay", type=at_least_zero, default=defaults.weight_decay, help="of AdamW (%(default)s)"
    )
    group.add_argument(
        "--decay-all",
        action=argparse.BooleanOptionalAction,
        default=defaults.decay_all,
        help="decay position embeddings, norms and biases too (default: matrices alone, as timm)",
    )
    group.add_argument("--dtype", choices=list(DTYPES), default="float32", help="bfloat16: by autocast (%(default)s)")
    group.add_argument(
        "--workers",
        type=whole,
        metavar="N",
        help="threads that read ahead; 0 reads between steps (default: 2; 0 on a CPU, all of which the training needs)",
    )
    group.add_argument(
        "--checkpoint-every", type=positive, default=200, metavar="N", help="steps; changes no result (%(default)s)"
    )
    group.add_argument(
        "--val-every", type=positive, metavar="N", help="steps between validations (default: ten in a run)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=defaults.val_fraction,
        help=f"of the {of}, held out for the validation loss (default: %(default)s)",
    )
    parser.set_defaults(**more)


def training_settings(
    args: argparse.Namespace, count: int, found: str, processes: Processes, lr: float = TrainingSettings.lr
) -> dict[str, Any]:
    """The values of `TrainingSettings` that a command line of `add_training_arguments` means.

    Args:
        args: the command line.
        count: samples, those held out among them.
        found: tells where they are and how many, for the error.
        processes: this process and the others.
        lr: where the command line says nothing of it.

    Raises:
        ValueError: a fraction or warm-up that cannot be, or no sample is left to train on.
    """
    if not 0 <= args.val_fraction < 1:
        raise UserError(f"val_fraction must be at least 0 and below 1, got {args.val_fraction}")
    training, _ = split_places(count, args.val_fraction, args.seed)
    if not training:
        raise UserError(f"{found}: too few for --val-fraction {args.val_fraction}")
    batch_size = args.batch_size * processes.count
    steps = args.steps or -(-args.epochs * len(training) // batch_size)
    warmup = int(args.warmup * steps) if isinstance(args.warmup, float) else args.warmup
    if warmup >= steps:
        raise UserError(f"warmup must be from 0 to below the {steps} steps of the run, got {warmup}")
    if args.base_lr is not None:
        lr = args.base_lr * (batch_size / 256) ** 0.5
    return {
        "steps": steps,
        "batch_size": batch_size,
        "loss": args.loss,
        "lr": lr if args.lr is None else args.lr,
        "min_lr": args.min_lr,
        "warmup": warmup,
        "weight_decay": args.weight_decay,
        "decay_all": args.decay_all,
        "dtype": args.dtype,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
    }
