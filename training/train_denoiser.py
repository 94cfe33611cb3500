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
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from timm_dvt import save_pretrained
from timm_dvt.denoiser import ARCHITECTURES, Denoiser, combine
from timm_dvt.model import attach_denoiser, timm_name
from training.checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from training.command import exit_code, help_from, only_run
from training.distributed import ALONE, Processes, processes
from training.memory import keep_freed_memory
from training.models import load_pairs_model, pick_device, weights_digest
from training.optimisation import (
    diverged, learning_rate, loss_limit, lower_precision, make_adamw, set_learning_rate,
)  # fmt: skip
from training.options import add_model_arguments, add_training_arguments, run_length
from training.pair_loader import PairError, PairReader, PairSet, open_pairs, positions, read_batches
from training.reading_ahead import reading_threads
from training.stage2 import (
    TARGETS, Stage2, Validation, load_init, make_denoisers, parts_for, raw_and_target, start_as_static,
    subtract_mean_artifacts,
)  # fmt: skip
from training.training_log import TrainingLog


@dataclass(frozen=True)
class Settings:
    """All that decides the weights a run ends with, beside the pairs and the backbone.

    Attributes:
        arch: of `timm_dvt.denoiser.ARCHITECTURES`.
        blocks: transformer blocks of a denoiser.
        target: of `training.stage2.TARGETS`, what is predicted.
        start: "static" (see `training.stage2.start_as_static`) or "random".
        init: a folder to start from instead.
        steps: optimiser steps.
        batch_size: pairs a step, over all processes.
        lr, warmup: the schedule's peak, and steps to reach it.
        weight_decay: of AdamW, on matrices.
        dtype: "float32", or "bfloat16" for autocast.
        val_fraction: of the pairs, not trained on.
        seed: of weights, split and order.
    """

    arch: str = "block"
    blocks: int = 1
    target: str = "F"
    start: str = "static"
    init: str | None = None
    steps: int = 1
    batch_size: int = 64
    lr: float = 2e-4
    warmup: int = 0
    weight_decay: float = 0.01
    dtype: str = "float32"
    val_fraction: float = 0.05
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    device = pick_device(args.device)
    pairs = open_pairs(args.pairs, args.layers)
    model = load_pairs_model(args.model, args.pretrained, pairs.settings, args.pairs)
    check_fit(model, pairs, args.model)
    with processes(device) as ranks:
        settings = make_settings(args, pairs, ranks)
        with only_run(args.out, ranks, lambda: describe(args, model, pairs, settings)) as folder:
            denoisers = train(pairs, settings, folder, device, ranks, args.workers,
                              args.checkpoint_every, args.val_every, timm_name(model))
            if ranks.first:
                save(model, denoisers, folder)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(prog="python -m training.train_denoiser", **help_from(__doc__))
    parser.add_argument("--pairs", required=True, metavar="DIR", help="what training.denoise_images wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument("--layers", type=int, nargs="+", metavar="N",
                        help="blocks to train for, as numbered in the pairs (default: all that they hold)")
    group = parser.add_argument_group("denoiser")
    group.add_argument("--arch", choices=ARCHITECTURES, default=Settings.arch,
                       help="the paper's block with position embedding (default), its ablations of Tab. 6, or the "
                       "mean artifact map subtracted, which needs no training")
    group.add_argument("--blocks", type=int, default=Settings.blocks,
                       help="transformer blocks (default: the paper's %(default)s)")
    group.add_argument("--target", choices=TARGETS, default=Settings.target,
                       help="what to predict: the paper's F, F at the length of raw - G, raw - G, or the mean of "
                       "the first and the last (default: %(default)s); see training/stage2.py")
    group.add_argument("--start", choices=("static", "random"), default=Settings.start,
                       help="of a block: from the mean correction, the block an identity (default), or from random "
                       "weights alone; the paper does not say")
    group.add_argument("--init", metavar="FOLDER", help="start from a trained denoiser instead")
    add_training_arguments(parser, "pairs", Settings.weight_decay, Settings.val_fraction, lr=Settings.lr)
    return parser


