"""Stage 3: fine-tune a whole ViT towards backbone and denoiser, on images alone.

    python -m training.distill --model vit_base_patch14_dinov2.lvd142m_dvt --images photos --out distilled
    python -m training.distill --model local-dir:denoiser --images photos --out distilled
    torchrun --nproc-per-node 8 -m training.distill --batch-size 8 ... (the same)

The teacher is the denoised model, frozen; the student starts as its backbone, and learns the teacher's tokens: the
denoised patch tokens, and the prefix tokens as the backbone has them, so that a classifier goes on working. The
loss is Eq. 11 of each token. The paper leaves this stage to its repository; length and batch are those of stage 2,
the learning rate is lower because all weights are pretrained.

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
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_dvt.model import remove_denoiser
from timm_dvt.saving import save_plain
from training.backbone import DTYPES
from training.checkpoints import CHECKPOINT, Diverged, load_checkpoint, save_checkpoint
from training.distributed import ALONE, Processes, claim, processes
from training.image_crops import CropReader
from training.images import Source, list_images
from training.models import load_model, pick_device, weights_digest
from training.optimisation import distance, learning_rate, make_adamw
from training.options import add_model_arguments, add_training_arguments
from training.pair_loader import positions, read_ahead, split_places
from training.shared_folder import OutputError, SharedFolder
from training.training_log import TrainingLog

PICTURES = 4  # images in a picture
MOST_VALIDATION = 256  # images
CHUNK = 8  # images of one forward pass of a validation


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
    lr: float = 5e-5
    warmup: int = 0
    weight_decay: float = 0.01
    dtype: str = "float32"
    val_fraction: float = 0.05
    seed: int = 0


class Student(nn.Module):
    """A plain ViT and its loss: Eq. 11 between its tokens and the teacher's."""

    def __init__(self, vit: Any, norm_after_pool: bool) -> None:
        super().__init__()
        self.vit, self.norm_after_pool = vit, norm_after_pool

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Images (B, 3, h, w) and the teacher's tokens (B, prefix + N, C) to the mean loss of a token."""
        return distance(self.tokens(images), wanted).mean()

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens (B, prefix + N, C) that stand beside the teacher's: patch tokens normed, as timm norms or pools."""
        tokens = self.vit.forward_features(images)
        if not self.norm_after_pool:
            return tokens
        prefix = self.vit.num_prefix_tokens
        return torch.cat([tokens[:, :prefix], self.vit.fc_norm(tokens[:, prefix:])], dim=1)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    try:
        device = pick_device(args.device)
        sources = list_images(args.images)
        teacher = load_teacher(args.model, args.pretrained, args.seed)
        with processes(device) as ranks:
            settings = make_settings(args, teacher, sources, ranks)
            with SharedFolder(args.out) as folder, claim(folder, ranks) as mine:
                if not mine:
                    raise ValueError(f"another process is training into {args.out}")
                if ranks.first:
                    folder.settle(describe(args, teacher, sources, settings))
                ranks.wait()
                student = train(
                    teacher, sources, settings, folder.path, device, ranks,
                    args.workers, args.checkpoint_every, args.val_every,
                )  # fmt: skip
                if ranks.first:
                    save_plain(student.cpu(), folder.path, teacher.backbone_name)
                    print(f"{args.out}: load it with timm.create_model('local-dir:{args.out}', pretrained=True)")
                ranks.wait()
    except OutputError as error:
        return _complain(3, f"{error}\nOnce that is settled, run the same command again to continue.")
    except Diverged as error:
        return _complain(1, error)
    except (ValueError, TypeError) as error:
        return _complain(2, error)
    except KeyboardInterrupt:
        return _complain(130, "stopped; run the same command again to continue from the last checkpoint.")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    head, rest = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m training.distill",
        description=head,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="a folder, an image or a .txt list of paths")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="made, or continued if it exists")
    add_model_arguments(parser)
    parser.add_argument("--input-size", type=int, metavar="PX", help="(default: the denoised model's own)")
    add_training_arguments(parser, lr=Settings.lr, weight_decay=Settings.weight_decay)
    parser.add_argument("--val-fraction", type=float, default=Settings.val_fraction,
                        help="of the images, held out for the validation loss (default: %(default)s)")
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
    if not 0 <= args.val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {args.val_fraction}")
    training, _ = split_places(len(sources), args.val_fraction, args.seed)
    if not training:
        raise ValueError(f"{args.images} holds {len(sources)} image: too few for --val-fraction {args.val_fraction}")
    batch_size = args.batch_size * ranks.count
    steps = args.steps or -(-args.epochs * len(training) // batch_size)
    if not 0 <= args.warmup < steps:
        raise ValueError(f"warmup must be from 0 to below the {steps} steps of the run, got {args.warmup}")
    return Settings(
        size, steps, batch_size, args.lr, args.warmup, args.weight_decay, args.dtype, args.val_fraction, args.seed
    )


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
    workers: int = 2,
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
        workers: threads that read images ahead.
        checkpoint_every, val_every: in steps; None is ten times a run.

    Returns:
        The student: a plain timm model.

    Raises:
        ValueError: no image can be read.
        Diverged: loss or weights are beyond reason; the last checkpoint is left as it is.
        BadCheckpoint, OutputError: see training/checkpoints.py.
    """
    training, validation = split_places(len(sources), settings.val_fraction, settings.seed)
    crops = CropReader([sources[i] for i in training], settings.input_size, settings.seed)
    held_out = (validation or training)[:MOST_VALIDATION]
    shown = CropReader([sources[i] for i in held_out], settings.input_size, settings.seed)
    teacher = teacher.to(device).eval()
    config = resolve_model_data_config(teacher)
    mean, std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
    amp = partial(torch.autocast, device.type, DTYPES[settings.dtype])
    lower = amp if settings.dtype != "float32" else nullcontext

    # In eval mode: a pretrained ViT has no layer that training would change, and nothing random to be continued.
    student = Student(remove_denoiser(copy.deepcopy(teacher)), teacher.norm_after_pool).eval().requires_grad_(True)
    freeze_unused(student, torch.zeros(1, 3, settings.input_size, settings.input_size, device=device))
    optimizer = make_adamw(student, settings.lr, settings.weight_decay)
    facts = load_checkpoint(folder / CHECKPOINT, student, optimizer)
    first = 0 if facts is None else facts["step"]
    model = ranks.share(student)

    def validate(step: int) -> dict[str, float]:
        losses: list[Tensor] = []
        for start in range(0, len(shown), CHUNK):
            images = (shown.whole(range(start, min(start + CHUNK, len(shown)))).to(device) - mean) / std
            with torch.no_grad(), lower():
                wanted, got = teacher.forward_features(images), student.tokens(images)
                with teacher.denoising(False):
                    raw = teacher.forward_features(images)
                raw = teacher.fc_norm(raw) if teacher.norm_after_pool else raw
            losses.append(torch.stack([distance(x, wanted).mean(1) for x in (got, raw)]))
            if start == 0:
                grid = teacher.patch_embed.dynamic_feat_size((settings.input_size, settings.input_size))
                maps = [x[:PICTURES, teacher.num_prefix_tokens :].float().unflatten(1, grid).cpu().numpy()
                        for x in (raw, got, wanted)]  # fmt: skip
                log.picture(step, list(zip(*maps)))
        mine, backbone = torch.cat(losses, 1).mean(1).tolist()
        return {"val_loss": mine, "val_loss_backbone": backbone}

    # Of each step's batch this process takes its share; images and crops depend on seed and step alone.
    share = settings.batch_size // ranks.count

    def read(step: int) -> Tensor:
        start = step * settings.batch_size + ranks.rank * share
        return crops.random(positions(len(crops), start, start + share, settings.seed), start)

    batches = read_ahead((partial(read, step) for step in range(first, settings.steps)), workers)
    val_every = val_every or max(1, settings.steps // 10)
    with TrainingLog(folder, settings.steps, first, settings.batch_size, ranks.first) as log:
        for step in range(first, settings.steps):
            lr = learning_rate(step, settings.steps, settings.lr, settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = (next(batches).to(device) - mean) / std
            with lower():
                with torch.no_grad():
                    wanted = teacher.forward_features(images)
                loss = model(images, wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            done, value = step + 1, loss.item()
            last = done == settings.steps
            limit = 10 * (1 + torch.linalg.vector_norm(wanted.float(), dim=-1).mean().item())
            if not value < limit:
                raise Diverged(
                    f"the loss diverged: {value:.4g} at step {done}, ten times what predicting nothing would give "
                    f"({limit / 10:.4g}), at a learning rate of {lr:.3g}; use a smaller --lr or a longer --warmup, "
                    "and another --out (or the denoised model gives NaN)"
                )
            log.steps_done()
            if done % 10 == 0 or last:
                epoch = done * settings.batch_size / len(crops)
                log.write(done, loss=value, lr=lr, epoch=epoch, images_per_second=log.images_per_second)
            if (done % val_every == 0 or last) and ranks.first:
                log.write(done, **validate(done))
                log.resume()
            if (done % checkpoint_every == 0 or last) and ranks.first:
                save_checkpoint(folder / CHECKPOINT, student, optimizer, done, {})
                log.resume()
    return student.vit


def freeze_unused(student: Student, images: Tensor) -> None:
    """Freeze what no token depends on (the classifier): DDP waits for gradients, and nothing should be decayed."""
    student.tokens(images).float().square().mean().backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _complain(code: int, error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
