"""Stage 1 over many images: pairs of raw and clean feature maps, on any number of processes.

    python -m training.denoise_images --model vit_base_patch14_dinov2.lvd142m --images photos --out pairs
    torchrun --nproc-per-node 8 -m training.denoise_images --model ... (the same)

Kill it whenever you like, and run the same command again to continue: the result is that of an uninterrupted
run. Processes that are started by hand on the same OUT, here or on other machines, share the work. What
lies in OUT, and how this goes to a million images, is described in training/pairs/folder.py.

Exit code: 0 every image has its pair; 1 some have not, see OUT/failures.jsonl; 2 the command is wrong or does
not fit what OUT was begun with; 3 OUT cannot be written (disk full); 130 stopped by Ctrl-C.
"""

import argparse
import sys
from collections.abc import Sequence

from timm_dvt.errors import UserError
from timm_dvt.image_files import given_images
from timm_dvt.loading import load_model, pick_device
from timm_dvt.options import add_options, build
from training.common.command import add_model_arguments, command_parser, exit_code_of, positive
from training.common.memory import keep_freed_memory
from training.common.recipes import add_recipe
from training.pairs.folder import FAILURES, PRECISIONS, PairFolder
from training.stage1.images import STAGE1, denoise_images, describe_pairs
from training.stage1.progress import is_first_process
from training.stage1.settings import Stage1Settings


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    keep_freed_memory()
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """What the parsed arguments ask for. Raises UserError, OutputError."""
    sources = given_images(args.images, args.out)[: args.limit]
    device = pick_device(args.device)
    model = load_model(args.model, pretrained=args.pretrained, seed=args.seed)
    settings = build(STAGE1[args.recipe], args).settled(model)
    if args.crops not in (settings.crops, STAGE1[args.recipe].crops):  # of the default there are as many as can be
        raise UserError(f"--crops must be below --views, {settings.views}, got {args.crops}")
    with PairFolder(args.out, describe_pairs(args.model, args.pretrained, model, settings), args.precision) as folder:
        failed = denoise_images(model.to(device), sources, folder, settings)
    if failed and is_first_process():
        print(f"{failed} of {len(sources)} images failed: see {folder.path / FAILURES}", file=sys.stderr)
    if is_first_process() and (others := folder.others(sources)):
        print(
            f"{folder.path} holds {others} more pairs, of images that are not among these or were others then; "
            "training.train_denoiser learns from them too",
            file=sys.stderr,
        )
    return 1 if failed else 0


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
    parser = command_parser("denoise_images", __doc__)
    parser.add_argument("--images", required=True, help="a folder, an image or a .txt list of paths")
    parser.add_argument("--out", required=True, help="folder of the pairs; made, or continued if it exists")
    add_model_arguments(parser)
    add_options(parser.add_argument_group("stage 1"), Stage1Settings)
    parser.add_argument("--limit", type=positive, help="only the first so many images")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="half", help="of the maps on disk (default: %(default)s)"
    )
    add_recipe(parser, STAGE1, argv)
    return parser


if __name__ == "__main__":
    sys.exit(main())
