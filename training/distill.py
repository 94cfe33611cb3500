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
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from timm_dvt.errors import UnsupportedModelError, UserError
from timm_dvt.image_files import Source, given_images, images_digest
from timm_dvt.layouts import check_rgb, meant_size
from timm_dvt.loading import load_model, pick_device, weights_digest
from timm_dvt.options import add_options, build
from timm_dvt.weights.saving import save_plain
from training.common.command import add_model_arguments, command_parser
from training.common.models import make_for
from training.common.recipes import add_recipe
from training.loop.distributed import Processes, join_processes
from training.loop.entry import exit_code, only_run
from training.loop.settings import Pace, TrainingSettings
from training.stage3.train import STAGE3, Distillation, Stage3Settings


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser(argv).parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises what `exit_code` knows."""
    device = pick_device(args.device)
    sources = given_images(args.images, args.out)
    teacher = load_teacher(args.model, args.pretrained, args.seed)
    with join_processes(device) as processes:
        settings = make_settings(args, teacher, sources, processes)
        with only_run(args.out, processes, lambda: describe(args, teacher, sources, settings)) as folder:
            training = Distillation(teacher, sources, settings, device, processes)
            training.run(folder, build(Pace, args))
            if processes.first:
                save_plain(training.module.vit.cpu(), folder, teacher.backbone_name)
                print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")


def make_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The options of this command, with the defaults of the recipe that the command line names."""
    parser = command_parser("distill", __doc__)
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder, an image or a .txt list of paths")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    add_options(parser, Stage3Settings)
    group = parser.add_argument_group("training")
    add_options(group, TrainingSettings)
    add_options(group, Pace)
    add_recipe(parser, STAGE3, argv)
    return parser


def load_teacher(name: str, pretrained: bool, seed: int) -> Any:
    """A denoised model. Raises ValueError if there is none by that name, TypeError if it has no denoiser."""
    teacher: Any = load_model(name, pretrained=pretrained, seed=seed)
    check_rgb(teacher)
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


def make_settings(
    args: argparse.Namespace, teacher: Any, sources: list[Source], processes: Processes
) -> Stage3Settings:
    """The settings of a command line, for so many images and processes. Raises UserError for what cannot be."""
    size = args.input_size or meant_size(teacher)[0]
    patch = teacher.layout.img_size[0] // teacher.layout.grid[0]
    if size % patch:
        raise UserError(f"input_size must be a multiple of the patch size {patch}, got {size}")
    make_for(teacher, size)
    settings = replace(build(STAGE3[args.recipe], args), input_size=size)
    return settings.settled(
        len(sources), f"{args.images} holds {len(sources)} image{'s' * (len(sources) != 1)}", processes
    )


def describe(
    args: argparse.Namespace, teacher: nn.Module, sources: list[Source], settings: Stage3Settings
) -> dict[str, Any]:
    """What settings.json says: a run is only continued if all of it is the same."""
    images = {"count": len(sources), "digest": images_digest(sources)}
    weights = weights_digest(teacher)
    return {"task": "stage 3", "model": args.model, "weights": weights, "images": images, **asdict(settings)}


if __name__ == "__main__":
    sys.exit(main())
