"""The command line: python -m timm_dvt demo, a first look at a variant; python -m timm_dvt list, the table of them."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from timm_dvt.demo import DEFAULT_MODEL, DemoError, run
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import DVT_LICENSE, DVT_REPO, Variant


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the person can put right (one line on stderr), 130."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "list":
            print(as_json() if args.json else as_table())
            sys.stdout.flush()
        else:
            run(args.image, args.model, args.out, not args.no_pretrained, args.size)
    except DemoError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m timm_dvt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,list}")
    demo = commands.add_parser(
        "demo",
        help="draw features with the denoiser off and on",
        description="Draw a model's features of an image with its denoiser off and on: PCA colours (one projection), "
        "norms (one scale), cosine similarity to the centre patch. Prints shapes, times and the file written.",
    )
    demo.add_argument("image", nargs="?", help="an image file (default: the photograph that comes with the package)")
    demo.add_argument(
        "--model",
        metavar="NAME",
        help=f"a variant, local-dir:FOLDER or hf-hub:REPO (default: {DEFAULT_MODEL}, which is in the package)",
    )
    demo.add_argument("--out", metavar="FILE", default="dvt_demo.png", help="picture to write (default: %(default)s)")
    demo.add_argument("--no-pretrained", action="store_true", help="random weights: fetch nothing")
    demo.add_argument(
        "--size",
        type=_size,
        metavar="PIXELS",
        help="resize the image to about PIXELS x PIXELS in area, its aspect ratio kept (default: the model's own size)",
    )
    listing = commands.add_parser("list", help="print the variants and where their weights come from")
    listing.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels from 1 to 4096")
    return int(text)


def as_table() -> str:
    """The variants as aligned columns."""
    lines = [("name", "pixels", "license", "weights")]
    lines += [(v.name, str(v.resolution), license_of(v), v.source) for v in VARIANTS.values()]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    table = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths)), line[3]]) for line in lines]
    return "\n".join(
        [
            *table,
            "",
            "Pixels: the resolution the denoiser was trained at. License: the backbone's, then the DVT weights'.",
            "A *_distilled model is a whole ViT; any other is its backbone, from its own hub repo, and a denoiser.",
        ]
    )


def as_json() -> str:
    """The variants as a JSON list."""
    return json.dumps(
        [
            {
                "name": v.name,
                "backbone": v.backbone,
                "resolution": v.resolution,
                "distilled": v.distilled,
                "license": license_of(v),
                "weights": None if v.source == "no weights" else v.source,
            }
            for v in VARIANTS.values()
        ],
        indent=2,
    )


def license_of(variant: Variant) -> str:
    """The backbone's license, and the denoiser's where it is a published one."""
    backbone = variant.license or "unknown"
    return f"{backbone}, {DVT_LICENSE}" if variant.hub_id == DVT_REPO else backbone


if __name__ == "__main__":
    sys.exit(main())
