"""The denoisers of stage 2 as they are trained: one for each layer, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn

from timm_dvt.denoiser import Denoiser, LayerDenoisers
from training.loop.distance import DISTANCES
from training.pairs.reader import PairReader, PairSet
from training.stage2.targets import Target

PICTURES = 4  # pairs in a picture
MOST_VALIDATION = 512  # pairs that a validation reads
CHUNK = 16  # pairs of one forward pass of a validation


class Stage2(nn.Module):
    """Denoisers side by side, and the distance that trains them (Eq. 11).

    Args:
        denoisers: by layer; the features of all have one grid.
        grid: its rows and columns.
        loss: of `DISTANCES`.
    """

    def __init__(self, denoisers: dict[int, Denoiser], grid: tuple[int, int], loss: str = "norm") -> None:
        super().__init__()
        self.distance = DISTANCES[loss]
        self.denoisers = LayerDenoisers(denoisers, max(denoisers))
        self.grid = grid

    def forward(self, raw: Tensor, clean: Tensor) -> Tensor:
        """Raw and clean features (B, layers, K*K, C) to the loss (layers,) of each, mean over the tokens."""
        predicted = self._by_layer(raw)  # not stacked: copying them there and back took a tenth of a step
        return torch.stack([self.distance(*maps).mean() for maps in zip(predicted, clean.unbind(1), strict=True)])

    def predict(self, raw: Tensor) -> Tensor:
        """Raw to denoised features, both (B, layers, K*K, C)."""
        return torch.stack(self._by_layer(raw), 1)

    def _by_layer(self, raw: Tensor) -> list[Tensor]:
        denoisers = self.denoisers.layers.values()
        return [denoiser(tokens, self.grid) for denoiser, tokens in zip(denoisers, raw.unbind(1), strict=True)]


class Validation:
    """The loss on pairs that are not trained on, and a picture of some of them."""

    def __init__(
        self,
        reader: PairReader,
        target: Target,
        device: torch.device,
        autocasting: Callable[[], AbstractContextManager],
    ) -> None:
        """
        Args:
            reader: of the target's parts. autocasting: makes contexts for forward passes.
        """
        self.reader, self.target, self.device, self.autocasting = reader, target, device, autocasting
        self.places = list(range(min(len(reader.pairs.files), MOST_VALIDATION)))

    @torch.no_grad()
    def __call__(self, module: Stage2) -> tuple[dict[str, float], list[tuple[np.ndarray, ...]]]:
        """The distance of the denoised features and of the raw ones, mean over all layers; and maps to be looked at.

        Returns:
            The numbers, and for each of some pairs the last layer's (K, K, C) maps: raw, predicted, target.
        """
        module.eval()
        losses: list[Tensor] = []
        rows: list[tuple[np.ndarray, ...]] = []
        for first in range(0, len(self.places), CHUNK):
            maps = self.reader.read(self.places[first : first + CHUNK]).to(self.device, torch.float32)
            raw, clean = self.target(maps)
            with self.autocasting():
                predicted = module.predict(raw)
            losses.append(torch.stack([module.distance(x, clean).mean((1, 2)) for x in (predicted, raw)]))
            if first == 0:
                shown = [x[:PICTURES, -1].float().unflatten(1, module.grid) for x in (raw, predicted, clean)]
                rows = list(zip(*(maps.cpu().numpy() for maps in shown)))
        module.train()
        denoised, untouched = torch.cat(losses, 1).mean(1).tolist()
        return {"val_loss": denoised, "val_loss_raw": untouched}, rows


def make_denoisers(pairs: PairSet, arch: str, blocks: int, seed: int) -> dict[int, Denoiser]:
    """New denoisers for the layers of some pairs, each drawn from the seed: alone or beside others, it is the same."""
    denoisers = {}
    for layer in pairs.layers:
        torch.manual_seed(seed)
        denoisers[layer] = Denoiser(pairs.channels, pairs.grid, blocks, arch=arch)
    return denoisers
