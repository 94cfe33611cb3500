"""The command line: look (demo, list, families, app), make (calibrate, convert), extract, publish (cards, push)."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_dvt.calibrate_command import add_command as add_calibrate
from timm_dvt.calibration import CalibrationError
from timm_dvt.cards import stale_cards, write_cards
from timm_dvt.convert import ConvertError, convert
from timm_dvt.demo import DEFAULT_MODEL, DemoError, run
from timm_dvt.extraction.command import add_command as add_extract
from timm_dvt.extraction.settings import ExtractError
from timm_dvt.families import families
from timm_dvt.fetching import WeightsNotFoundError
from timm_dvt.push import PushError, push, push_all
from timm_dvt.registry import VARIANTS
from timm_dvt.space import FOLDER as SPACE
from timm_dvt.space import push_space
from timm_dvt.variants import DVT_LICENSE, DVT_REPO, Variant
from timm_dvt.weights import CheckpointError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the person can put right (one line on stderr), 130."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except (
        DemoError,
        CalibrationError,
        ConvertError,
        PushError,
        CheckpointError,
        WeightsNotFoundError,
        ExtractError,
    ) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:  # a folder that is read-only, a disk that is full
        print(f"error: {e.filename or 'a file'}: {e.strerror or e}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    installed = Path(sys.argv[0]).stem == "timm-dvt"  # the command, or the module of the same verbs
    parser = argparse.ArgumentParser(
        prog="timm-dvt" if installed else "python -m timm_dvt",
        description=__doc__,
        epilog="%(prog)s COMMAND --help shows an example of each.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="draw features with the denoiser off and on",
        description="Draw a model's features of images with its denoiser off and on: as colours (PCA), in groups "
        "(k-means), their length, their similarity to the patch in the middle, and what was removed. Prints shapes, "
        "times and the file written.",
        epilog="Example: %(prog)s photo.jpg --out photo.png",
    )
    demo.add_argument("images", nargs="*", help="image files (default: two photographs that come with the package)")
    demo.add_argument(
        "--model",
        metavar="NAME",
        help=f"a variant, local-dir:FOLDER or hf-hub:REPO (default: {DEFAULT_MODEL}, of the extra dinov2)",
    )
    demo.add_argument("--out", metavar="FILE", default="dvt_demo.png", help="picture to write (default: %(default)s)")
    demo.add_argument("--no-pretrained", action="store_true", help="random weights: fetch nothing")
    demo.add_argument(
        "--size",
        type=_size,
        metavar="PIXELS",
        help="resize the image to about PIXELS x PIXELS in area, its aspect ratio kept (default: the model's own size)",
    )
    demo.set_defaults(run=lambda args: run(args.images, args.model, args.out, not args.no_pretrained, args.size))
    _add_app_command(commands)
    classes = commands.add_parser(
        "families",
        help="print which of timm's classes can have a denoiser",
        description="Ask timm's registry which classes of models can have a denoiser, and why the others cannot.",
        epilog="Example: %(prog)s",
    )
    classes.set_defaults(run=lambda args: print(families_as_table()))
    listing = commands.add_parser(
        "list",
        help="print the variants and where their weights come from",
        description="Print the variants and where their weights come from.",
        epilog="Example: %(prog)s --json",
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(run=lambda args: print(as_json() if args.json else as_table()))
    add_calibrate(commands)
    add_extract(commands)
    _add_hub_commands(commands)
    return parser


def _add_app_command(commands: argparse._SubParsersAction) -> None:
    page = commands.add_parser(
        "app",
        help="serve a page to play with in a browser",
        description="Serve a page: drop an image, choose a variant, and compare its features with the denoiser off "
        "and on. Needs the extra app.",
        epilog="Example: %(prog)s --model vit_base_patch14_dinov2.lvd142m_dvt --port 8000",
    )
    page.add_argument("--model", metavar="NAME", help=f"the variant chosen first (default: {DEFAULT_MODEL})")
    page.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s, this one alone)"
    )
    page.add_argument("--port", type=_port, help="(default: the first free one from 7860)")
    page.set_defaults(run=_app)


def _add_hub_commands(commands: argparse._SubParsersAction) -> None:
    conversion = commands.add_parser(
        "convert",
        help="write a variant's published weights as a folder of safetensors",
        description="Write a variant as a folder of model.safetensors, config.json and README.md (its card), which "
        "timm.create_model('local-dir:FOLDER', pretrained=True) loads with equal outputs.",
        epilog="Example: %(prog)s --model vit_base_patch14_dinov2.lvd142m_dvt --out vitb_dvt",
    )
    conversion.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a .pth or safetensors file, or one of the Hub: ORG/REPO/FILE, hf-hub:ORG/REPO (default: where the "
        "variant's weights are published)",
    )
    conversion.add_argument("--model", metavar="NAME", required=True, help="the variant")
    conversion.add_argument("--out", metavar="FOLDER", required=True, help="made if it does not exist")
    conversion.add_argument(
        "--denoiser-only", action="store_true", help="leave out the backbone; its own repo's is fetched on loading"
    )
    conversion.set_defaults(run=_convert)

    cards = commands.add_parser(
        "cards",
        help="write the model cards of all variants",
        description="Write the model cards of all variants.",
        epilog="Example: %(prog)s --check",
    )
    cards.add_argument("--out", metavar="FOLDER", default="hub_cards", help="(default: %(default)s)")
    cards.add_argument("--check", action="store_true", help="write nothing; fail if the cards there are stale")
    cards.set_defaults(run=_cards)

    pushing = commands.add_parser(
        "push",
        help="publish a folder, variants or the page on the Hub",
        description="Publish weights, config.json and card in one commit. Files that the repo has already, by their "
        "hashes, are left out, so a run that was cut short is continued by the same command. Log in first: hf auth "
        "login (huggingface-cli login below huggingface_hub 1.0), or set HF_TOKEN.",
        epilog="Example: %(prog)s vitb_dvt --repo me/vitb_dvt --dry-run",
    )
    pushing.add_argument("target", nargs="?", metavar="FOLDER|NAME", help="a folder of convert, or a variant's name")
    pushing.add_argument("--repo", metavar="ORG/NAME", help="the repo; made if it does not exist")
    pushing.add_argument("--space", action="store_true", help=f"publish the page as a Space (FOLDER: {SPACE})")
    pushing.add_argument("--all", action="store_true", help="publish every variant, each in a repo of its name")
    pushing.add_argument("--namespace", metavar="NS", help="with --all: the account or organisation")
    pushing.add_argument("--private", action="store_true", help="make the repo a private one")
    pushing.add_argument("--create-pr", action="store_true", help="propose a pull request to a repo that exists")
    pushing.add_argument("--dry-run", action="store_true", help="only say what would be done")
    pushing.set_defaults(run=_push)


def _app(args: argparse.Namespace) -> None:
    from timm_dvt.app import serve  # the only module that imports Gradio

    serve(args.model, args.host, args.port)


def _convert(args: argparse.Namespace) -> None:
    folder = convert(args.source, args.model, args.out, args.denoiser_only)
    print(f"wrote {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


def _cards(args: argparse.Namespace) -> None:
    if not args.check:
        print(f"wrote {len(write_cards(args.out, progress=True))} cards to {args.out}")
    elif stale := stale_cards(args.out, progress=True):
        raise ConvertError(f"stale in {args.out}: {', '.join(stale)}; run python -m timm_dvt cards --out {args.out}")


def _push(args: argparse.Namespace) -> None:
    if args.space:
        if not args.repo or args.all:
            raise PushError("say where to publish the page: --space --repo ORG/NAME")
        push_space(args.target or SPACE, args.repo, args.private, args.create_pr, args.dry_run)
        return
    one, every = args.target and args.repo, args.all and args.namespace
    if bool(one) == bool(every) or (every and (args.target or args.repo)):
        raise PushError("say what to publish and where: FOLDER|NAME --repo ORG/NAME, or --all --namespace NS")
    if every and args.create_pr:
        raise PushError("--create-pr is for one repo that exists, not for --all")
    if one:
        push(args.target, args.repo, args.private, args.create_pr, args.dry_run)
    else:
        push_all(args.namespace, args.private, args.dry_run)


def _size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels from 1 to 4096")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")
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


def families_as_table() -> str:
    """timm's model classes, a line each: "yes", or why not."""
    return "\n".join(f"{name}: {reason or 'yes'}" for name, reason in families(progress=True).items())


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
