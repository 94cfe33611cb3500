"""The verbs `list` and `families`: the variants there are, and the classes of timm's that can have a denoiser."""

import argparse
import json

from timm_dvt.families import families
from timm_dvt.registry import VARIANTS
from timm_dvt.tables import aligned
from timm_dvt.variants import DVT_LICENSE, DVT_REPO, Variant


def add_list(parser: argparse.ArgumentParser) -> None:
    """Options of `list`."""
    parser.description = "Print the variants and where their weights come from."
    parser.epilog = "Example: %(prog)s --json"
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=lambda args: print(as_json() if args.json else as_table()))


def add_families(parser: argparse.ArgumentParser) -> None:
    """Options of `families`."""
    parser.description = "Ask timm's registry which classes of models can have a denoiser, and why the others cannot."
    parser.epilog = "Example: %(prog)s"
    parser.set_defaults(run=lambda args: print(families_as_table()))


def as_table() -> str:
    """The variants as aligned columns."""
    lines = [("name", "pixels", "license", "weights")]
    lines += [(v.name, str(v.resolution), license_of(v), v.source) for v in VARIANTS.values()]
    return "\n".join(
        [
            *aligned(lines),
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