def make_settings(args: argparse.Namespace, pairs: PairSet, ranks: Processes) -> Settings:
    """The settings of a command line, for so many pairs and processes.

    Raises:
        ValueError: a value that cannot be.
    """
    if args.blocks < 1 or (args.blocks > 1 and not args.arch.startswith("block")):
        accepted = "1 or more" if args.arch.startswith("block") else f"1 with --arch {args.arch}"
        raise ValueError(f"--blocks must be {accepted}, got {args.blocks}")
    if args.init and args.arch == "static":
        raise ValueError("--init starts a training, and --arch static needs none; leave out one of the two")
    count = len(pairs.files)
    steps, batch_size = run_length(args, count, f"{pairs.folder} holds {count} pair", ranks)
    return Settings(
        args.arch, args.blocks, args.target, args.start, args.init, steps, batch_size, args.lr, args.warmup,
        args.weight_decay, args.dtype, args.val_fraction, args.seed,
    )


def check_fit(model: Any, pairs: PairSet, name: str) -> None:
    """Raise PairError unless the pairs can be of this model, by its width and number of blocks."""
    if model.embed_dim != pairs.channels:
        raise PairError(
            f"{pairs.folder} holds features of {pairs.channels} channels, but --model {name} has {model.embed_dim}: "
            f"they are of another model ({pairs.settings.get('model', 'unnamed')})"
        )
    if max(pairs.layers) >= len(model.blocks):
        raise PairError(
            f"{pairs.folder} holds features of block {max(pairs.layers)}, but the last of --model {name} is "
            f"{len(model.blocks) - 1}: they are of another model ({pairs.settings.get('model', 'unnamed')})"
        )


def describe(args: argparse.Namespace, model: nn.Module, pairs: PairSet, settings: Settings) -> dict[str, Any]:
    """What settings.json says: a run is only continued if all of it is the same."""
    init = {"init_weights": _file_digest(settings.init)} if settings.init else {}
    return {
        "task": "stage 2",
        "model": args.model,
        "weights": weights_digest(model),
        "pairs": {"count": len(pairs.files), "digest": pairs.digest(), "layers": list(pairs.layers)},
        "grid": list(pairs.grid),
        "channels": pairs.channels,
        **asdict(settings),
        **init,
    }


