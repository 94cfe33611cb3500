"""What `timm-dvt extract` is asked for. A field is an option of the command line, declared once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from timm_dvt.errors import UserError
from timm_dvt.options import add_options, block_list, check, option, part
from timm_dvt.weights.files import folder_path

FORMATS = ("zarr", "safetensors", "npy", "parquet")
DTYPES = ("float16", "float32")
STATES = {"denoise": ("on",), "no-denoise": ("off",), "both": ("on", "off")}


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction; each but the first four is an option with its default.

    Attributes:
        source: an image, a folder, a `.txt` list of paths, a video, or hf:OWNER/NAME.
        model: a name for timm.create_model.
        out: the folder to fill.
        states: of the denoiser, in which maps are taken: ("on",), ("off",) or ("on", "off"); None is "on" where the
            model has a denoiser.
        blocks: counted from 0, or from the end with a minus; "all"; None for the final features alone.
    """

    source: str
    model: str
    out: str
    states: tuple[str, ...] | None = None
    blocks: str | tuple[int, ...] | None = option(
        None,
        "all, or blocks with commas, 5,11 or -1 (--blocks=-1), each final-normed (default: the last)",
        type=block_list,
    )
    size: int | None = option(
        None, "side of the square images that the model is given (default: its own)", least=1, metavar="PX"
    )
    keep_aspect: bool = option(
        False,
        "longer side SIZE, cut off only what rounds to whole patches: maps of different grids",
        action="store_true",
    )
    dtype: str = option(
        "float16", "of the maps on disk; forward passes are in float32 (default: %(default)s)", choices=DTYPES
    )
    format: str = option("zarr", "of the maps on disk (default: %(default)s)", choices=FORMATS)
    class_token: bool = option(False, "the last block's class token too", action="store_true")
    pca: int | None = option(
        None, "keep K principal components of each patch, of one basis for all images", least=1, metavar="K"
    )
    pictures: bool = option(
        False, "pictures of the maps as colors (PCA), of one basis for all; of a video a video", action="store_true"
    )
    autocast: bool = option(
        False, "forward passes in half precision: faster on a GPU, and maps differ by a percent", action="store_true"
    )
    batch_size: int = option(8, "images in a forward pass (default: %(default)s)", least=1, metavar="B")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto: a GPU if there is one (default: %(default)s)")
    compile: bool = option(False, "by torch.compile: minutes first, faster then", action="store_true")
    num_workers: int | None = option(
        None, "threads that read and decode images (default: one on a CPU, 8 beside a GPU)", least=1, metavar="N"
    )
    part: tuple[int, int] = option((1, 1), "part I of N of the work, for an array of jobs", type=part, metavar="I/N")
    pretrained: bool = option(True, "random weights: fetch nothing", "--no-pretrained", action="store_false")


def check_settings(settings: ExtractSettings) -> None:
    """Raise UserError for what a command line could not say."""
    if not isinstance(settings.model, str):
        raise UserError(
            f"model must be a name for timm.create_model, got a {type(settings.model).__name__}: save it by "
            "timm_dvt.save_pretrained(model, FOLDER), and name local-dir:FOLDER"
        )
    folder_path(settings.out)  # before anything slow
    if settings.states is not None and settings.states not in STATES.values():
        known = ", ".join(map(str, STATES.values()))
        raise UserError(f"states must be None or one of {known}, got {settings.states!r}")
    blocks = settings.blocks
    if blocks not in (None, "all") and (isinstance(blocks, (str, int)) or not all(type(b) is int for b in blocks)):
        raise UserError(f'blocks must be None, "all" or numbers such as (0, 5, 11), got {blocks!r}')
    number, parts = settings.part
    if not 1 <= number <= parts:
        raise UserError(f"part must be (I, N) with I from 1 to N, got {settings.part}")
    check(settings)


def add_extract_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line the settings; `build` reads them."""
    parser.add_argument("source", metavar="SOURCE", help="an image, a folder, a .txt list, a video or hf:OWNER/NAME")
    parser.add_argument("--model", metavar="NAME", required=True, help="a timm model, local-dir:FOLDER or hf-hub:REPO")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="made, or continued where it exists")
    states = parser.add_mutually_exclusive_group()
    for name, value in STATES.items():
        says = {"denoise": "on (default, where there is one)", "no-denoise": "off", "both": "on, and again off"}[name]
        states.add_argument(
            f"--{name}", dest="states", action="store_const", const=value, help=f"with the denoiser {says}"
        )
    add_options(parser, ExtractSettings)
