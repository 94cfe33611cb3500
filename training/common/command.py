"""What commands do alike: help from a module's docstring, the model's options, errors on standard error."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import torch


def help_from(doc: str | None) -> dict[str, Any]:
    """Arguments of an ArgumentParser: a docstring's first paragraph above the options, the rest as it is below."""
    head, _, rest = (doc or "").partition("\n\n")  # there is none under python -OO
    return {"description": head, "epilog": rest, "formatter_class": Help}


def command_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m training.NAME` with the help of its module's docstring."""
    return argparse.ArgumentParser(prog=f"python -m training.{name}", **help_from(doc))


class Help(argparse.RawDescriptionHelpFormatter):
    """Help that says of each number of `at_least` which is the smallest."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        least = getattr(action.type, "least", 0)
        return f"{action.help}; {least} or more" if least > 1 else action.help


def flush_subnormals() -> None:
    """Let this process's CPU take numbers below 1e-38 for 0, which they are to any training.

    Second moments of AdamW get there (they are squares of gradients), and some processors are ten to twenty times
    slower on them. To be called before threads compute: they take the setting over from the one that starts them.
    """
    torch.set_flush_denormal(True)


def complain(code: int, error: Exception | str) -> int:
    """Say what is wrong on standard error; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code


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
    parser.add_argument("--seed", type=whole, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps or auto: a GPU if there is one (default)"
    )


def at_least(least: int, kind: Callable[[Any], Any] = int) -> Callable[[str], Any]:
    """Makes a type for argparse: finite numbers from `least` on, so that others are refused before anything is done."""

    def number(text: str) -> Any:
        if not least <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return kind(text)

    number.least = least  # type: ignore[attr-defined]
    return number


positive, whole = at_least(1), at_least(0)
