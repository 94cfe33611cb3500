"""Denoisers for many backbones, each with card, numbers and page: training.make_denoiser, model after model.

    python -m training.zoo --images photos --out zoo                    # the ViTs whose dense features people use
    python -m training.zoo --images photos --out zoo --models vit_base_patch16_dinov3.lvd1689m ...
    torchrun --nproc-per-node 8 -m training.zoo ...                     # each process takes other models
    python -m training.zoo --images photos --out zoo --push ORG         # says what it would publish; --no-dry-run does

What is there is not made again, and what cannot be made is reported and left out. Kill it whenever you like, and run
the same command again to continue. OUT/NAME is what make_denoiser gives, timm.create_model("local-dir:OUT/NAME",
pretrained=True) loads it, OUT/logs has what was said. It is published as ORG/NAME, with dvt appended to the tag.

Exit code: 0 all are there; 1 some are not; 2 the command is wrong; 3 OUT cannot be written; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from timm_dvt.errors import UserError
from timm_dvt.publish.push import check_id, push
from timm_dvt.shared_folder import SharedFolder
from timm_dvt.variants import variant_name
from training.common.command import command_parser, exit_code_of
from training.common.models import check_backbone
from training.evaluate.runner import slug
from training.reproduction.jobs import Job, Runner
from training.stage1.progress import is_first_process

# By the names of timm 1.0.31, which has no Franca; OpenAI's CLIP is with the activation that it was trained with.
MODELS = (
    *(
        f"vit_{size}_patch14_{kind}.lvd142m"
        for kind in ("dinov2", "reg4_dinov2")
        for size in ("small", "base", "large")
    ),
    *(f"vit_{size}_patch16_dinov3.lvd1689m" for size in ("small", "small_plus", "base", "large")),
    *(f"vit_{size}_patch14_reg1_tipsv2.webli" for size in ("base", "large", "so400m")),
    *(f"vit_{size}_patch16_dinov3_qkvb.eupe_lvd1689m" for size in ("tiny", "small", "base")),
    *(f"vit_{size}_patch16_siglip_512.v2_webli" for size in ("base", "large", "so400m")),
    *(f"vit_pe_spatial_{size}_patch16_512.fb" for size in ("tiny", "small", "base")),
    "vit_pe_spatial_large_patch14_448.fb",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_quickgelu_336.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_large_patch14_clip_224.laion2b",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return exit_code_of(lambda: run(args))


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = command_parser("zoo", __doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="what they learn from, as of make_denoiser")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"backbones (default: {', '.join(MODELS)})"
    )
    parser.add_argument("--push", metavar="ORG", help="publish what there is on the Hub, under this account")
    parser.add_argument(
        "--dry-run", action=argparse.BooleanOptionalAction, default=True, help="only say what would be published"
    )
    parser.add_argument(
        "--make", type=shlex.split, default=[], metavar="'WORDS'", help="more options of training.make_denoiser"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for. Raises ValueError, OutputError, UserError."""
    if args.push:
        check_id(f"{args.push}/name")
    out = Path(args.out)
    made = {name: out / slug(name) for name in args.models}
    jobs = {}
    for name, folder in made.items():
        words = ("--model", name, "--images", args.images, *args.make, "--out", str(folder))
        # The card is the last thing that make_denoiser writes.
        jobs[name] = Job(slug(name), ("training.make_denoiser", *words), made=folder / "README.md")
    with SharedFolder(out) as shared:
        runner = Runner(shared)
        for name, job in jobs.items():
            try:
                check_backbone(name)  # all of them, before hours go into the first
            except UserError as error:
                runner.fail(job, str(error).splitlines()[0])
        runner.run(list(jobs.values()))
        failed = {name: str(runner.failure(job)) for name, job in jobs.items() if not runner.done(job)}
    for name, folder in made.items():
        print(f"{name}: {failed.get(name) or folder / 'page.html'}")
    if args.push and is_first_process():
        failed |= publish({name: out for name, out in made.items() if name not in failed}, args.push, args.dry_run)
    print(f"{len(made) - len(failed)} of {len(made)} models")
    return 1 if failed else 0


def publish(made: dict[str, Path], namespace: str, dry_run: bool) -> dict[str, str]:
    """Push each folder, and go on where one fails. Returns those that did, with the reason."""
    failed = {}
    for name, out in made.items():
        try:
            push(str(out), f"{namespace}/{variant_name(slug(name), 'dvt')}", dry_run=dry_run)
        except UserError as error:
            failed[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main())
