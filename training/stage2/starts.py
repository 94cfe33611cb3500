"""Where denoisers start from: a fixed map, the best there is, or weights trained before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.denoiser import Denoiser, LayerDenoisers
from timm_dvt.errors import UserError
from timm_dvt.weights.checkpoints import read_checkpoint
from timm_dvt.weights.denoisers import EXTRAS, denoiser_for
from training.pairs.reader import PairReader, PairSet
from training.stage2.content import Content, ContentFit
from training.stage2.targets import Target

START_PAIRS = 2000  # what is to be known of all pairs is found in so many: a mean to 2% of the spread
CHUNK = 16  # pairs in memory at once while a mean is taken


def start_as_static(denoisers: dict[int, Denoiser], reader: PairReader, target: Target) -> None:
    """Let blocks that can be the identity start as the best fixed map: PE = mean of target - raw.

    At a learning rate of 2e-4 no entry of the position embedding moves by more than 2e-4 a step, half that on the
    average of a cosine: a short run would be over before the artifacts, whose size is that of the features, are
    learned. From here on every step goes into what a fixed map cannot do. The paper does not say how it starts.
    """

    def correction_of(*maps: Tensor) -> Tensor:
        raw, wanted = target(torch.stack(maps))
        return wanted - raw

    corrections = _mean(reader, _some(reader), correction_of)
    denoiser: Any
    for denoiser, correction in zip(denoisers.values(), corrections, strict=True):
        with torch.no_grad():
            if denoiser.pos_embed is not None:
                denoiser.pos_embed.copy_(correction)
            for block in denoiser.blocks:
                for branch in ARCHITECTURES[denoiser.arch].branches:
                    nn.init.zeros_(block.get_submodule(branch).weight)


def find_content(reader: PairReader, target: Target) -> Content:
    """What to put back into a target, from whole images, evenly spread over all pairs."""
    fit = ContentFit()
    places = _some(reader)
    for first in range(0, len(places), CHUNK):
        fit.add(*target(reader.read(places[first : first + CHUNK]).float()))
    _check_finite(reader, places, fit.crossed)
    return fit.result()


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
        CheckpointError: the folder holds none, or one for another backbone or width.
        ValueError: it has other layers, another architecture or number of blocks.
    """
    saved = denoiser_for(read_checkpoint(folder), pairs.channels, pairs.grid, backbone=backbone)
    if isinstance(saved, LayerDenoisers):
        by_layer = {int(block): init for block, init in saved.layers.items()}
    else:  # a folder of the last block alone does not number it: the last of the pairs', whether trained now or not
        by_layer = {max(pairs.settings.get("layers") or pairs.layers): saved}
    for layer, denoiser in denoisers.items():
        init: Any = by_layer.get(layer)
        if init is None:
            raise UserError(f"--init {folder} holds denoisers for blocks {list(by_layer)}, none for {layer}")
        if _described(init) != _described(denoiser):
            raise UserError(
                f"--init {folder} holds {_described(init)}, but this run trains {_described(denoiser)}; "
                "see --arch and --blocks"
            )
        init.fix_grid(denoiser.grid_size)
        state = init.state_dict()
        for after_training in EXTRAS:  # what this run is asked for decides them
            state.pop(after_training, None)
        denoiser.load_state_dict(state)


def _described(denoiser: Denoiser) -> str:
    count = len(denoiser.blocks)
    if not ARCHITECTURES[denoiser.arch].deep:
        return denoiser.arch
    heads = f"{denoiser.num_heads} head{'s' * (denoiser.num_heads > 1)}"
    return f"{denoiser.arch} of {count} block{'s' * (count > 1)} and {heads}"


def _some(reader: PairReader) -> list[int]:
    """Places of at most `START_PAIRS` pairs, evenly spread."""
    count = len(reader.pairs.files)
    return list(range(0, count, -(-count // START_PAIRS)))


def _mean(reader: PairReader, places: Sequence[int], of: Callable[..., Tensor]) -> Tensor:
    """The mean over pairs of a function of their maps: (layers, K*K, C) float32, added up in float64."""
    total: Tensor | float = 0.0
    for first in range(0, len(places), CHUNK):
        maps = reader.read(places[first : first + CHUNK]).double()
        total = total + of(*maps).sum(0)
    _check_finite(reader, places, total)
    return (torch.as_tensor(total) / len(places)).float()


def _check_finite(reader: PairReader, places: Sequence[int], total: Tensor | float) -> None:
    if not bool(torch.as_tensor(total).isfinite().all()):
        raise UserError(f"NaN or infinite features in {', '.join(map(str, reader.not_finite(places)[:3]))}")
