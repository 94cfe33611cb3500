"""Content that a target of stage 2 has lost, and how to put it back.

F is an average over crops. What an object is in its surroundings differs from crop to crop, so that F is smaller than
the raw features along directions that tell content apart: a linear map of the raw token itself, the same at every
place, explains most of what F - raw has beyond its mean at each place. That is not position, and a block that learns it
gives up what discovery lives on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-4  # of the mean variance of a channel
LEADING = 0.7  # of the variance of an image's patches: 4 directions of 384 in a DINOv2-S
DAMPED = 0.8  # what is left along them: nearest neighbors gain, and similarity keeps 0.92 to 0.96 of its contrast


@dataclass(frozen=True)
class Content:
    """What a linear map of raw tokens explains of target - raw beyond its mean at each place, by layer.

    Attributes:
        linear: (layers, C, C), from centered raw tokens to what a target has lost of them.
        expected: (layers, K*K, C), the mean at each place of raw tokens, less that of their image.
        leading: (layers, C, C), the projection onto the directions in which the patches of an image differ most.
    """

    linear: Tensor
    expected: Tensor
    leading: Tensor

    def put_back(self, raw: Tensor, target: Tensor) -> Tensor:
        """The target with its content back, but for a fifth along the leading directions; all (B, layers, K*K, C)."""
        here = self.to(raw)
        kept = target - (_centered(raw) - here.expected) @ here.linear
        return kept - (1 - DAMPED) * _centered(kept) @ here.leading

    def to(self, other: Tensor | torch.device) -> Content:
        """The same on another device, or of another tensor's device and type."""
        return Content(self.linear.to(other), self.expected.to(other), self.leading.to(other))


class ContentFit:
    """Finds the `Content` of pairs from sums over them, in float64."""

    def __init__(self) -> None:
        self.images = 0
        self.tokens: Tensor | float = 0.0  # the means at each place, times the images
        self.changes: Tensor | float = 0.0
        self.products: Tensor | float = 0.0  # of tokens with tokens, and with what becomes of them
        self.crossed: Tensor | float = 0.0

    def add(self, raw: Tensor, target: Tensor) -> None:
        """Raw maps and targets of some images, (B, layers, K*K, C) each."""
        x, change = _centered(raw.double()), (target - raw).double()
        self.images += len(x)
        self.tokens, self.changes = self.tokens + x.sum(0), self.changes + change.sum(0)
        self.products = self.products + torch.einsum("blnc,blnd->lcd", x, x)
        self.crossed = self.crossed + torch.einsum("blnc,blnd->lcd", x, change)

    def result(self) -> Content:
        """The least squares of all that was added."""
        tokens, changes, products, crossed = map(
            torch.as_tensor, (self.tokens, self.changes, self.products, self.crossed)
        )
        expected = tokens / self.images
        moments = products - tokens.mT @ expected
        # One image, or images that are all alike, say nothing: then the ridge is all there is, and the map is 0.
        variance, whole = (part.diagonal(dim1=1, dim2=2).mean(1) for part in (moments, products))
        ridge = RIDGE * variance.maximum(1e-6 * whole).clamp(min=1e-12)
        moments = moments + ridge[:, None, None] * torch.eye(moments.shape[-1])
        linear = torch.linalg.solve(moments, crossed - expected.mT @ changes)
        leading = torch.stack([_leading(layer) for layer in products])
        return Content(linear.float(), expected.float(), leading.float())


def _centered(tokens: Tensor) -> Tensor:
    return tokens - tokens.mean(-2, keepdim=True)


def _leading(products: Tensor) -> Tensor:
    """The projection (C, C) onto the fewest directions that hold `LEADING` of the variance."""
    variances, directions = torch.linalg.eigh(products)
    share = variances.flip(0).cumsum(0) / variances.sum()
    count = int((share < LEADING).sum()) + 1
    kept = directions[:, -count:]
    return kept @ kept.T
