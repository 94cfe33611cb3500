"""What the trainings of stages 2 and 3 share on a command line: length, batch, schedule and what is written when."""

import argparse

from training.common.backbone import DTYPES
from training.common.command import at_least_zero, positive, whole
from training.loop.distributed import Processes
from training.loop.order import split_places


def add_training_arguments(
    parser: argparse.ArgumentParser,
    of: str,
    weight_decay: float,
    val_fraction: float,
    *,
    lr: float | None = None,
    lr_help: str = "%(default)s",
    warmup: int | None = 0,
    warmup_help: str = "%(default)s",
) -> None:
    """Give a command line what stages 2 and 3 share: length, batch, schedule and what is written when.

    Args:
        of: "pairs" or "images", what is trained on.
        weight_decay, val_fraction, lr, warmup: defaults; where one is None, its help says what it then is.
    """
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, default=10, help="(default: the paper's %(default)s)")
    length.add_argument("--steps", type=positive, metavar="N", help="optimiser steps, instead of epochs")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        help="of each process, so that 2 processes at 32 do what one does at 64 (default: the paper's %(default)s)",
    )
    group.add_argument("--lr", type=at_least_zero, default=lr, help=f"highest; a cosine from there to 0 ({lr_help})")
    group.add_argument(
        "--warmup", type=int, default=warmup, metavar="N", help=f"steps that lr rises first ({warmup_help})"
    )
    group.add_argument("--weight-decay", type=at_least_zero, default=weight_decay, help="of AdamW (%(default)s)")
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
        default=val_fraction,
        help=f"of the {of}, held out for the validation loss (default: %(default)s)",
    )


def run_length(args: argparse.Namespace, count: int, found: str, processes: Processes) -> tuple[int, int]:
    """Optimiser steps, and samples a step over all processes, that a command line of `add_training_arguments` means.

    Args:
        args: the command line.
        count: samples, those held out among them.
        found: tells where they are and how many, for the error.
        processes: this process and the others.

    Raises:
        ValueError: a fraction or warm-up that cannot be, or no sample is left to train on.
    """
    if not 0 <= args.val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {args.val_fraction}")
    training, _ = split_places(count, args.val_fraction, args.seed)
    if not training:
        raise ValueError(f"{found}: too few for --val-fraction {args.val_fraction}")
    batch_size = args.batch_size * processes.count
    steps = args.steps or -(-args.epochs * len(training) // batch_size)
    if args.warmup is not None and not 0 <= args.warmup < steps:
        raise ValueError(f"warmup must be from 0 to below the {steps} steps of the run, got {args.warmup}")
    return steps, batch_size
