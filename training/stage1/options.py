"""The settings of stage 1 on a command line."""

import argparse
from collections.abc import Sequence

from torch import nn

from timm_dvt.errors import UserError
from training.common.backbone import DTYPES, FeatureReader
from training.common.command import at_least, positive, whole
from training.stage1.conditioning import LEAST_VIEWS
from training.stage1.decompose import SOLVERS, Stage1Settings
from training.stage1.field.fit import FieldSettings
from training.stage1.linear.solver import LinearSettings


def add_stage1_arguments(
    parser: argparse.ArgumentParser, views: int = Stage1Settings.views, crops: int | None = None
) -> None:
    """Give a command line the settings of stage 1; `stage1_settings` reads them.

    Args:
        views: the default. crops: the default, if this command keeps crops.
    """
    group = parser.add_argument_group("stage 1")
    group.add_argument(
        "--solver",
        choices=SOLVERS,
        default="linear",
        help="linear: least squares, seconds an image (default); field: the paper's neural fields",
    )
    group.add_argument(
        "--views",
        type=at_least(LEAST_VIEWS),
        default=views,
        help="forward passes an image (default: %(default)s; the paper's: 768)",
    )
    if crops is not None:
        group.add_argument(
            "--crops",
            type=whole,
            metavar="N",
            default=crops,
            help="of the views, whose own maps are kept as well, with F at their patches: more to learn from at no "
            "further forward pass, and two maps each on disk (default: %(default)s, where there are so many)",
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
        type=at_least(2),
        metavar="N",
        default=FieldSettings.steps,
        help="steps of the field (default: the paper's %(default)s)",
    )
    group.add_argument(
        "--no-artifacts",
        dest="artifacts",
        action="store_false",
        help="linear solver: leave G out, so that F is the view-average (Tab. 5 b)",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="N",
        help="blocks counted from 0, or from the end with a minus, or 'all' (default: the last)",
    )
    group.add_argument(
        "--input-size", type=positive, metavar="PX", help="(default: the paper's, 518 for patch 14, 512 for 16)"
    )
    group.add_argument(
        "--stride", type=positive, metavar="PX", help="between patches; below the patch size for denser maps"
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=Stage1Settings.batch_size,
        help="views in one forward pass (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of forward passes (default: %(default)s)"
    )


def stage1_settings(args: argparse.Namespace, model: nn.Module) -> Stage1Settings:
    """Stage 1's settings from a command line, with layers, input size and stride filled in for this model.

    Raises:
        ValueError: a value that cannot be.
        TypeError: the model is none of timm's ViTs.
    """
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
        crops=min(getattr(args, "crops", 0), args.views - 1),
        corner_aligned=args.recipe == "repository",
        square_first=args.recipe == "repository",
        linear=LinearSettings(artifacts=args.artifacts),
        field=FieldSettings(steps=args.field_steps, recipe="repository" if args.recipe == "repository" else "paper"),
    )


def _parse_layers(words: Sequence[str] | None, model: nn.Module) -> list[int] | None:
    if words is None:
        return None
    if list(words) == ["all"]:
        return list(range(len(getattr(model, "blocks", ()))))
    try:
        return [int(number) for word in words for number in word.split(",") if number]
    except ValueError:
        raise UserError(f"layers must be block numbers or 'all', got {' '.join(words)}") from None
