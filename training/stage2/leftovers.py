"""What the predictions of trained denoisers still have in common at a place, and taking it off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.pairs.reader import PairReader
from training.stage2.denoisers import CHUNK, Stage2


@torch.no_grad()
def take_off_leftovers(module: Stage2, reader: PairReader) -> None:
    """Give each denoiser the output embedding PE_out that takes off what its predictions share at each place.

    Over pairs whose images have no more in common than chance puts there, the mean prediction p of a place differs from
    that of all places by what is tied to the place. A regression leaves such a rest, because F has one. With
    d_n = p_n - mean over places of p_n, for the pairs n = 1 .. N, each (K*K, C):

        m = mean_n d_n,  e = sum_n |d_n - m|^2 / (N (N - 1)),  PE_out = -m max(0, 1 - e / |m|^2)

    e is the squared error of m by the content of so few images, and the factor the best one under it (Stein's): of two
    images next to nothing is taken off. What images do share at a place, as sky above and road below, goes too.

    Args:
        module: trained. reader: of the pairs' raw features, its first part.
    """
    device = next(module.parameters()).device
    count = len(reader.pairs.files)
    sums: Any = 0.0
    squares: Any = 0.0
    for first in range(0, count, CHUNK):
        raw = reader.read(list(range(first, min(first + CHUNK, count))))[0].to(device, torch.float32)
        predicted = module.predict(raw)  # (B, layers, K*K, C)
        apart = predicted - predicted.mean(2, keepdim=True)
        sums = sums + apart.sum(0, dtype=torch.float64)
        squares = squares + apart.square().sum((0, 2, 3), dtype=torch.float64)
    for denoiser, total, square in zip(module.denoisers.layers.values(), sums, squares, strict=True):
        denoiser.start_adding(shrunk_mean(total, square, count).neg())  # type: ignore[operator]


def shrunk_mean(total: Tensor, square: Tensor, count: int) -> Tensor:
    """The mean of `count` maps, scaled by Stein's factor: `total` is their sum, `square` the sum of all their squares.

    Zeros for a single map, whose mean says nothing.
    """
    mean = total / count
    size = mean.square().sum()
    error = (square - count * size) / (count * max(count - 1, 1))
    return mean * (1 - error / size.clamp_min(1e-12)).clamp(0, 1) * (count > 1)
