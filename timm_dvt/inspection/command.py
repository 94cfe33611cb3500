"""timm-dvt inspect: a model by name, inspected; what it means in words, as a table, as JSON and as a page."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from timm_dvt.calibration.calibrate import LEAST_VIEWS
from timm_dvt.calibration.command import load_backbone
from timm_dvt.errors import InspectionError
from timm_dvt.inspection.measure import VIEWS, inspect
from timm_dvt.inspection.page import HEADINGS, lead, page, row
from timm_dvt.inspection.results import Inspection
from timm_dvt.weights.files import write_together

PAGE, FACTS = "inspection.html", "inspection.json"


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.description = (
        "Tell whether a model's noise is position or outlier tokens, how much of it there is block by "
        "block, and what to do about it. Says first how long it will take: minutes on two CPU cores for a ViT-S."
    )
    parser.epilog = "Example: %(prog)s --model vit_base_patch14_dinov2.lvd142m --images photos --out report"
    parser.add_argument("--model", metavar="NAME", required=True, help="a timm model, local-dir:FOLDER or hf-hub:REPO")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="image files or folders, 4 images or more of different scenes, better 16 (default: parts of two "
        "photographs that come with the package)",
    )
    parser.add_argument(
        "--blocks",
        type=_blocks,
        metavar="all|LIST",
        help="such as 0,5,11, counted from 0, or --blocks=-2,-1 from the end (default: all)",
    )
    parser.add_argument(
        "--views",
        type=int,
        default=VIEWS,
        metavar="N",
        help=f"forward passes of photographs, {LEAST_VIEWS} or more (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FOLDER", help=f"write {PAGE} and {FACTS} there; made if it does not exist")
    parser.add_argument(
        "--try",
        dest="try_calibration",
        action="store_true",
        help="calibrate at once on half of the images, and tell position's share before and after on the others",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, and nothing else")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: fetch nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Inspection:
    """What the parsed arguments ask for.

    Raises:
        UserError: the model, an image, the device or the folder cannot be used.
    """
    folder = None if args.out is None else Path(args.out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    model = _on_device(load_backbone(args.model, not args.no_pretrained), args.device)
    report = inspect(
        model,
        args.images,
        blocks=args.blocks,
        views=args.views,
        try_calibration=args.try_calibration,
        progress=True,
        name=args.model,
    )
    facts = json.dumps(report.to_dict(), indent=2)
    if args.json:
        print(facts)
    else:
        print(f"{report.model}: {lead(report)}\n")
        print(table([HEADINGS, *([cell for cell, _ in row(layer)] for layer in report.layers)]))
        for finding in report.findings:
            print("\n" + "\n    ".join([finding.text, *finding.commands]))
    if folder is not None:
        text = page(report)
        write_together(
            {
                folder / PAGE: lambda path: path.write_text(text, encoding="utf-8"),
                folder / FACTS: lambda path: path.write_text(facts + "\n"),
            }
        )
        if not args.json:
            print(f"\nwrote {folder / PAGE}, {folder / FACTS}")
    return report


def table(lines: Any) -> str:
    """Rows of cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _on_device(model: Any, name: str | None) -> Any:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(name).eval()
    except (RuntimeError, AssertionError) as e:  # torch's word for a device that is none, or is not here
        raise InspectionError(f"device is {name!r}, which cannot be used here: {str(e).splitlines()[0]}") from e


def _blocks(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor a list of blocks such as 0,5,11") from None
