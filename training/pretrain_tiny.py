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
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from training.shared_folder import OutputError, write_atomically
from training.stamp_sources import CLASSES, SourcesMissing
from training.stamps import SIZE, Composer

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 16
GRID = SIZE // PATCH
CHECKPOINT = "checkpoint.safetensors"
OBJECTIVES = ("pixels", "features", "classes")
WEIGHTS = {"pixels": 1.0, "features": 1.0, "classes": 0.3}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """What a run depends on.

    Attributes:
        objectives: of "pixels" (masked autoencoder), "features" (self-distillation: the hidden patches' tokens of a
            slowly moving average of the encoder) and "classes" (of the visible patches), summed.
        images: composed once, then seen again and again under new masks and flips.
        hidden: share of patches hidden from the encoder.
    """

    objectives: tuple[str, ...] = ("pixels", "classes")
    images: int = 20_000
    steps: int = 3_200
    batch_size: int = 96
    lr: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    hidden: float = 0.75
    decoder_width: int = 96
    decoder_depth: int = 2
    seed: int = 0


class Pretrainer(nn.Module):
    """The encoder with what pretraining needs around it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.decoder_width
        # On CPUs PyTorch's fused attention has a backward pass that takes as long as all the rest of the step.
        set_fused_attn(False)
        self.encoder = timm.create_model(ARCHITECTURE, img_size=SIZE, num_classes=0)
        assert isinstance(self.encoder, VisionTransformer)
        # A masked autoencoder's position embedding begins as sines and cosines, as large as the patches' own tokens.
        waves = build_sincos2d_pos_embed([GRID, GRID], self.encoder.embed_dim)
        self.encoder.pos_embed.data[:, 1:] = waves
        dim = self.encoder.embed_dim
        self.classes = nn.Linear(dim, len(CLASSES))
        self.narrow = nn.Linear(dim, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos = nn.Parameter(torch.randn(1, GRID * GRID, width) * 0.02)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder = nn.Sequential(
            *[Block(width, width // 32, qkv_bias=True, norm_layer=norm) for _ in range(settings.decoder_depth)], norm(width)
        )
        self.pixels = nn.Linear(width, 3 * PATCH * PATCH)
        self.features = nn.Linear(width, dim)

    def forward(self, images: Tensor, labels: Tensor, order: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        """The loss of each objective.

        Args:
            images: (B, 3, 192, 192), normalised.
            labels: (B, 144) class of each patch.
            order: (B, 144) a permutation of the patches; the first are visible.
            teacher: (B, 144, C) target tokens of "features".
        """
        settings, encoder = self.settings, self.encoder
        count = GRID * GRID - round(settings.hidden * GRID * GRID)
        seen, hidden = order[:, :count], order[:, count:]
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        tokens = take(tokens, seen)
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = encoder.norm(encoder.blocks(torch.cat([first, tokens], 1)))[:, 1:]
        losses = {}
        if "classes" in settings.objectives:
            losses["classes"] = F.cross_entropy(self.classes(tokens).flatten(0, 1).float(), labels.gather(1, seen).flatten())
        if settings.objectives == ("classes",):
            return losses
        narrow = self.narrow(tokens)
        # Only the hidden patches are told their place here: that of the visible ones must come from their features.
        hole = self.hidden_token + take(self.decoder_pos.expand(len(images), -1, -1), hidden)
        decoded = torch.cat([narrow, hole.to(narrow.dtype)], 1)
        decoded = self.decoder(decoded)[:, count:]
        if "pixels" in settings.objectives:
            patches = F.unfold(images, PATCH, stride=PATCH).mT
            target = take(patches, hidden)
            target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
            losses["pixels"] = F.mse_loss(self.pixels(decoded).float(), target)
        if teacher is not None:
            losses["features"] = F.mse_loss(self.features(decoded).float(), take(teacher, hidden).float())
        return losses


def take(tokens: Tensor, which: Tensor) -> Tensor:
    """Of (B, N, C) the tokens (B, M, C) that `which` (B, M) names."""
    return tokens.gather(1, which[..., None].expand(-1, -1, tokens.shape[-1]))


# ---- images


def compose(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 192, 192) uint8 and the commonest class of each of their patches (N, 144) uint8."""
    chunk = 250
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.empty(count, GRID * GRID, dtype=torch.uint8)
    with ProcessPoolExecutor(initializer=_load_sources, initargs=(seed,)) as pool, tqdm(total=count, desc="compose") as bar:
        parts = pool.map(_compose_part, [range(at, min(at + chunk, count)) for at in range(0, count, chunk)])
        for part, (some_images, some_labels) in enumerate(parts):
            at = slice(part * chunk, part * chunk + len(some_images))
            images[at], labels[at] = torch.from_numpy(some_images), torch.from_numpy(some_labels)
            bar.update(len(some_images))
    return images, labels


def _load_sources(seed: int) -> None:
    global _composer
    _composer = Composer("train", seed)


