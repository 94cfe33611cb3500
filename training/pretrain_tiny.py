"""Pretrain the small ViT that the package embeds, on stamps, on a CPU: python -m training.pretrain_tiny --out FOLDER

The encoder is timm's vit_tiny_patch16_224 at 192 px (12 x 12 patches, learned position embedding). Two objectives share
each step, on the patches that a random mask leaves visible: a masked autoencoder's (a small decoder predicts the pixels
of the hidden patches, normalised patch by patch: He et al., 2022), from which the features learn to carry position, and
the class of each visible patch, from which they learn semantics. FOLDER is what timm.create_model("local-dir:FOLDER",
pretrained=True) loads, a plain ViT. Kill it at any moment; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoints import CHECKPOINT, BadCheckpoint, Diverged, load_checkpoint, save_checkpoint
from training.pretrainer import GRID, OBJECTIVES, PATCH, WEIGHTS, Pretrainer, Settings
from training.shared_folder import OutputError
from training.stamp_sources import CLASSES, SHARE, SourcesMissing, load_sources
from training.stamps import SIZE, Composer


# ---- images


def compose(count: int, seed: int, share: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 192, 192) uint8 and the commonest class of each of their patches (N, 144) uint8."""
    chunk = 250
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.empty(count, GRID * GRID, dtype=torch.uint8)
    numbers = [range(at, min(at + chunk, count)) for at in range(0, count, chunk)]
    workers = ProcessPoolExecutor(initializer=_load_sources, initargs=(seed, share))
    with workers as pool, tqdm(total=count, desc="compose", unit=" images") as bar:
        parts = pool.map(_compose_part, numbers)
        for part, (some_images, some_labels) in enumerate(parts):
            at = slice(part * chunk, part * chunk + len(some_images))
            images[at], labels[at] = torch.from_numpy(some_images), torch.from_numpy(some_labels)
            bar.update(len(some_images))
    return images, labels


_composer: Composer | None = None  # of a worker process


def _load_sources(seed: int, share: str) -> None:
    global _composer
    _composer = Composer("train", seed, load_sources("train", share))


def _compose_part(numbers: range) -> tuple[np.ndarray, np.ndarray]:
    assert _composer is not None
    stamped = [_composer[number] for number in numbers]
    masks = np.stack([s.mask for s in stamped]).reshape(-1, GRID, PATCH, GRID, PATCH)
    counts = np.stack([(masks == label).sum((2, 4)) for label in range(len(CLASSES))])
    images = np.stack([s.image for s in stamped]).transpose(0, 3, 1, 2)
    return images, counts.argmax(0).reshape(len(stamped), -1).astype(np.uint8)


def batch(images: Tensor, labels: Tensor, step: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and patch order of a step: a function of seed and step alone, so that a run can be continued."""
    size = settings.batch_size
    per_epoch = len(images) // size
    epoch, at = divmod(step, per_epoch)
    shuffled = torch.randperm(len(images), generator=_generator(settings.seed, epoch, 1))
    which = shuffled[at * size:(at + 1) * size]
    draw = _generator(settings.seed, step, 2)
    pixels, some_labels = images[which].float().div_(255), labels[which].long().unflatten(1, (GRID, GRID))
    # Light and colour, image by image; and left-right flips, of images and labels alike.
    pixels.mul_(0.8 + 0.4 * torch.rand(size, 3, 1, 1, generator=draw)).clamp_(max=1)
    flip = torch.rand(size, generator=draw) < 0.5
    pixels[flip], some_labels[flip] = pixels[flip].flip(-1), some_labels[flip].flip(-1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixels.sub_(mean).div_(std)
    return pixels, some_labels.flatten(1), torch.rand(size, GRID * GRID, generator=draw).argsort(1)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# ---- the run


def pretrain(
    settings: Settings, out: Path, dtype: torch.dtype, share: str = SHARE, save_every: int = 200
) -> nn.Module:
    """Train, or go on where `out` was left; returns the encoder. Progress goes to `out`/log.jsonl as well.

    Raises:
        ValueError: `out` was begun with other settings.
        Diverged: the loss is not finite.
        SourcesMissing: the packages that images are composed of are not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = Pretrainer(settings).train()
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim not in (2, 4)]  # biases, norms, embeddings
    groups = [{"params": weights, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    facts = {"settings": json.loads(json.dumps(asdict(settings)))}
    found = load_checkpoint(out / CHECKPOINT, model, optimizer)
    if found is not None and found["settings"] != facts["settings"]:
        raise ValueError(f"{out} was begun with other settings, {found['settings']}; choose another --out or delete it")
    step = 0 if found is None else found["step"]
    if step == settings.steps:
        return model.encoder
    images, labels = compose(settings.images, settings.seed, share)

    size, seconds, recent = settings.batch_size, time.monotonic(), dict[str, float]()
    bar = tqdm(total=settings.steps * size, initial=step * size, unit=" images", unit_scale=True)
    with bar, open(out / "log.jsonl", "a") as log:
        while step < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            pixels, some_labels, order = batch(images, labels, step, settings)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses = model(pixels, some_labels, order)
            loss = torch.stack([value * WEIGHTS[name] for name, value in losses.items()]).sum()
            if not bool(loss.isfinite()):
                raise Diverged(f"the loss is {loss.item()} at step {step}; try a smaller --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*weights, *others], 3.0)
            optimizer.step()
            step += 1
            model.update_teacher(step / settings.steps)
            for name, value in losses.items():
                recent[name] = recent.get(name, value.item()) * 0.98 + value.item() * 0.02
            bar.set_postfix({name: f"{value:.3f}" for name, value in recent.items()}, refresh=False)
            bar.update(size)
            if step % save_every == 0 or step == settings.steps:
                rate = size * save_every / (time.monotonic() - seconds)
                seconds = time.monotonic()
                log.write(json.dumps({"step": step, **recent, "images/s": rate}) + "\n")
                log.flush()
                save_checkpoint(out / CHECKPOINT, model, optimizer, step, facts)
    return model.encoder


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a half cosine down to a hundredth."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def main(argv: list[str] | None = None) -> int:
    """Pretrain and save; returns 0, or 2 with a line that says what to do, or 130 when stopped."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain_tiny",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(defaults.objectives),
                        help="what to train on, summed (default: %(default)s)")
    for field in fields(Settings):
        if field.name != "objectives":
            kind = type(field.default)
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=kind, default=field.default, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of the matrix products (default: %(default)s)")
    parser.add_argument("--share", default=SHARE, metavar="DIR", help="where the packages are installed (%(default)s)")
    args = parser.parse_args(argv)
    chosen: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(Settings)}
    try:
        settings = Settings(**chosen | {"objectives": tuple(name for name in OBJECTIVES if name in args.objectives)})
        encoder = pretrain(settings, args.out, getattr(torch, args.dtype), args.share)
    except (SourcesMissing, OutputError, BadCheckpoint, Diverged, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    save_backbone(encoder, args.out)
    return 0


def save_backbone(encoder: nn.Module, folder: Path) -> None:
    """The folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads."""
    config: Any = encoder
    config.pretrained_cfg = {
        **config.pretrained_cfg,
        "tag": "stamps",
        "input_size": (3, SIZE, SIZE),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 0,
        "crop_pct": 1.0,
    }
    arguments = {"img_size": SIZE, "dynamic_img_size": True, "num_classes": 0}
    timm.models.save_for_hf(encoder, str(folder), model_args=arguments, safe_serialization=True)


if __name__ == "__main__":
    sys.exit(main())
