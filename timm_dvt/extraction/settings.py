"""What `timm-dvt extract` is asked for. A field is an option of the command line, declared once."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

FORMATS = ("zarr", "safetensors", "npy", "parquet")
DTYPES = ("float16", "float32")
STATES = {"denoise": ("on",), "no-denoise": ("off",), "both": ("on", "off")}


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, part I of N with I from 1 to N")
    return int(part), int(parts)


def _blocks(text: str) -> str | tuple[int, ...]:
    try:
        return text if text == "all" else tuple(int(block) for block in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor numbers such as 5,11") from None


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction; each but the first four is an option with its default.

    Attributes:
        source: an image, a folder, a `.txt` list of paths, a video, or hf:OWNER/NAME.
        model: a name for timm.create_model.
        out: the folder to fill.
        states: "on" and "off": the denoiser's, in which maps are taken; None is "on" where the model has a denoiser.
        blocks: counted from 0, or from the end with a minus; "all"; None for the final features alone.
    """

    source: str
    model: str
    out: str
    states: tuple[str, ...] | None = None
    blocks: str | tuple[int, ...] | None = _option(
        None, "all, or blocks such as 5,11 or -1 (--blocks=-1), each final-normed (default: the last)", type=_blocks
    )
    size: int | None = _option(
        None, "side of the square images that the model is given (default: its own)", type=_number, metavar="PX"
    )
    keep_aspect: bool = _option(
        False, "longer side SIZE, nothing cut off but less than a patch: maps of different grids"
    )
    dtype: str = _option("float16", "of the maps on disk; forward passes are in float32", choices=DTYPES)
    format: str = _option("zarr", "of the maps on disk", choices=FORMATS)
    class_token: bool = _option(False, "the last block's class token too")
    pca: int | None = _option(
        None, "keep K principal components of each patch, of one basis for all images", type=_number, metavar="K"
    )
    pictures: bool = _option(False, "pictures of the maps as colors (PCA), of one basis for all; of a video a video")
    autocast: bool = _option(False, "forward passes in half precision: faster on a GPU, and maps differ by a percent")
    batch_size: int = _option(8, "images in a forward pass", type=_number, metavar="B")
    device: str = _option("auto", "cpu, cuda, cuda:1, mps or auto: a GPU if there is one")
    compile: bool = _option(False, "by torch.compile: minutes first, faster then")
    num_workers: int | None = _option(
        None, "threads that read and decode images (default: one on a CPU, 8 beside a GPU)", type=_number, metavar="N"
    )
    part: tuple[int, int] = _option((1, 1), "part I of N of the work, for an array of jobs", type=_part, metavar="I/N")
    pretrained: bool = _option(True, "random weights: fetch nothing")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line the settings; `settings_of` reads them."""
    parser.add_argument("source", metavar="SOURCE", help="an image, a folder, a .txt list, a video or hf:OWNER/NAME")
    parser.add_argument("--model", metavar="NAME", required=True, help="a timm model, local-dir:FOLDER or hf-hub:REPO")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="made, or continued where it exists")
    states = parser.add_mutually_exclusive_group()
    for name, value in STATES.items():
        says = {"denoise": "on (default, where there is one)", "no-denoise": "off", "both": "on, and again off"}[name]
        states.add_argument(
            f"--{name}", dest="states", action="store_const", const=value, help=f"with the denoiser {says}"
        )
    for setting in dataclasses.fields(ExtractSettings):
        if not (more := dict(setting.metadata)):
            continue
        name, default = setting.name.replace("_", "-"), setting.default
        if isinstance(default, bool):
            more["action"] = "store_false" if default else "store_true"
            parser.add_argument(f"--no-{name}" if default else f"--{name}", dest=setting.name, **more)
        else:
            says = "" if default in (None, (1, 1)) else " (default: %(default)s)"
            more.setdefault("metavar", None if "choices" in more else setting.name.upper())
            parser.add_argument(f"--{name}", default=default, **{**more, "help": more["help"] + says})


def settings_of(args: argparse.Namespace) -> ExtractSettings:
    """The settings that a command line says."""
    return ExtractSettings(
        **{setting.name: getattr(args, setting.name) for setting in dataclasses.fields(ExtractSettings)}
    )
