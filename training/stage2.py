"""The denoisers of stage 2 as they are trained: one for each layer, where they start from, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from timm_dvt.denoiser import Denoiser, LayerDenoisers
from timm_dvt.weights import denoiser_for, read_checkpoint
from training.optimisation import distance
from training.pair_loader import PairError, PairReader, PairSet
from training.training_log import TrainingLog

PICTURES = 4  # pairs in a picture
MOST_VALIDATION = 512  # pairs that a validation reads
START_PAIRS = 2000  # the mean of so many correction maps is known to 2% of their spread
CHUNK = 16  # pairs in memory at once while a mean is taken


def _rescaled(raw: Tensor, semantics: Tensor, artifacts: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(raw - artifacts, dim=-1, keepdim=True)
    return semantics * (length / torch.linalg.vector_norm(semantics, dim=-1, keepdim=True).clamp_min(1e-6))


# What stage 2 learns to predict, from a pair's raw = F + G + residual, each (..., C).
#
#     F         the paper's target (Eq. 11): what the views of an image agree on
#     rescaled  F |raw - G| / |F|: the direction that the views agree on, at the length that the whole image has
#     mean      (F + raw - G) / 2 = F + residual / 2
#     raw-G     F + residual: only what is tied to places is taken away
#
# F is an average over crops, and the average of vectors that disagree is shorter than they are: where crops see a thing
# differently, an object above all, F is short, and a token's length says no more what stands out in the image.
# `rescaled` gives the length back. The last two are mixtures: a regression learns the mean of its target given the raw
# map, and a block that knows F and G knows the residual, so trained on F + s * residual it comes to
# (1 - s) F + s (raw - G).
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F": lambda raw, semantics, artifacts: semantics,
    "rescaled": _rescaled,
    "mean": lambda raw, semantics, artifacts: torch.lerp(semantics, raw - artifacts, 0.5),
    "raw-G": lambda raw, semantics, artifacts: raw - artifacts,
}


class Stage2(nn.Module):
    """Denoisers side by side, and the loss that trains them (Eq. 11).

    Args:
        denoisers: by layer; the features of all have one grid.
        grid: its rows and columns.
    """

    def __init__(self, denoisers: dict[int, Denoiser], grid: tuple[int, int]) -> None:
        super().__init__()
        self.denoisers = LayerDenoisers(denoisers, max(denoisers))
        self.grid = grid

    def forward(self, raw: Tensor, clean: Tensor) -> Tensor:
        """Raw and clean features (B, layers, K*K, C) to the loss (layers,) of each: Eq. 11, mean over the tokens."""
        predicted = self._by_layer(raw)  # not stacked: copying them there and back took a tenth of a step
        return torch.stack([distance(*maps).mean() for maps in zip(predicted, clean.unbind(1), strict=True)])

    def predict(self, raw: Tensor) -> Tensor:
        """Raw to denoised features, both (B, layers, K*K, C)."""
        return torch.stack(self._by_layer(raw), 1)

    def _by_layer(self, raw: Tensor) -> list[Tensor]:
        denoisers = self.denoisers.layers.values()
        return [one(tokens, self.grid) for one, tokens in zip(denoisers, raw.unbind(1), strict=True)]


class Validation:
    """The loss on pairs that are not trained on, and a picture of some of them."""

    def __init__(
        self, reader: PairReader, target: str, device: torch.device, lower: Callable[[], AbstractContextManager]
    ) -> None:
        """
        Args:
            reader: of the maps of `parts_for(target)`. lower: autocast, or nothing.
        """
        self.reader, self.target, self.device, self.lower = reader, target, device, lower
        self.places = list(range(min(len(reader.pairs.files), MOST_VALIDATION)))

    @torch.no_grad()
    def __call__(self, module: Stage2, step: int, log: TrainingLog) -> dict[str, float]:
        """Draw the picture, and return Eq. 11 of the denoised features and of the raw ones, mean over all layers."""
        module.eval()
        losses: list[Tensor] = []
        for first in range(0, len(self.places), CHUNK):
            maps = self.reader.read(self.places[first : first + CHUNK]).to(self.device, torch.float32)
            raw, clean = raw_and_target(maps, self.target)
            with self.lower():
                predicted = module.predict(raw)
            losses.append(torch.stack([distance(x, clean).mean((1, 2)) for x in (predicted, raw)]))
            if first == 0 and raw.shape[-1] >= 3:
                shown = [x[:PICTURES, -1].float().unflatten(1, module.grid) for x in (raw, predicted, clean)]
                log.picture(step, list(zip(*(maps.cpu().numpy() for maps in shown))))
        module.train()
        denoised, untouched = torch.cat(losses, 1).mean(1).tolist()
        return {"val_loss": denoised, "val_loss_raw": untouched}


def make_denoisers(pairs: PairSet, arch: str, blocks: int, seed: int) -> dict[int, Denoiser]:
    """New denoisers for the layers of some pairs, each drawn from the seed: alone or beside others, it is the same."""
    denoisers = {}
    for layer in pairs.layers:
        torch.manual_seed(seed)
        denoisers[layer] = Denoiser(pairs.channels, pairs.grid, blocks, arch=arch)
    return denoisers


def parts_for(target: str) -> tuple[str, ...]:
    """The maps of a pair that a target of `TARGETS` is made of, the raw one first."""
    return ("raw", "clean") if target == "F" else ("raw", "clean", "artifacts")


def raw_and_target(maps: Tensor, target: str) -> tuple[Tensor, Tensor]:
    """Maps (parts, B, layers, K*K, C) of `parts_for(target)` to raw features and target, (B, layers, K*K, C) each."""
    raw, semantics = maps[0], maps[1]
    return raw, TARGETS[target](raw, semantics, maps[-1])


def start_as_static(denoisers: dict[int, Denoiser], reader: PairReader, target: str) -> None:
    """Let transformer blocks start as the best fixed map: PE = mean of target - raw, the blocks the identity.

    At a learning rate of 2e-4 no entry of the position embedding moves by more than 2e-4 a step, half that on the
    average of a cosine: a short run would be over before the artifacts, whose size is that of the features, are
    learned. From here on every step goes into what a fixed map cannot do. The paper does not say how it starts.
    """
    count = len(reader.pairs.files)
    places = list(range(0, count, -(-count // START_PAIRS)))

    def correction_of(*maps: Tensor) -> Tensor:
        raw, wanted = raw_and_target(torch.stack(maps), target)
        return wanted - raw

    corrections = _mean(reader, places, correction_of)
    denoiser: Any
    for denoiser, correction in zip(denoisers.values(), corrections, strict=True):
        with torch.no_grad():
            if denoiser.pos_embed is not None:
                denoiser.pos_embed.copy_(correction)
            for block in denoiser.blocks:
                for last in (block.attn.proj, block.mlp.fc2):  # what the two residual branches add
                    nn.init.zeros_(last.weight)


def subtract_mean_artifacts(denoisers: dict[int, Denoiser], reader: PairReader) -> None:
    """Make static denoisers: F = y - G, with the artifact field averaged over all pairs (`reader` reads artifacts)."""
    means = _mean(reader, range(len(reader.pairs.files)), lambda artifacts: artifacts)
    denoiser: Any
    for denoiser, artifacts in zip(denoisers.values(), means, strict=True):
        with torch.no_grad():
            denoiser.pos_embed.copy_(-artifacts)


def load_init(denoisers: dict[int, Denoiser], folder: str, pairs: PairSet, backbone: str) -> None:
    """Put the weights of a saved denoiser into new ones.

    Raises:
        CheckpointError: the folder holds none, or one for another backbone, width or grid.
        ValueError: it has other layers, another architecture or number of blocks.
    """
    found = denoiser_for(read_checkpoint(folder), pairs.channels, pairs.grid, backbone=backbone)
    if isinstance(found, LayerDenoisers):
        by_layer = {int(block): one for block, one in found.layers.items()}
    else:  # a folder of the last block alone does not number it
        by_layer = {pairs.layers[-1]: found}
    for layer, denoiser in denoisers.items():
        one: Any = by_layer.get(layer)
        if one is None:
            raise ValueError(f"--init {folder} holds denoisers for blocks {list(by_layer)}, none for {layer}")
        if (one.arch, len(one.blocks)) != (denoiser.arch, len(denoiser.blocks)):
            raise ValueError(
                f"--init {folder} holds {one.arch} of {len(one.blocks)} blocks, "
                f"but this run trains {denoiser.arch} of {len(denoiser.blocks)}; see --arch and --blocks"
            )
        denoiser.load_state_dict(one.state_dict())


def _mean(reader: PairReader, places: Sequence[int], of: Callable[..., Tensor]) -> Tensor:
    """The mean over pairs of a function of their maps: (layers, K*K, C) float32, added up in float64."""
    total: Tensor | float = 0.0
    for first in range(0, len(places), CHUNK):
        maps = reader.read(places[first : first + CHUNK]).double()
        total = total + of(*maps).sum(0)
    mean = torch.as_tensor(total) / len(places)
    if not bool(mean.isfinite().all()):
        raise PairError(f"NaN or infinite features in {', '.join(map(str, reader.not_finite(places)[:3]))}")
    return mean.float()
