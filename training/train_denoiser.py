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
from timm_dvt.loading import pick_device
from timm_dvt.options import Blocks, add_options, block_numbers, build
from training.common.command import add_model_arguments, command_parser
from training.common.models import load_pairs_model
from training.common.recipes import add_recipe
from training.loop.distributed import join_processes
from training.loop.entry import exit_code, only_run
from training.loop.settings import Pace, TrainingSettings
from training.pairs.reader import open_pairs
from training.stage2.gates import add_gates
from training.stage2.train import STAGE2, Stage2Settings, Stage2Training, check_fit, describe_training, save


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    recipe = STAGE2[args.recipe]
    asked = build(recipe, args)
    if not ARCHITECTURES[asked.arch].trains and (asked.steps, asked.whole) != (recipe.steps, recipe.whole):
        raise UserError(f"--arch {asked.arch} needs no training; leave out --steps, --epochs and --whole")
    device = pick_device(args.device)
    pairs = open_pairs(args.pairs, args.layers)
    with join_processes(device) as processes:
        count = len(pairs.files)
        held = f"{args.pairs} holds {count} pair{'s' * (count != 1)}"
        settings = asked.settled(count, held, processes)
        model = load_pairs_model(args.model, args.pretrained, pairs.settings, args.pairs)
        check_fit(model, pairs, args.model)
        undecided = ("init", "init_weights", "arch", "blocks")  # what an --init that does not fit is mended by
        with only_run(
            args.out, processes, lambda: describe_training(args.model, model, pairs, settings), undecided
        ) as folder:
            training = Stage2Training(pairs, settings, device, processes, timm_name(model))
            training.run(folder, build(Pace, args))
            if processes.first:
                if settings.blank_gate:
                    add_gates(training.denoisers, model.to(device), pairs)
                save(model, training.denoisers, folder, pairs)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
    parser = command_parser("train_denoiser", __doc__)
    parser.add_argument("--pairs", required=True, metavar="DIR", help="what training.denoise_images wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument(
        "--layers",
        type=block_numbers,
        nargs="+",
        action=Blocks,
        metavar="N",
        help="blocks to train for, as numbered in the pairs (default: all that they hold)",
    )
    add_options(parser.add_argument_group("denoiser"), Stage2Settings)
    group = parser.add_argument_group("training")
    add_options(group, TrainingSettings)
    add_options(group, Pace)
    add_recipe(parser, STAGE2, argv)
    return parser


if __name__ == "__main__":
    sys.exit(main())
