"""timm-dvt inspect: a model by name, inspected; what it means in words, as a table, as JSON and as a page."""

import argparse
import json
from pathlib import Path

from timm_dvt.calibration.calibrate import LEAST_VIEWS
from timm_dvt.inspection.measure import VIEWS, inspect
from timm_dvt.inspection.page import HEADINGS, lead, page, row
from timm_dvt.inspection.results import Inspection
from timm_dvt.loading import check_name, load_any_size, pick_device
from timm_dvt.options import Blocks, add_device, at_least, block_list
from timm_dvt.tables import aligned
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
        type=block_list,
        nargs="+",
        action=Blocks,
        metavar="N",
        help="all, or such as 0,5,11, counted from 0, or --blocks=-2,-1 from the end (default: all)",
    )
    parser.add_argument(
        "--views",
        type=at_least(LEAST_VIEWS),
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
    add_device(parser)
    parser.add_argument("--no-pretrained", action="store_true", help="random weights: fetch nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Inspection:
    """What the parsed arguments ask for.

    Raises:
        UserError: the model, an image, the device or the folder cannot be used.
    """
    check_name(args.model)
    folder = None if args.out is None else Path(args.out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    model = load_any_size(args.model, not args.no_pretrained).to(device)
    report = inspect(
        model,
        args.images,
        blocks=None if args.blocks == "all" else args.blocks,
        views=args.views,
        try_calibration=args.try_calibration,
        progress=True,
        name=args.model,
    )
    facts = json.dumps(report.to_dict(), indent=2)
    if folder is not None:
        text = page(report)
        write_together(
            {
                folder / PAGE: lambda path: path.write_text(text, encoding="utf-8"),
                folder / FACTS: lambda path: path.write_text(facts + "\n"),
            }
        )
    if args.json:
        print(facts)
    else:
        print(f"{report.model}: {lead(report)}\n")
        print(*aligned([HEADINGS, *([cell for cell, _ in row(layer)] for layer in report.layers)]), sep="\n")
        for finding in report.findings:
            print("\n" + "\n    ".join([finding.text, *finding.commands]))
    if folder is not None and not args.json:
        print(f"\nwrote {folder / PAGE}, {folder / FACTS}")
    return report
