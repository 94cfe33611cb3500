"""Stage 2: train a denoiser from pairs of raw and clean feature maps.

    python -m training.train_denoiser --pairs pairs --model vit_base_patch14_dinov2.lvd142m --out denoiser
    torchrun --nproc-per-node 8 -m training.train_denoiser --batch-size 8 ... (the same)

The defaults are the paper's (4.3, A.2): one transformer block with a position embedding, Eq. 11, 10 epochs in
batches of 64, AdamW at 2e-4, cosine. The backbone is frozen, and not even run: raw features come from the pairs.

timm.create_model("local-dir:OUT", pretrained=True) loads the result. Beside it OUT holds settings.json, log.jsonl,
pictures (raw | predicted | target) and the checkpoint. Kill a run whenever you like, and run the same command
again to continue: on the CPU, the weights are those of an uninterrupted run, bit for bit.

Exit code: 0 done; 1 the loss diverged; 2 the command, the model or the pairs are wrong; 3 OUT cannot be written;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.attach import timm_name
from timm_dvt.errors import UserError
from training.common.command import add_model_arguments, help_from, positive
from training.common.models import load_pairs_model, pick_device
from training.common.recipes import STAGE2, add_recipe
from training.loop.distributed import Processes, join_processes
from training.loop.entry import exit_code, only_run
from training.loop.options import add_training_arguments, training_settings
from training.loop.settings import Pace
from training.pairs.reader import PairSet, open_pairs
from training.stage2.gates import add_gates
from training.stage2.targets import TARGETS
from training.stage2.train import Stage2Settings, check_fit, describe_training, save, train


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    device = pick_device(args.device)
    pairs = open_pairs(args.pairs, args.layers)
    with join_processes(device) as processes:
        settings = make_settings(args, pairs, processes)
        model = load_pairs_model(args.model, args.pretrained, pairs.settings, args.pairs)
        check_fit(model, pairs, args.model)
        with only_run(args.out, processes, lambda: describe_training(args.model, model, pairs, settings)) as folder:
            denoisers = train(pairs, settings, folder, device, processes, Pace.of(args), timm_name(model))
            if processes.first:
                if settings.blank_gate:
                    add_gates(denoisers, model.to(device), pairs)
                save(model, denoisers, folder, pairs)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m training.train_denoiser", **help_from(__doc__))
    parser.add_argument("--pairs", required=True, metavar="DIR", help="what training.denoise_images wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="blocks to train for, as numbered in the pairs (default: all that they hold)",
    )
    group = parser.add_argument_group("denoiser")
    group.add_argument(
        "--arch",
        choices=list(ARCHITECTURES),
        default=Stage2Settings.arch,
        help="the paper's block with position embedding (default), its ablations of Tab. 6, or the "
        "mean artifact map subtracted, which needs no training",
    )
    group.add_argument(
        "--blocks",
        type=positive,
        default=Stage2Settings.blocks,
        help="transformer blocks (default: the paper's %(default)s)",
    )
    group.add_argument(
        "--target",
        choices=TARGETS,
        default=Stage2Settings.target,
        help="what to predict: the paper's F, F at the length of raw - G, raw - G, or the mean of "
        "the first and the last (default: %(default)s); see training/stage2/targets.py",
    )
    group.add_argument(
        "--keep-length",
        action=argparse.BooleanOptionalAction,
        default=Stage2Settings.keep_length,
        help="once trained, bring tokens to the length of the raw ones: for what lives on lengths, as "
        "object discovery does (default: no, as in the paper)",
    )
    group.add_argument(
        "--blank-gate",
        action=argparse.BooleanOptionalAction,
        default=Stage2Settings.blank_gate,
        help="once trained, know images without content (plain colors, noise) and level them (default: yes)",
    )
    group.add_argument(
        "--start",
        choices=("static", "random"),
        default=Stage2Settings.start,
        help="of a block: from the mean correction, the block an identity (default), or from random "
        "weights alone; the paper does not say",
    )
    group.add_argument(
        "--whole",
        type=float,
        default=Stage2Settings.whole,
        metavar="SHARE",
        help="of whole images among what is learned from, where the pairs hold crops too; 1 leaves crops out, as the "
        "paper does (default: %(default)s)",
    )
    group.add_argument("--init", metavar="FOLDER", help="start from a trained denoiser instead")
    add_training_arguments(parser, "pairs", Stage2Settings())
    add_recipe(parser, STAGE2, argv)
    return parser


def make_settings(args: argparse.Namespace, pairs: PairSet, processes: Processes) -> Stage2Settings:
    """The settings of a command line, for so many pairs and processes.

    Raises:
        ValueError: a value that cannot be.
    """
    if args.blocks > 1 and not ARCHITECTURES[args.arch].deep:
        raise UserError(f"--blocks must be 1 with --arch {args.arch}, got {args.blocks}")
    if args.init and not ARCHITECTURES[args.arch].trains:
        raise UserError("--init starts a training, and --arch static needs none; leave out one of the two")
    count = len(pairs.files)
    shared = training_settings(args, count, f"{pairs.folder} holds {count} pair", processes)
    return Stage2Settings(
        arch=args.arch,
        blocks=args.blocks,
        target=args.target,
        whole=args.whole,
        start=args.start,
        init=args.init,
        keep_length=args.keep_length,
        blank_gate=args.blank_gate,
        **shared,
    )


if __name__ == "__main__":
    sys.exit(main())
