"""What pretrains the embedded ViT: its encoder, a small decoder, and the losses on visible and hidden patches."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from training.stamp_sources import CLASSES
from training.stamps import SIZE

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH = 16
GRID = SIZE // PATCH
OBJECTIVES = ("pixels", "features", "classes")
WEIGHTS = {"pixels": 1.0, "features": 1.0, "classes": 0.3}


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
        self.encoder: Any = timm.create_model(ARCHITECTURE, img_size=SIZE, num_classes=0)
        encoder: Any = self.encoder
        # A masked autoencoder's position embedding begins as sines and cosines, as large as the patches' own tokens.
        encoder.pos_embed.data[:, 1:] = build_sincos2d_pos_embed([GRID, GRID], encoder.embed_dim)
        dim = encoder.embed_dim
        self.classes = nn.Linear(dim, len(CLASSES))
        self.narrow = nn.Linear(dim, width)
        self.hidden_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos = nn.Parameter(torch.randn(1, GRID * GRID, width) * 0.02)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder = nn.Sequential(
            *[Block(width, width // 32, qkv_bias=True, norm_layer=norm) for _ in range(settings.decoder_depth)],
            norm(width),
        )
        self.pixels = nn.Linear(width, 3 * PATCH * PATCH)
        self.features = nn.Linear(width, dim)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False) if "features" in settings.objectives else None

    def forward(self, images: Tensor, labels: Tensor, order: Tensor) -> dict[str, Tensor]:
        """The loss of each objective.

        Args:
            images: (B, 3, 192, 192), normalised.
            labels: (B, 144) class of each patch.
            order: (B, 144) a permutation of the patches; the first are visible.
        """
        settings = self.settings
        encoder: Any = self.encoder
        count = GRID * GRID - round(settings.hidden * GRID * GRID)
        seen, hidden = order[:, :count], order[:, count:]
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        tokens = take(tokens, seen)
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = encoder.norm(encoder.blocks(torch.cat([first, tokens], 1)))[:, 1:]
        losses = {}
        if "classes" in settings.objectives:
            scores = self.classes(tokens).flatten(0, 1).float()
            losses["classes"] = F.cross_entropy(scores, labels.gather(1, seen).flatten())
        if settings.objectives == ("classes",):
            return losses
        narrow = self.narrow(tokens)
        # Only the hidden patches are told their place here: that of the visible ones must come from their features.
        hole = self.hidden_token + take(self.decoder_pos.expand(len(images), -1, -1), hidden)
        decoded = self.decoder(torch.cat([narrow, hole.to(narrow.dtype)], 1))[:, count:]
        if "pixels" in settings.objectives:
            patches = F.unfold(images, PATCH, stride=PATCH).mT
            target = take(patches, hidden)
            target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
            losses["pixels"] = F.mse_loss(self.pixels(decoded).float(), target)
        if self.teacher is not None:
            teacher: Any = self.teacher
            with torch.no_grad():
                target = F.layer_norm(teacher.forward_features(images)[:, 1:].float(), (encoder.embed_dim,))
            losses["features"] = F.mse_loss(self.features(decoded).float(), take(target, hidden))
        return losses

    @torch.no_grad()
    def update_teacher(self, done: float) -> None:
        """Move the teacher towards the encoder, the slower the more of the run is done (0 to 1)."""
        if self.teacher is not None:
            share = 0.002 * (1 + math.cos(math.pi * done))
            for ours, its in zip(self.encoder.parameters(), self.teacher.parameters(), strict=True):
                its.lerp_(ours, share)


def take(tokens: Tensor, which: Tensor) -> Tensor:
    """Of (B, N, C) the tokens (B, M, C) that `which` (B, M) names."""
    return tokens.gather(1, which[..., None].expand(-1, -1, tokens.shape[-1]))