def train(
    pairs: PairSet,
    settings: Settings,
    folder: Path,
    device: torch.device,
    ranks: Processes = ALONE,
    workers: int | None = None,
    checkpoint_every: int = 200,
    val_every: int | None = None,
    backbone: str = "",
) -> dict[int, Denoiser]:
    """Train, or continue to train, denoisers for every layer of some pairs.

    Args:
        pairs: training and validation pairs together.
        settings: what to do.
        folder: gets log, pictures and checkpoint, and is continued from.
        device: where to compute.
        ranks: this process and the others.
        workers: threads that read pairs ahead; None is as many as suit the device.
        checkpoint_every, val_every: in steps; None is ten times a run.
        backbone: by which `settings.init` is checked.

    Returns:
        Denoisers by layer, on the CPU.

    Raises:
        PairError: a pair is damaged or holds NaN; names the file.
        Diverged: loss or weights are beyond reason; the last checkpoint is left as it is.
        BadCheckpoint, OutputError: see training/checkpoints.py.
    """
    keep_freed_memory(large=True)
    training, validation = pairs.split(settings.val_fraction, settings.seed)
    reader = PairReader(training, parts_for(settings.target))
    denoisers = make_denoisers(pairs, settings.arch, settings.blocks, settings.seed)
    if settings.arch == "static":
        subtract_mean_artifacts(denoisers, PairReader(training, ("artifacts",), room=0))
        settings = replace(settings, steps=0)  # what follows only validates
    module = Stage2(denoisers, pairs.grid).to(device)
    optimizer = make_adamw(module, settings.lr, settings.weight_decay)
    facts = load_checkpoint(folder / CHECKPOINT, module, optimizer)
    first = 0 if facts is None else facts["step"]
    if facts is None and settings.init:
        load_init(denoisers, settings.init, pairs, backbone)
    elif facts is None and settings.start == "static" and settings.arch.startswith("block") and ranks.first:
        start_as_static(denoisers, reader, settings.target)
    model = ranks.share(module)
    lower = lower_precision(device, settings.dtype)
    shown = validation if validation.files else training
    validate = Validation(PairReader(shown, parts_for(settings.target)), settings.target, device, lower)

    # Nothing is flipped or cropped: artifacts are tied to places, so that a flipped raw map is one that the backbone
    # never gives, and the denoiser would learn the mean of the artifacts and of their mirror image.
    def places(step: int) -> list[int]:
        part = ranks.part(step, settings.batch_size)
        return positions(len(training.files), part.start, part.stop, settings.seed)

    # A GPU is sent what the files hold and makes float32 of it faster than a CPU does.
    precision = torch.float32 if device.type == "cpu" else reader.read(places(first)[:1]).dtype
    workers = reading_threads(device) if workers is None else workers
    batches = read_batches(reader, places, range(first, settings.steps), precision, workers)
    val_every = val_every or max(1, settings.steps // 10)
    check_every = 1 if device.type == "cpu" else 10  # looking at the loss makes a GPU wait
    limit = 0.0  # of the loss
    with TrainingLog(folder, settings.steps, first, settings.batch_size, ranks.first) as log:
        for step in range(first, settings.steps):
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup)
            set_learning_rate(optimizer, lr)
            raw, clean = raw_and_target(next(batches).to(device, torch.float32), settings.target)
            with lower():
                losses = model(raw, clean)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # the layers share nothing: each one's gradient is as if it were alone
            optimizer.step()

            done = step + 1
            last = done == settings.steps
            if done % check_every == 0 or last:
                loss = losses.mean().item()
                limit = limit or loss_limit(clean)
                if not loss < limit:
                    seen = [place for s in range(max(first, done - check_every), done) for place in places(s)]
                    raise _not_sane(loss, limit, done, lr, reader, seen)
                log.steps_done(check_every if done % check_every == 0 else done % check_every)
            if done % 10 == 0 or last:
                epoch = done * settings.batch_size / len(training.files)
                log.write(done, loss=loss, lr=lr, epoch=epoch, images_per_second=log.images_per_second)
            if (done % val_every == 0 or last) and ranks.first:
                log.write(done, **validate(module, done, log))
                log.resume()
            if (done % checkpoint_every == 0 or last) and ranks.first:
                save_checkpoint(folder / CHECKPOINT, module, optimizer, done, {})
                log.resume()
        if settings.steps == 0 and ranks.first:
            log.write(0, **validate(module, 0, log))
    return {layer: denoiser.cpu() for layer, denoiser in denoisers.items()}


def save(model: Any, denoisers: dict[int, Denoiser], folder: Path) -> None:
    """Write the backbone with its denoisers as a folder that timm loads."""
    attach_denoiser(model, combine(denoisers, len(model.blocks) - 1))
    save_pretrained(model, folder, model_args=model.recorded_arguments)


def _not_sane(loss: float, limit: float, step: int, lr: float, reader: PairReader, seen: list[int]) -> Exception:
    """Why a loss is no number or too large: pairs that are not finite, or a run that diverges."""
    broken = reader.not_finite(seen)
    if broken:
        names = ", ".join(map(str, broken[:3]))
        return PairError(f"NaN or infinite features in {names}; delete the pair and run training.denoise_images again")
    return diverged(loss, limit, step, lr)


def _file_digest(folder: str) -> str:
    path = Path(folder) / "model.safetensors"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"--init {folder}: {path} cannot be read ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(main())
