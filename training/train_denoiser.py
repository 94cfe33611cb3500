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
from torch import Tensor, nn

from timm_dvt import save_pretrained
from timm_dvt.denoiser import ARCHITECTURES, Denoiser, combine
from timm_dvt.model import attach_denoiser, timm_name
from training.common.command import add_model_arguments, help_from
from training.common.models import load_pairs_model, pick_device, weights_digest
from training.common.recipes import STAGE2, add_recipe
from training.figures.rows import draw_rows
from training.loop.checkpoints import CHECKPOINT, Diverged
from training.loop.distance import loss_limit
from training.loop.distributed import ALONE, Processes, join_processes
from training.loop.entry import exit_code, only_run
from training.loop.log import TrainingLog
from training.loop.optimisation import autocast, make_adamw
from training.loop.options import add_training_arguments, training_settings
from training.loop.order import positions
from training.loop.reading_ahead import reading_threads
from training.loop.run import resume, run_steps
from training.loop.settings import TrainingSettings
from training.pairs.reader import PairError, PairReader, PairSet, open_pairs, read_batches
from training.stage2.denoisers import Stage2, Validation, make_denoisers
from training.stage2.starts import load_init, start_as_static, subtract_mean_artifacts
from training.stage2.targets import TARGETS, parts_for, raw_and_target


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """All that decides the weights a run ends with, beside the pairs and the backbone.

    Attributes:
        arch: of `timm_dvt.denoiser.ARCHITECTURES`.
        blocks: transformer blocks of a denoiser.
        target: of `training.stage2.targets.TARGETS`, what is predicted.
        start: "static" (see `training.stage2.starts.start_as_static`) or "random".
        init: a folder to start from instead.
    """

    arch: str = "block"
    blocks: int = 1
    target: str = "F"
    start: str = "static"
    init: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    device = pick_device(args.device)
    pairs = open_pairs(args.pairs, args.layers)
    model = load_pairs_model(args.model, args.pretrained, pairs.settings, args.pairs)
    check_fit(model, pairs, args.model)
    with join_processes(device) as processes:
        settings = make_settings(args, pairs, processes)
        with only_run(args.out, processes, lambda: describe(args, model, pairs, settings)) as folder:
            denoisers = train(pairs, settings, folder, device, processes, args.workers,
                              args.checkpoint_every, args.val_every, timm_name(model))
            if processes.first:
                save(model, denoisers, folder)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
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
                       "the first and the last (default: %(default)s); see training/stage2/denoisers.py")
    group.add_argument("--start", choices=("static", "random"), default=Settings.start,
                       help="of a block: from the mean correction, the block an identity (default), or from random "
                       "weights alone; the paper does not say")
    group.add_argument("--init", metavar="FOLDER", help="start from a trained denoiser instead")
    add_training_arguments(parser, "pairs", Settings())
    add_recipe(parser, STAGE2, argv)
    return parser


def make_settings(args: argparse.Namespace, pairs: PairSet, processes: Processes) -> Settings:
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
    shared = training_settings(args, count, f"{pairs.folder} holds {count} pair", processes)
    return Settings(
        arch=args.arch, blocks=args.blocks, target=args.target, start=args.start, init=args.init, **shared
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
    processes: Processes = ALONE,
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
        processes: this process and the others.
        workers: threads that read pairs ahead; None is as many as suit the device.
        checkpoint_every, val_every: in steps; None is ten times a run.
        backbone: by which `settings.init` is checked.

    Returns:
        Denoisers by layer, on the CPU.

    Raises:
        PairError: a pair is damaged or holds NaN; names the file.
        Diverged: loss or weights are beyond reason; the last checkpoint is left as it is.
        BadCheckpoint, OutputError: see training/loop/checkpoints.py.
    """
    training, validation = pairs.split(settings.val_fraction, settings.seed)
    reader = PairReader(training, parts_for(settings.target))
    denoisers = make_denoisers(pairs, settings.arch, settings.blocks, settings.seed)
    if settings.arch == "static":
        subtract_mean_artifacts(denoisers, PairReader(training, ("artifacts",), cache_bytes=0))
        settings = replace(settings, steps=0, warmup=0)  # what follows only validates
    module = Stage2(denoisers, pairs.grid, settings.loss).to(device)
    optimizer = make_adamw(module, settings.lr, settings.weight_decay, settings.decay_all)
    first = resume(folder / CHECKPOINT, module, optimizer)
    if not first and settings.init:
        load_init(denoisers, settings.init, pairs, backbone)
    elif not first and settings.start == "static" and settings.arch.startswith("block") and processes.first:
        start_as_static(denoisers, reader, settings.target)
    model = processes.share(module)
    autocasting = autocast(device, settings.dtype)
    shown = validation if validation.files else training
    validation_loss = Validation(PairReader(shown, parts_for(settings.target)), settings.target, device, autocasting)

    # Nothing is flipped or cropped: artifacts are tied to places, so that a flipped raw map is one that the backbone
    # never gives, and the denoiser would learn the mean of the artifacts and of their mirror image.
    def places(step: int) -> list[int]:
        part = processes.part(step, settings.batch_size)
        return positions(len(training.files), part.start, part.stop, settings.seed)

    # A GPU is sent what the files hold and makes float32 of it faster than a CPU does.
    precision = torch.float32 if device.type == "cpu" else reader.read(places(first)[:1]).dtype
    workers = reading_threads(device) if workers is None else workers
    batches = read_batches(reader, places, range(first, settings.steps), precision, workers)

    clean = torch.empty(0)  # the target of the last step

    def loss(step: int) -> Tensor:
        nonlocal clean
        raw, clean = raw_and_target(next(batches).to(device, torch.float32), settings.target)
        with autocasting():
            return model(raw, clean)  # of each layer; they share nothing, so each gradient is as if it were alone

    def not_sane(loss: float, limit: float, steps: range) -> Exception:
        broken = reader.not_finite([place for step in steps for place in places(step)])
        if not broken:
            return Diverged.beyond(loss, limit, steps.stop, settings.schedule.rate(steps.stop - 1))
        names = ", ".join(map(str, broken[:3]))
        return PairError(f"NaN or infinite features in {names}; delete the pair and run training.denoise_images again")

    def validate(step: int) -> dict[str, float]:
        numbers, rows = validation_loss(module)
        log.picture(step, "raw | predicted | target", draw_rows(rows))
        return numbers

    with TrainingLog(
        folder, settings.steps, first,
        batch_size=settings.batch_size, samples=len(training.files), speaks=processes.first,
    ) as log:
        run_steps(
            module, optimizer, settings.schedule, loss, log, first,
            checkpoint=folder / CHECKPOINT, checkpoint_every=checkpoint_every,
            limit=lambda: loss_limit(module.distance, clean), explain=not_sane,
            validate=validate, val_every=val_every, processes=processes,
        )
        if settings.steps == 0 and processes.first:
            log.write(0, **validate(0))
    return {layer: denoiser.cpu() for layer, denoiser in denoisers.items()}


def save(model: Any, denoisers: dict[int, Denoiser], folder: Path) -> None:
    """Write the backbone with its denoisers as a folder that timm loads."""
    attach_denoiser(model, combine(denoisers, len(model.blocks) - 1))
    save_pretrained(model, folder, model_args=model.recorded_arguments)


def _file_digest(folder: str) -> str:
    path = Path(folder) / "model.safetensors"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"--init {folder}: {path} cannot be read ({error.strerror or error})") from error


if __name__ == "__main__":
    sys.exit(main())
