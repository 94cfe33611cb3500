"""Options that several commands share: the model, the settings of stage 1, and those of a training."""

import argparse
from collections.abc import Sequence

from torch import nn

from training.backbone import DTYPES, FeatureReader
from training.decompose import SOLVERS, Stage1Settings
from training.distributed import Processes
from training.field import FieldSettings
from training.pair_loader import split_places


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command line --model, --pretrained / --no-pretrained, --seed and --device."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="any timm VisionTransformer or Eva: a timm name, hf-hub:OWNER/REPO or local-dir:FOLDER",
    )
    parser.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="pretrained weights, or, with --no-pretrained, random ones drawn from --seed (needs no network)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps or auto: a GPU if there is one (default)"
    )


def add_stage1_arguments(parser: argparse.ArgumentParser, views: int = Stage1Settings.views) -> None:
    """Give a command line the settings of stage 1; `stage1_settings` reads them."""
    group = parser.add_argument_group("stage 1")
    group.add_argument(
        "--solver",
        choices=SOLVERS,
        default="linear",
        help="linear: least squares, seconds an image (default); field: the paper's neural fields",
    )
    group.add_argument(
        "--views", type=int, default=views, help="forward passes an image (default: %(default)s; the paper's: 768)"
    )
    group.add_argument(
        "--area",
        type=float,
        nargs=2,
        default=Stage1Settings.area,
        metavar=("LEAST", "MOST"),
        help="of a view, as a share of the image's (default: the paper's %(default)s)",
    )
    group.add_argument(
        "--field-steps",
        type=int,
        metavar="N",
        default=FieldSettings.steps,
        help="steps of the field (default: the paper's %(default)s)",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="N",
        help="blocks counted from 0, or from the end with a minus, or 'all' (default: the last)",
    )
    group.add_argument(
        "--input-size", type=int, metavar="PX", help="(default: the paper's, 518 for patch 14, 512 for 16)"
    )
    group.add_argument(
        "--stride", type=int, metavar="PX", help="between patches; below the patch size for denser maps"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=Stage1Settings.batch_size,
        help="views in one forward pass (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of forward passes (default: %(default)s)"
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return int(text)


def whole(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return int(text)


def at_least_zero(text: str) -> float:
    """A finite number of at least 0, for argparse."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return float(text)


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


def run_length(args: argparse.Namespace, count: int, found: str, ranks: Processes) -> tuple[int, int]:
    """Optimiser steps, and samples a step over all processes, that a command line of `add_training_arguments` means.

    Args:
        args: the command line.
        count: samples, those held out among them.
        found: tells where they are and how many, for the error.
        ranks: this process and the others.

    Raises:
        ValueError: a fraction or warm-up that cannot be, or no sample is left to train on.
    """
    if not 0 <= args.val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {args.val_fraction}")
    training, _ = split_places(count, args.val_fraction, args.seed)
    if not training:
        raise ValueError(f"{found}: too few for --val-fraction {args.val_fraction}")
    batch_size = args.batch_size * ranks.count
    steps = args.steps or -(-args.epochs * len(training) // batch_size)
    if args.warmup is not None and not 0 <= args.warmup < steps:
        raise ValueError(f"warmup must be from 0 to below the {steps} steps of the run, got {args.warmup}")
    return steps, batch_size


def stage1_settings(args: argparse.Namespace, model: nn.Module) -> Stage1Settings:
    """Stage 1's settings from a command line, with layers, input size and stride filled in for this model.

    Raises:
        ValueError: a value that cannot be.
        TypeError: the model is none of timm's ViTs.
    """
    for name, least in (("views", 2), ("batch_size", 1), ("field_steps", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"{name} must be {least} or more, got {getattr(args, name)}")
    layers = _parse_layers(args.layers, model)
    reader = FeatureReader(model, layers, input_size=args.input_size, stride=args.stride, dtype=args.dtype)
    return Stage1Settings(
        solver=args.solver,
        views=args.views,
        seed=args.seed,
        layers=reader.layers,
        input_size=reader.input_size,
        stride=reader.stride,
        batch_size=args.batch_size,
        dtype=args.dtype,
        area=tuple(args.area),
        field=FieldSettings(steps=args.field_steps),
    )


def _parse_layers(words: Sequence[str] | None, model: nn.Module) -> list[int] | None:
    if words is None:
        return None
    if list(words) == ["all"]:
        return list(range(len(getattr(model, "blocks", ()))))
    try:
        return [int(number) for word in words for number in word.split(",") if number]
    except ValueError:
        raise ValueError(f"layers must be block numbers or 'all', got {' '.join(words)}") from None
