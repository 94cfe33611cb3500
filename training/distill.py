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
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_dvt.attach import remove_denoiser
from timm_dvt.errors import UnsupportedModelError, UserError
from timm_dvt.image_files import Source, images_digest, list_images
from timm_dvt.layouts import meant_size
from timm_dvt.weights.saving import save_plain
from training.common.command import add_model_arguments, help_from, positive
from training.common.models import load_model, make_for, pick_device, weights_digest
from training.common.recipes import STAGE3, add_recipe
from training.figures.rows import draw_rows
from training.loop.checkpoints import CHECKPOINT, Diverged
from training.loop.distance import loss_limit
from training.loop.distributed import ALONE, Processes, join_processes
from training.loop.entry import exit_code, only_run
from training.loop.log import TrainingLog
from training.loop.optimization import autocast, make_adamw
from training.loop.options import add_training_arguments, training_settings
from training.loop.order import positions, split_places
from training.loop.reading_ahead import read_ahead, reading_threads
from training.loop.run import resume, run_steps
from training.loop.settings import USUAL_PACE, Pace, TrainingSettings
from training.stage3.crops import AUGMENTS, CropReader
from training.stage3.student import MOST_VALIDATION, Student, Validation, as_tokens, freeze_unused


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """All that decides the weights a run ends with, beside the model and the images.

    Attributes:
        input_size: side of the square inputs in pixels.
        augment: of `training.stage3.crops.AUGMENTS`.
        tokens: what is learned, "all" or "patches".
    """

    input_size: int = 0
    weight_decay: float = 1e-5
    augment: str = "crop"
    tokens: str = "all"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    device = pick_device(args.device)
    sources = list_images(args.images)
    teacher = load_teacher(args.model, args.pretrained, args.seed)
    with join_processes(device) as processes:
        settings = make_settings(args, teacher, sources, processes)
        with only_run(args.out, processes, lambda: describe(args, teacher, sources, settings)) as folder:
            student = train(teacher, sources, settings, folder, device, processes, Pace.of(args))
            if processes.first:
                save_plain(student.cpu(), folder, teacher.backbone_name)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m training.distill", **help_from(__doc__))
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder, an image or a .txt list of paths")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument("--input-size", type=positive, metavar="PX", help="(default: the denoised model's own)")
    parser.add_argument(
        "--augment",
        choices=AUGMENTS,
        default=Settings.augment,
        help="random crops and flips, or whole images with random flips alone (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        choices=("all", "patches"),
        default=Settings.tokens,
        help="learn prefix tokens too, so that a classifier goes on working, or patch tokens alone (%(default)s)",
    )
    add_training_arguments(parser, "images", Settings(), base_lr=2e-4, warmup="15%")
    add_recipe(parser, STAGE3, argv)
    return parser


def load_teacher(name: str, pretrained: bool, seed: int) -> Any:
    """A denoised model. Raises ValueError if there is none by that name, TypeError if it has no denoiser."""
    teacher: Any = load_model(name, pretrained=pretrained, seed=seed)
    if not getattr(teacher, "denoises_final", False):
        raise UnsupportedModelError(
            f"--model {name} has no denoiser of its final features to learn from; name a *_dvt variant, or the "
            "local-dir:FOLDER that training.train_denoiser wrote"
        )
    if not teacher.backbone_name:
        raise UnsupportedModelError(
            f"--model {name}: timm has no name for its backbone, so nothing could rebuild the result"
        )
    teacher.requires_grad_(False)
    return teacher


def make_settings(args: argparse.Namespace, teacher: Any, sources: list[Source], processes: Processes) -> Settings:
    """The settings of a command line, for so many images and processes. Raises ValueError for what cannot be."""
    size = meant_size(teacher)[0] if args.input_size is None else args.input_size
    patch = teacher.layout.img_size[0] // teacher.layout.grid[0]
    if size % patch:
        raise UserError(f"input_size must be a multiple of the patch size {patch}, got {size}")
    make_for(teacher, size)
    shared = training_settings(args, len(sources), f"{args.images} holds {len(sources)} image", processes)
    return Settings(input_size=size, augment=args.augment, tokens=args.tokens, **shared)


def describe(args: argparse.Namespace, teacher: nn.Module, sources: list[Source], settings: Settings) -> dict[str, Any]:
    """What settings.json says: a run is only continued if all of it is the same."""
    images = {"count": len(sources), "digest": images_digest(sources)}
    weights = weights_digest(teacher)
    return {"task": "stage 3", "model": args.model, "weights": weights, "images": images, **asdict(settings)}


def train(
    teacher: Any,
    sources: list[Source],
    settings: Settings,
    folder: Path,
    device: torch.device,
    processes: Processes = ALONE,
    pace: Pace = USUAL_PACE,
) -> nn.Module:
    """Train, or continue to train, a student of a denoised model.

    Args:
        teacher: frozen; left as it is, but moved to the device.
        sources: training and validation images together.
        settings: what to do.
        folder: gets log, pictures and checkpoint, and is continued from.
        device: where to compute.
        processes: this process and the others.
        pace: what decides nothing of the weights.

    Returns:
        The student: a plain timm model.

    Raises:
        ValueError: no image can be read.
        Diverged: loss or weights are beyond reason; the last checkpoint is left as it is.
        BadCheckpoint, OutputError: see training/loop/checkpoints.py.
    """
    training, validation = split_places(len(sources), settings.val_fraction, settings.seed)
    crops = CropReader([sources[i] for i in training], settings.input_size, settings.seed, settings.augment)
    shown = [sources[i] for i in (validation or training)[:MOST_VALIDATION]]
    teacher = teacher.to(device).eval()
    config = resolve_model_data_config(teacher)
    mean, std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
    autocasting = autocast(device, settings.dtype)

    def normalize(images: Tensor) -> Tensor:
        return (images.to(device) - mean) / std

    # In eval mode: a pretrained ViT has no layer that training would change, and nothing random to be continued.
    learned_from = teacher.layout.prefix if settings.tokens == "patches" else 0
    vit = remove_denoiser(copy.deepcopy(teacher))
    student = Student(vit, teacher.norm_after_pool, settings.loss, learned_from).eval().requires_grad_(True)
    freeze_unused(student, torch.zeros(1, 3, settings.input_size, settings.input_size, device=device))
    optimizer = make_adamw(student, settings.lr, settings.weight_decay, settings.decay_all)
    first = resume(folder / CHECKPOINT, student, optimizer)
    model = processes.share(student)
    validation_loss = Validation(teacher, CropReader(shown, settings.input_size, settings.seed), normalize, autocasting)

    def read(step: int) -> Tensor:
        part = processes.part(step, settings.batch_size)
        return crops.random(positions(len(crops), part.start, part.stop, settings.seed), part.start)

    workers = reading_threads(device) if pace.workers is None else pace.workers
    batches = read_ahead((partial(read, step) for step in range(first, settings.steps)), workers)

    wanted = torch.empty(0)  # the teacher's tokens of the last step

    def loss(step: int) -> Tensor:
        nonlocal wanted
        images = normalize(next(batches))
        with autocasting():
            with torch.no_grad():
                wanted = as_tokens(teacher.forward_features(images), teacher.layout)
            return model(images, wanted)

    def not_sane(loss: float, limit: float, steps: range) -> Exception:
        rate = settings.schedule.rate(steps.stop - 1)
        return Diverged.beyond(loss, limit, steps.stop, rate, " (or the denoised model gives NaN)")

    def validate(step: int) -> dict[str, float]:
        numbers, rows = validation_loss(student)
        log.picture(step, "backbone | student | teacher", draw_rows(rows))
        return numbers

    with TrainingLog(
        folder, settings.steps, first, batch_size=settings.batch_size, samples=len(crops), speaks=processes.first
    ) as log:
        run_steps(
            student,
            optimizer,
            settings.schedule,
            loss,
            log,
            first,
            checkpoint=folder / CHECKPOINT,
            pace=pace,
            limit=lambda: loss_limit(student.distance, wanted[:, student.first :]),
            explain=not_sane,
            validate=validate,
            processes=processes,
        )
    return student.vit


if __name__ == "__main__":
    sys.exit(main())