def _compose_part(numbers: range) -> tuple[np.ndarray, np.ndarray]:
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
    pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
    return pixels, some_labels.flatten(1), torch.rand(size, GRID * GRID, generator=draw).argsort(1)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


# ---- the run


def pretrain(settings: Settings, out: Path, dtype: torch.dtype, save_every: int = 200) -> nn.Module:
    """Train, or go on where `out` was left; returns the encoder. Progress goes to `out`/log.jsonl as well."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = Pretrainer(settings).train()
    decayed = [p for p in model.parameters() if p.ndim == 2 or p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 2 and p.ndim != 4]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    teacher = Pretrainer(settings).encoder.requires_grad_(False) if "features" in settings.objectives else None
    if teacher is not None:
        teacher.load_state_dict(model.encoder.state_dict())
    step = load_checkpoint(out, settings, model, optimizer, teacher)
    images, labels = compose(settings.images, settings.seed)

    bar = tqdm(total=settings.steps * settings.batch_size, initial=step * settings.batch_size, unit=" images", unit_scale=True)
    seconds, recent = time.monotonic(), {}
    with open(out / "log.jsonl", "a") as log:
        while step < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            pixels, some_labels, order = batch(images, labels, step, settings)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                targets = None
                if teacher is not None:
                    with torch.no_grad():
                        targets = F.layer_norm(teacher.forward_features(pixels)[:, 1:], (teacher.embed_dim,))
                losses = model(pixels, some_labels, order, targets)
            loss = torch.stack([value * WEIGHTS[name] for name, value in losses.items()]).sum()
            if not bool(loss.isfinite()):
                raise FloatingPointError(f"the loss is {float(loss)} at step {step}; try a smaller --lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            optimizer.step()
            if teacher is not None:
                momentum = 1 - 0.004 * (1 + math.cos(math.pi * step / settings.steps)) / 2
                for ours, its in zip(model.encoder.parameters(), teacher.parameters(), strict=True):
                    its.lerp_(ours.detach(), 1 - momentum)
            step += 1
            for name, value in losses.items():
                recent[name] = recent.get(name, float(value)) * 0.98 + float(value) * 0.02
            bar.set_postfix({name: f"{value:.3f}" for name, value in recent.items()}, refresh=False)
            bar.update(settings.batch_size)
            if step % save_every == 0 or step == settings.steps:
                rate = settings.batch_size * save_every / (time.monotonic() - seconds)
                seconds = time.monotonic()
                log.write(json.dumps({"step": step, **recent, "lr": learning_rate(step, settings), "images/s": rate}) + "\n")
                log.flush()
                save_checkpoint(out, settings, step, model, optimizer, teacher)
    bar.close()
    return model.encoder


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a half cosine down to a hundredth."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def save_checkpoint(
    out: Path, settings: Settings, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module | None
) -> None:
    """Everything a later run needs to go on, in one file that appears whole or not at all."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    if teacher is not None:
        tensors |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    facts = {"step": str(step), "settings": json.dumps(asdict(settings))}
    write_atomically(out / CHECKPOINT, save({name: value.contiguous() for name, value in tensors.items()}, facts))


def load_checkpoint(
    out: Path, settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module | None
) -> int:
    """Take up what a run with the same settings left in `out`; returns the steps done, 0 where there is nothing.

    Raises:
        ValueError: it was made with other settings.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if json.loads(facts["settings"]) != json.loads(json.dumps(asdict(settings))):
        raise ValueError(f"{path} was made with other settings, {facts['settings']}; choose another --out or delete it")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model."))
    if teacher is not None:
        teacher.load_state_dict(part("teacher."))
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer.").items():
        number, entry = name.split(".", 1)
        states.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return int(facts["step"])


def main(argv: list[str] | None = None) -> int:
    """Pretrain and save; returns 0, or 2 with a line that says what to do, or 130 when stopped."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain_tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(defaults.objectives),
                        help="what to train on, summed (default: %(default)s)")
    for field in fields(Settings):
        if field.name != "objectives":
            kind = type(field.default)
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of the matrix products (%(default)s)")
    args = parser.parse_args(argv)
    chosen: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(Settings)}
    try:
        settings = Settings(**chosen | {"objectives": tuple(name for name in OBJECTIVES if name in args.objectives)})
        encoder = pretrain(settings, args.out, getattr(torch, args.dtype))
    except (SourcesMissing, OutputError, ValueError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    save_backbone(encoder, args.out)
    return 0


def save_backbone(encoder: nn.Module, folder: Path) -> None:
    """The folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads."""
    encoder.pretrained_cfg = {  # type: ignore[assignment]
        **encoder.pretrained_cfg, "tag": "stamps", "input_size": (3, SIZE, SIZE), "mean": MEAN, "std": STD,  # type: ignore
        "num_classes": 0, "crop_pct": 1.0, "classifier": None,
    }
    timm.models.save_for_hf(
        encoder, folder, model_args={"img_size": SIZE, "dynamic_img_size": True, "num_classes": 0}, safe_serialization=True
    )


if __name__ == "__main__":
    sys.exit(main())
