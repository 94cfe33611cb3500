"""One declaration a setting: a field of a frozen data class is an option, with its help, its default and its limits."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields, is_dataclass, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any

from timm_dvt.errors import UserError


def option(default: Any, help: str, *names: str, **more: Any) -> Any:
    """A field of a data class that is an option too.

    Args:
        default: of both; ... where the option must be given. One that is a bool is --NAME and --no-NAME, a number says
            the option's type.
        help: what --help says.
        names: of the option; without any it is called as the field.
        more: further arguments of `add_argument`; `least`, the smallest number that is taken; `beside`, options of
            which each may be given instead: {name: these arguments}.
    """
    return field(default=MISSING if default is ... else default, metadata={"names": names, "help": help, **more})


def add_options(where: Any, settings: type, *names: str, **helps: str) -> None:
    """Give a parser, or a group of one, the options that a data class declares, and those of data classes within it.

    Args:
        names, helps: the fields, instead of all that the class does not inherit; with another help in this command.
    """
    for item in fields(settings):
        if item.name not in ({*names, *helps} or get_annotations(settings)):
            continue
        if is_dataclass(item.default):
            add_options(where, type(item.default))
        elif item.metadata:
            more = {**item.metadata, "dest": item.metadata.get("dest", item.name)}
            more["help"] = helps.get(item.name, more["help"])
            default: Any = item.default
            if more.get("action") == "extend":  # which needs a list of its own
                default = list(default)
            more |= {"required": True} if default is MISSING else {"default": default}
            _add(where, item.name, **more)


def _add(
    where: Any, field_name: str, names: Sequence[str], beside: Mapping[str, Any] | None = None, **more: Any
) -> None:
    default = more.get("default")
    if beside:
        where = where.add_mutually_exclusive_group()
        for name, other in beside.items():
            _add(where, field_name, [name], **{"dest": more["dest"], "default": default, **other})
    if "least" in more:
        kind = more.get("type", float if isinstance(default, float) else int)
        more["type"] = at_least(more.pop("least"), kind)
    elif isinstance(default, bool):
        more.setdefault("action", argparse.BooleanOptionalAction)
    elif isinstance(default, (int, float)):
        more.setdefault("type", type(default))
    where.add_argument(*(names or ["--" + field_name.replace("_", "-")]), **more)


def build(settings: Any, args: argparse.Namespace, within: bool = False) -> Any:
    """An instance of a data class, or of the class of another instance, with what a command line says on top.

    Of data classes `within` it, options alone are read: their other fields may bear the name of an argument by chance.
    """
    changes = {}
    for item in fields(settings):
        value, dest = getattr(settings, item.name, None), item.metadata.get("dest", item.name)
        if is_dataclass(value):
            changes[item.name] = build(value, args, within=True)
        elif dest in args and (item.metadata or not within):
            given = getattr(args, dest)
            changes[item.name] = tuple(given) if isinstance(given, list) else given
    return settings(**changes) if isinstance(settings, type) else replace(settings, **changes)


def check(settings: Any) -> None:
    """Raise UserError if a field's value is none of its choices, or below the smallest: what a command line refuses."""
    for item in fields(settings):
        value, choices, least = getattr(settings, item.name), item.metadata.get("choices"), item.metadata.get("least")
        if choices is not None and value not in choices:
            raise UserError(f"{item.name} must be one of {', '.join(choices)}, got {value!r}")
        if least is not None and value != item.default and not value >= least:
            raise UserError(f"{item.name} must be {least} or more, got {value}")


def refuse_empty(parser: argparse.ArgumentParser) -> None:
    """Have a command refuse "", as an unset variable of a shell gives it, for all that it takes as text or as a path.

    What reads it would take it for something else: Path("") is the current folder.
    """

    def text(given: str) -> str:
        if not given:
            raise argparse.ArgumentTypeError("must not be empty")
        return given

    parser.register("type", None, text)
    parser.register("type", Path, lambda given: Path(text(given)))


def add_device(parser: argparse.ArgumentParser) -> None:
    """Give a command line the --device that `pick_device` takes."""
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")


def at_least(least: int, kind: Callable[[Any], Any] = int) -> Callable[[str], Any]:
    """Makes a type for argparse: finite numbers from `least` on, so that others are refused before anything is done."""

    def number(text: str) -> Any:
        if not least <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return kind(text)

    number.least = least  # type: ignore[attr-defined]
    return number


def part(text: str) -> tuple[int, int]:
    """I/N for argparse: a part of the work, and how many there are."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text!r}")
    return int(match[1]), int(match[2])


def block_numbers(text: str) -> tuple[int, ...]:
    """Numbers of blocks for argparse, as 0,5,11."""
    try:
        return tuple(int(block) for block in text.strip(",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of blocks such as 0,5,11") from None


def block_list(text: str) -> str | tuple[int, ...]:
    """Numbers of blocks for argparse, or "all"."""
    try:
        return text if text == "all" else block_numbers(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of blocks such as 0,5,11") from None


class Blocks(argparse.Action):
    """For an option of several words of the above, 3 5 as well as 3,5: their numbers in one tuple, or "all"."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if "all" in values and len(values) > 1:
            raise argparse.ArgumentError(self, "all stands alone")
        setattr(namespace, self.dest, "all" if "all" in values else sum(values, ()))
