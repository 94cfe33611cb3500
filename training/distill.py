"""Stage 3: fine-tune a whole ViT towards backbone and denoiser, on images alone.

    python -m training.distill --model vit_base_patch14_dinov2.lvd142m_dvt --images photos --out distilled
    python -m training.distill --model local-dir:denoiser --images photos --out distilled
    torchrun --nproc-per-node 8 -m training.distill --batch-size 8 ... (the same)

The teacher is the denoised model, frozen; the student starts as its backbone, and learns the teacher's tokens: the
denoised patch tokens, and the prefix tokens as the backbone has them, so that a classifier goes on working. The
loss is Eq. 11 of each token. The paper leaves this stage to its repository, whose schedule it is: AdamW at 2e-4 times
the square root of batch / 256, weight decay 1e-5, warm-up over the first 15% of the steps, then a cosine, ten epochs.

The result is a plain timm model, without a denoiser and as fast as the backbone:
timm.create_model("local-dir:OUT", pretrained=True) loads it, and needs no timm_dvt. Beside it OUT holds
settings.json, log.jsonl, pictures (backbone | student | teacher) and the checkpoint. Kill a run whenever you like,
and run the same command again to continue: on the CPU, the weights are those of an uninterrupted run, bit for bit.

Exit code: 0 done; 1 the loss diverged; 2 the command, the model or the images are wrong; 3 OUT cannot be written;
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_dvt.model import remove_denoiser
from timm_dvt.saving import save_plain
from training.checkpoints import CHECKPOINT, load_checkpoint, save_checkpoint
from training.command import exit_code, help_from, only_run
from training.distributed import ALONE, Processes, processes
from training.image_crops import CropReader
from training.images import Source, list_images
from training.memory import keep_freed_memory
from training.models import load_model, pick_device, weights_digest
from training.optimisation import (
    diverged, learning_rate, loss_limit, lower_precision, make_adamw, set_learning_rate,
)  # fmt: skip
from training.options import add_model_arguments, add_training_arguments, run_length
from training.pair_loader import positions, split_places
from training.reading_ahead import read_ahead, reading_threads
from training.stage3 import MOST_VALIDATION, Student, Validation, freeze_unused
from training.training_log import TrainingLog


@dataclass(frozen=True)
class Settings:
    """All that decides the weights a run ends with, beside the model and the images.

    Attributes:
        input_size: side of the square inputs in pixels.
        steps: optimiser steps.
        batch_size: images a step, over all processes.
        lr, warmup: the schedule's peak, and steps to reach it.
        weight_decay: of AdamW, on matrices.
        dtype: "float32", or "bfloat16" for autocast.
        val_fraction: of the images, not trained on.
        seed: of split, order and crops.
    """

    input_size: int
    steps: int = 1
    batch_size: int = 64
    lr: float = 1e-4
    warmup: int = 0
    weight_decay: float = 1e-5
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
    sources = list_images(args.images)
    teacher = load_teacher(args.model, args.pretrained, args.seed)
    with processes(device) as ranks:
        settings = make_settings(args, teacher, sources, ranks)
        with only_run(args.out, ranks, lambda: describe(args, teacher, sources, settings)) as folder:
            student = train(
                teacher, sources, settings, folder, device, ranks, args.workers, args.checkpoint_every, args.val_every
            )
            if ranks.first:
                save_plain(student.cpu(), folder, teacher.backbone_name)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(prog="python -m training.distill", **help_from(__doc__))
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder, an image or a .txt list of paths")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument("--input-size", type=int, metavar="PX", help="(default: the denoised model's own)")
    add_training_arguments(
        parser, "images", Settings.weight_decay, Settings.val_fraction,
        lr_help="2e-4 * sqrt(batch / 256)", warmup=None, warmup_help="15%% of all",
    )  # fmt: skip
    return parser


def load_teacher(name: str, pretrained: bool, seed: int) -> Any:
    """A denoised model. Raises ValueError if there is none by that name, TypeError if it has no denoiser."""
    teacher: Any = load_model(name, pretrained=pretrained, seed=seed)
    if not getattr(teacher, "denoises_final", False):
        raise TypeError(
            f"--model {name} has no denoiser of its final features to learn from; name a *_dvt variant, or the "
            "local-dir:FOLDER that training.train_denoiser wrote"
        )
    if not teacher.backbone_name:
        raise TypeError(f"--model {name}: timm has no name for its backbone, so nothing could rebuild the result")
    teacher.requires_grad_(False)
    return teacher


def make_settings(args: argparse.Namespace, teacher: Any, sources: list[Source], ranks: Processes) -> Settings:
    """The settings of a command line, for so many images and processes. Raises ValueError for what cannot be."""
    size = teacher.patch_embed.img_size[0] if args.input_size is None else args.input_size
    patch = teacher.patch_embed.patch_size[0]
    if size < patch or size % patch:
        raise ValueError(f"input_size must be a multiple of the patch size {patch}, got {size}")
    if size != teacher.patch_embed.img_size[0] and not teacher.dynamic_img_size:
        raise ValueError(f"input_size must be this model's one, {teacher.patch_embed.img_size[0]}, got {size}")
    steps, batch_size = run_length(args, len(sources), f"{args.images} holds {len(sources)} image", ranks)
    # As main_distillation.py of the paper's repository has them, the batch being that of all processes.
    lr = 2e-4 * (batch_size / 256) ** 0.5 if args.lr is None else args.lr
    warmup = int(0.15 * steps) if args.warmup is None else args.warmup
    return Settings(size, steps, batch_size, lr, warmup, args.weight_decay, args.dtype, args.val_fraction, args.seed)


def describe(args: argparse.Namespace, teacher: nn.Module, sources: list[Source], settings: Settings) -> dict[str, Any]:
    """What settings.json says: a run is only continued if all of it is the same."""
    names = "\n".join(source.name for source in sources)
    digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    images = {"count": len(sources), "names": digest}
    weights = weights_digest(teacher)
    return {"task": "stage 3", "model": args.model, "weights": weights, "images": images, **asdict(settings)}


def train(
    teacher: Any,
    sources: list[Source],
    settings: Settings,
    folder: Path,
    device: torch.device,
    ranks: Processes = ALONE,
    workers: int | None = None,
    checkpoint_every: int = 200,
    val_every: int | None = None,
) -> nn.Module:
    """Train, or continue to train, a student of a denoised model.

    Args:
        teacher: frozen; left as it is, but moved to the device.
        sources: training and validation images together.
        settings: what to do.
        folder: gets log, pictures and checkpoint, and is continued from.
        device: where to compute.
        ranks: this process and the others.
        workers: threads that read images ahead; None is as many as suit the device.
        checkpoint_every, val_every: in steps; None is ten times a run.

    Returns:
        The student: a plain timm model.

    Raises:
        ValueError: no image can be read.
        Diverged: loss or weights are beyond reason; the last checkpoint is left as it is.
        BadCheckpoint, OutputError: see training/checkpoints.py.
    """
    keep_freed_memory(large=True)
    training, validation = split_places(len(sources), settings.val_fraction, settings.seed)
    crops = CropReader([sources[i] for i in training], settings.input_size, settings.seed)
    shown = [sources[i] for i in (validation or training)[:MOST_VALIDATION]]
    teacher = teacher.to(device).eval()
    config = resolve_model_data_config(teacher)
    mean, std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
    lower = lower_precision(device, settings.dtype)

    def normalise(images: Tensor) -> Tensor:
        return (images.to(device) - mean) / std

    # In eval mode: a pretrained ViT has no layer that training would change, and nothing random to be continued.
    student = Student(remove_denoiser(copy.deepcopy(teacher)), teacher.norm_after_pool).eval().requires_grad_(True)
    freeze_unused(student, torch.zeros(1, 3, settings.input_size, settings.input_size, device=device))
    optimizer = make_adamw(student, settings.lr, settings.weight_decay)
    facts = load_checkpoint(folder / CHECKPOINT, student, optimizer)
    first = 0 if facts is None else facts["step"]
    model = ranks.share(student)

    validate = Validation(teacher, CropReader(shown, settings.input_size, settings.seed), normalise, lower)

    def read(step: int) -> Tensor:
        part = ranks.part(step, settings.batch_size)
        return crops.random(positions(len(crops), part.start, part.stop, settings.seed), part.start)

    workers = reading_threads(device) if workers is None else workers
    batches = read_ahead((partial(read, step) for step in range(first, settings.steps)), workers)
    val_every = val_every or max(1, settings.steps // 10)
    with TrainingLog(folder, settings.steps, first, settings.batch_size, ranks.first) as log:
        for step in range(first, settings.steps):
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup)
            set_learning_rate(optimizer, lr)
            images = normalise(next(batches))
            with lower():
                with torch.no_grad():
                    wanted = teacher.forward_features(images)
                loss = model(images, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            done, value = step + 1, loss.item()
            last = done == settings.steps
            limit = loss_limit(wanted)
            if not value < limit:
                raise diverged(value, limit, done, lr, " (or the denoised model gives NaN)")
            log.steps_done()
            if done % 10 == 0 or last:
                epoch = done * settings.batch_size / len(crops)
                log.write(done, loss=value, lr=lr, epoch=epoch, images_per_second=log.images_per_second)
            if (done % val_every == 0 or last) and ranks.first:
                log.write(done, **validate(student, done, log))
                log.resume()
            if (done % checkpoint_every == 0 or last) and ranks.first:
                save_checkpoint(folder / CHECKPOINT, student, optimizer, done, {})
                log.resume()
    return student.vit


if __name__ == "__main__":
    sys.exit(main())
