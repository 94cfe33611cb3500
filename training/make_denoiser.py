"""A denoiser of one's own, in one command: stages 1 and 2, and what came of them on images held out.

    python -m training.make_denoiser --model vit_small_patch14_dinov2.lvd142m --images photos --out mine
    torchrun --nproc-per-node 8 -m training.make_denoiser ... (the same; with --nnodes on several machines)

It first says what it will cost on this machine. The defaults are those that were measured (RESULTS.md): 16 views of
at most 128 images, for a ViT-S an hour on two cores, for a ViT-B minutes on a GPU. timm.create_model("local-dir:OUT",
pretrained=True) loads the result; OUT/README.md is its card, OUT/page.html shows it before and after. Kill the run
whenever you like, and run the same command again to continue.

With --no-pairs nothing but the checkpoint is written on the way: pairs are solved in memory, and again after a kill.

Exit code: 0 done; 1 the loss diverged; 2 the command, the model or the images are wrong; 3 OUT cannot be written;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_dvt import calibrate, save_pretrained
from timm_dvt.attach import timm_name
from timm_dvt.errors import ImageError, UserError
from timm_dvt.image_files import Source, decode_image, given_images, read_file
from timm_dvt.loading import pick_device
from timm_dvt.options import add_options, at_least, build
from timm_dvt.shared_folder import read_lines
from training.common.command import add_model_arguments, command_parser, positive
from training.common.hub_images import SCHEME, fetch_images
from training.common.models import check_backbone, load_backbone
from training.evaluate.before_after import before_after
from training.loop.distributed import Processes, join_processes
from training.loop.entry import exit_code, only_run
from training.loop.log import LOG
from training.loop.order import split_places
from training.loop.settings import Pace
from training.pairs.folder import FAILURES, PARTS, PRECISIONS, PairFolder
from training.pairs.reader import PairReader, PairSet, open_pairs
from training.stage1.cost import describe_cost, seconds_a_view, seconds_of
from training.stage1.images import CROPS, denoise_images, describe_pairs
from training.stage1.on_the_fly import SolvingReader, pairs_of_images
from training.stage1.settings import Stage1Settings
from training.stage2.denoisers import make_denoisers
from training.stage2.gates import add_gates
from training.stage2.train import Stage2Settings, Stage2Training, describe_training, save

VIEWS, IMAGES = 16, 128
LEAST_IMAGES = 4  # two to learn from, and two to be judged by
LEFTOVER_VIEWS = 128
HELD_OUT, MOST_HELD_OUT = 0.1, 16  # of the images, and no more
BATCH, EPOCHS, LEAST_STEPS = 8, 15, 150  # of stage 2: a few images, whole and in crops, seen often enough


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return exit_code(lambda: run(args))


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = command_parser("make_denoiser", __doc__)
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR",
        help="a folder, a .txt list, or hf:OWNER/NAME[:CONFIG][:SPLIT], a data set; 4 images or more",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument(
        "--limit", type=at_least(LEAST_IMAGES), default=IMAGES, help="at most so many images (%(default)s)"
    )
    add_options(parser, Stage1Settings, "input_size", "dtype", views="forward passes an image (%(default)s)")
    parser.add_argument("--steps", type=positive, help="of stage 2 (default: 15 epochs at 8, 150 at least)")
    keep_length = "bring clean tokens to the length of the raw ones (default: yes)"
    keep_content = "put back what a regression shrinks and is not position (default: yes); see training/README.md"
    texts = {"target": "of stage 2 (%(default)s)", "keep_length": keep_length, "keep_content": keep_content}
    add_options(parser, Stage2Settings, "blank_gate", **texts)
    parser.add_argument(
        "--leftover",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take off what the trained denoiser leaves of position, by timm_dvt.calibrate (default: yes)",
    )
    parser.set_defaults(views=VIEWS, keep_length=True, keep_content=True)
    parser.add_argument("--pairs", action=argparse.BooleanOptionalAction, default=True, help="keep pairs in OUT/pairs")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    device = pick_device(args.device)
    check_backbone(args.model)  # before images are fetched, or weights
    images = args.images
    if images.startswith(SCHEME):
        images = fetch_images(images, args.limit, Path(args.out) / "images")
    seen, held_out = hold_out(usable(spread(given_images(images, args.out), args.limit)), args.seed)
    model = load_backbone(args.model, args.pretrained, args.seed).to(device)
    stage1 = build(Stage1Settings(crops=CROPS), args).settled(model)
    made_with = describe_pairs(args.model, args.pretrained, model, stage1)
    pairs, by_file = pairs_of_images(seen, Path(args.out) / "pairs", model, stage1, made_with)
    with join_processes(device) as processes:
        stage2 = stage2_settings(args, len(seen), processes)
        if processes.first:
            print(cost(model, stage1, stage2, len(seen), processes.count, args.leftover, args.pairs), flush=True)
        # Until stage 2 begins, nothing has come of these images but pairs, each of one image alone.
        undecided = ("pairs",) if args.steps else ("pairs", "steps")
        with only_run(
            args.out, processes, lambda: describe_training(args.model, model, pairs, stage2), undecided
        ) as folder:
            make_reader: Any = partial(SolvingReader, sources=by_file, model=model, settings=stage1)
            if args.pairs:
                pairs, make_reader = pairs_on_disk(model, pairs, by_file, stage1, processes), PairReader
            training = Stage2Training(pairs, stage2, device, processes, timm_name(model), make_reader)
            training.run(folder, Pace(None if args.pairs else 0))
            if processes.first:
                if stage2.blank_gate:
                    add_gates(training.denoisers, model.to(device), pairs, make_reader)
                save(model, training.denoisers, folder, pairs)
                if args.leftover:
                    options: Any = dict(method="leftover", views=LEFTOVER_VIEWS, blank_gate=stage2.blank_gate)
                    calibrate(model.to(device), [source.path for source in seen], **options)
                    save_pretrained(model, folder, model_args=model.recorded_arguments)
                facts = {
                    "images": str(len(pairs.files)),
                    "views of each": str(stage1.views),
                    "forward passes": str(len(pairs.files) * stage1.views),
                    "training steps": str(stage2.steps),
                    "learned to give": stage2.target
                    + ", content put back" * stage2.keep_content
                    + " (training/README.md of timm-dvt explains the symbols)",
                }
                if args.leftover:
                    facts["views for what it left of position, taken off"] = str(LEFTOVER_VIEWS)
                last = [record for record, _ in read_lines(folder / LOG) if "val_loss" in record][-1]
                facts["distance to what it learned to give, of its own validation"] = (
                    f"{last['val_loss_raw']:.3g} of raw tokens, {last['val_loss']:.3g} of what it predicts"
                )
                before_after(model.to(device).eval(), held_out, folder, args.out, facts, args.pretrained)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")
                print(f"{folder / 'page.html'}")


def spread(sources: list[Source], most: int) -> list[Source]:
    """At most so many of the images, evenly spread over them: neighbors in a folder are alike."""
    if len(sources) <= most:
        return sources
    return [sources[i * len(sources) // most] for i in range(most)]


def usable(sources: list[Source]) -> list[Source]:
    """Those of the images that can be decoded, each once, so that none is both learned from and judged by.

    The others are named.
    """
    known: dict[str, Source] = {}
    for source in sources:
        try:
            data, content = read_file(source.path)
            decode_image(data)
            if (first := known.setdefault(content.sha256, source)) is not source:
                raise ImageError(f"the same image as {first.shown}")
        except ImageError as error:
            print(f"left out {source.shown}: {error}", file=sys.stderr)
    return list(known.values())


def hold_out(sources: list[Source], seed: int) -> tuple[list[Source], list[Source]]:
    """Images to learn from, and others to be judged by.

    Raises:
        ValueError: too few images for both.
    """
    if len(sources) < LEAST_IMAGES:
        raise UserError(
            f"images must be {LEAST_IMAGES} or more, to learn from some and look at others, got {len(sources)}"
        )
    learn, judge = split_places(len(sources), min(HELD_OUT, MOST_HELD_OUT / len(sources)), seed)
    while len(judge) < 2:  # position's share is one of several images
        judge.append(learn.pop())
    return [sources[i] for i in learn], [sources[i] for i in judge]


def stage2_settings(args: argparse.Namespace, count: int, processes: Processes) -> Stage2Settings:
    """15 epochs over the pairs, and no fewer steps than a denoiser needs."""
    batch_size = max(BATCH // processes.count, 1) * processes.count
    steps = args.steps or max(LEAST_STEPS, -(-EPOCHS * count // batch_size))
    return Stage2Settings(
        target=args.target,
        steps=steps,
        batch_size=batch_size,
        seed=args.seed,
        keep_length=args.keep_length,
        keep_content=args.keep_content,
        blank_gate=args.blank_gate,
    )


def pairs_on_disk(
    model: nn.Module, wanted: PairSet, sources: Mapping[str, Source], settings: Stage1Settings, processes: Processes
) -> PairSet:
    """Stage 1 of the images, by the files of their pairs: those of the wanted pairs that there are, and no others."""
    with PairFolder(wanted.folder, wanted.settings) as folder:
        denoise_images(model, list(sources.values()), folder, settings)
    processes.wait()
    if not any((wanted.folder / file).exists() for file in wanted.files):
        raise UserError(f"none of the {len(sources)} images gives a pair: {wanted.folder / FAILURES} says why")
    return open_pairs(wanted.folder, only=wanted.files)


def cost(
    model: nn.Module,
    stage1: Stage1Settings,
    stage2: Stage2Settings,
    images: int,
    processes: int,
    leftover: bool,
    on_disk: bool,
) -> str:
    """What the run will take here, in words, from a timed batch of the backbone and of a denoiser."""
    reader = stage1.reader(model)
    each = seconds_a_view(reader, stage1.batch_size)
    grid = (reader.grid, reader.grid)
    pairs = PairSet(Path(), (), (0,), grid, reader.channels, {})
    (denoiser,) = make_denoisers(pairs, stage2.arch, stage2.blocks, 0).values()
    tokens = torch.rand(max(1, stage2.batch_size // processes), reader.grid**2, reader.channels, device=reader.device)
    step = 3 * seconds_of(lambda: denoiser.to(reader.device)(tokens, grid).sum().item())  # backward is two forwards
    maps = len(PARTS) + 2 * stage1.crops
    space = images * maps * reader.grid**2 * reader.channels * PRECISIONS["half"].itemsize / 1e9
    return (
        describe_cost(images, stage1.views, each, processes)
        + f"; stage 2: {stage2.steps} steps at {step:.3g} s, about {stage2.steps * step / 60:.3g} minutes"
        + f"; what it leaves: {LEFTOVER_VIEWS} views, about {LEFTOVER_VIEWS * each / 60:.3g} minutes" * leftover
        + f"; pairs: about {space:.2g} GB on disk" * on_disk
    )


if __name__ == "__main__":
    sys.exit(main())
