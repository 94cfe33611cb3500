"""The verbs `demo` and `app`."""

import argparse

from timm_dvt.options import add_device
from timm_dvt.variants import DEFAULT_MODEL
from timm_dvt.viewer.demo import run


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    parser.description = (
        "Draw a model's features of images with its denoiser off and on: as colors (PCA), in groups "
        "(k-means), their length, their similarity to the patch in the middle, and what was removed. Prints shapes, "
        "times and the file written."
    )
    parser.epilog = "Example: %(prog)s photo.jpg --out photo.png"
    parser.add_argument("images", nargs="*", help="image files (default: two photographs that come with the package)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"a variant, local-dir:FOLDER or hf-hub:REPO (default: {DEFAULT_MODEL}, of the extra dinov2)",
    )
    parser.add_argument("--out", metavar="FILE", default="dvt_demo.png", help="picture to write (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: fetch nothing")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="PIXELS",
        help="resize the image to about PIXELS x PIXELS in area, its aspect ratio kept (default: the model's own size)",
    )
    parser.set_defaults(
        run=lambda args: run(args.images, args.model, args.out, not args.no_pretrained, args.size, args.device)
    )


def add_app(parser: argparse.ArgumentParser) -> None:
    """Options of `app`."""
    parser.description = (
        "Serve a page: drop an image, choose a variant, and compare its features with the denoiser off "
        "and on. Needs the extra app."
    )
    parser.epilog = "Example: %(prog)s --model vit_base_patch14_dinov2.lvd142m_dvt --port 8000"
    parser.add_argument("--model", metavar="NAME", help=f"the variant chosen first (default: {DEFAULT_MODEL})")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s, this one alone)"
    )
    parser.add_argument("--port", type=_port, help="(default: the first free one from 7860)")
    parser.set_defaults(run=_app)


def _app(args: argparse.Namespace) -> None:
    from timm_dvt.viewer.app import serve  # the only module that imports Gradio

    serve(args.model, args.host, args.port)


def _size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels from 1 to 4096")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")
    return int(text)
