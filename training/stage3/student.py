"""The student of stage 3 as it is trained: its tokens, its loss, and how near it is to the teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_dvt.layouts import Layout, layout_of
from training.loop.distance import DISTANCES
from training.stage3.crops import CropReader

PICTURES = 4  # images in a picture
MOST_VALIDATION = 256  # images that a validation reads
CHUNK = 8  # images of one forward pass of a validation


class Student(nn.Module):
    """A plain ViT and its loss: the distance (Eq. 11) between its tokens and the teacher's.

    Args:
        vit: a plain timm model.
        norm_after_pool: whether it norms its tokens behind the pool.
        loss: of `DISTANCES`.
        first: the first token that counts: 0, or the number of prefix tokens to learn patch tokens alone.
    """

    def __init__(self, vit: Any, norm_after_pool: bool, loss: str = "norm", first: int = 0) -> None:
        super().__init__()
        self.vit, self.norm_after_pool, self.distance, self.first = vit, norm_after_pool, DISTANCES[loss], first
        self.layout = layout_of(vit)

    def forward(self, images: Tensor, wanted: Tensor) -> Tensor:
        """Images (B, 3, h, w) and the teacher's tokens (B, prefix + N, C) to the mean loss of a token."""
        return self.apart(self.tokens(images), wanted).mean()

    def apart(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """The distance of tokens (B, prefix + N, C) from others: (B, tokens that count)."""
        return self.distance(tokens[:, self.first :], wanted[:, self.first :])

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens (B, prefix + N, C) that stand beside the teacher's: patch tokens normed, as timm norms or pools."""
        tokens = as_tokens(self.vit.forward_features(images), self.layout)
        if not self.norm_after_pool:
            return tokens
        prefix = self.layout.prefix
        return torch.cat([tokens[:, :prefix], self.vit.fc_norm(tokens[:, prefix:])], dim=1)


def as_tokens(features: Tensor, layout: Layout) -> Tensor:
    """Final features as tokens (B, prefix + N, C), also where they are a map."""
    return features if layout.form == "tokens" else layout.patches(features, 0)


def freeze_unused(student: Student, images: Tensor) -> None:
    """Freeze what no token depends on (the classifier): DDP waits for gradients, and nothing should be decayed."""
    student.tokens(images)[:, student.first :].float().square().mean().backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


class Validation:
    """The loss on images that are not trained on, and a picture of some of them."""

    def __init__(
        self,
        teacher: Any,
        reader: CropReader,
        normalize: Callable[[Tensor], Tensor],
        autocasting: Callable[[], AbstractContextManager],
    ) -> None:
        """
        Args:
            teacher: the denoised model. reader: of the images.
            normalize: images in [0, 1] to what the teacher takes, on its device.
            autocasting: makes contexts for forward passes.
        """
        self.teacher, self.reader, self.normalize, self.autocasting = teacher, reader, normalize, autocasting

    @torch.no_grad()
    def __call__(self, student: Student) -> tuple[dict[str, float], list[tuple[np.ndarray, ...]]]:
        """The distance between the teacher's tokens and the student's, and the backbone's; and maps to be looked at.

        Returns:
            The numbers, and for each of some images the (K, K, C) maps of backbone, student and teacher.
        """
        teacher, count, side = self.teacher, len(self.reader), self.reader.size
        grid, prefix = teacher.layout.grid_at(side, side), teacher.layout.prefix
        losses: list[Tensor] = []
        rows: list[tuple[np.ndarray, ...]] = []
        for first in range(0, count, CHUNK):
            images = self.normalize(self.reader.whole(range(first, min(first + CHUNK, count))))
            with self.autocasting():
                wanted, got = as_tokens(teacher.forward_features(images), teacher.layout), student.tokens(images)
                with teacher.denoising(False):
                    raw = as_tokens(teacher.forward_features(images), teacher.layout)
                raw = teacher.fc_norm(raw) if teacher.norm_after_pool else raw
            losses.append(torch.stack([student.apart(x, wanted).mean(1) for x in (got, raw)]))
            if first == 0:
                shown = [x[:PICTURES, prefix:].float().unflatten(1, grid) for x in (raw, got, wanted)]
                rows = list(zip(*(maps.cpu().numpy() for maps in shown)))
        distilled, backbone = torch.cat(losses, 1).mean(1).tolist()
        return {"val_loss": distilled, "val_loss_backbone": backbone}, rows
