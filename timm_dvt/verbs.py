"""The verbs of the command line, each handed to its room. No torch is imported here: --help and --version are quick."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from timm_dvt.interrupts import is_command
from timm_dvt.options import refuse_empty
from timm_dvt.version import __version__

# What --help says of each, and the function that gives its parser description, options and `run`.
VERBS = {
    "demo": ("draw features with the denoiser off and on", "timm_dvt.viewer.command:add_demo"),
    "app": ("serve a page to play with in a browser", "timm_dvt.viewer.command:add_app"),
    "inspect": (
        "tell what kind of artifacts a timm ViT has, how much, and what helps",
        "timm_dvt.inspection.command:add_inspect",
    ),
    "families": ("print which of timm's classes can have a denoiser", "timm_dvt.listing:add_families"),
    "list": ("print the variants and where their weights come from", "timm_dvt.listing:add_list"),
    "calibrate": (
        "give any supported timm ViT a denoiser, without training",
        "timm_dvt.calibration.command:add_calibrate",
    ),
    "extract": (
        "write clean features of a folder, a data set or a video",
        "timm_dvt.extraction.command:add_extract",
    ),
    "convert": (
        "write a variant's published weights as a folder of safetensors",
        "timm_dvt.publish.command:add_convert",
    ),
    "cards": ("write the model cards of all variants", "timm_dvt.publish.command:add_cards"),
    "push": ("publish a folder, variants or the page on the Hub", "timm_dvt.publish.command:add_push"),
}


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The command line. Of the verbs only the one that `argv` begins with is loaded and has its options."""
    installed = Path(sys.argv[0]).stem == "timm-dvt"  # the command, or the module of the same verbs
    parser = argparse.ArgumentParser(
        prog="timm-dvt" if installed else "python -m timm_dvt",
        description="Clean dense features from timm's Vision Transformers.",
        epilog="%(prog)s COMMAND --help shows an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"timm-dvt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for verb, (summary, where) in VERBS.items():
        command = commands.add_parser(verb, help=summary)
        refuse_empty(command)
        if argv and argv[0] == verb:
            module, _, function = where.partition(":")
            getattr(import_module(module), function)(command)
    return parser


def answer_at_once() -> None:
    """Print help or version and end the process, where this is our command and it was asked for nothing else."""
    rest = sys.argv[1:]
    if is_command(r"timm_dvt\s") and (not rest or rest[0].startswith("-")):
        parser_for(rest).parse_args(rest)


answer_at_once()
