"""Gates for trained denoisers, by which they know images without content, and patches without texture in others.

The one looks at tokens (`timm_dvt.calibration.blanks`), the other, which is the same for all, at pixels
(`timm_dvt.flat`).

Blank images among those that a block learns from would teach it the same, one forward pass each. Trials with a
DINOv2-S: after 300 steps with a quarter of blank images their tokens differ by their places 0.42 times as much as raw
ones do, where a gate leaves less than 0.01 times that and hardly a photograph changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from timm_dvt.calibration.blanks import draw_blank, fit_gate
from timm_dvt.denoiser import Denoiser
from timm_dvt.flat import flat_below
from training.common.backbone import FeatureReader
from training.pairs.reader import PairReader, PairSet

BLANKS, PAIRS, BATCH = 24, 32, 8


def add_gates(
    denoisers: Mapping[int, Denoiser],
    model: nn.Module,
    pairs: PairSet,
    make_reader: Callable[[PairSet, Sequence[str]], PairReader] = PairReader,
) -> None:
    """Let denoisers know blank images from those of their pairs, and flat patches from others.

    Says of which layers nothing tells blank images apart.

    Args:
        denoisers: by layer of the pairs. model: the backbone that the pairs were made with, on its device.
        make_reader: of the pairs' maps.
    """
    how = {key: pairs.settings[key] for key in ("input_size", "stride", "dtype") if pairs.settings.get(key)}
    reader = FeatureReader(model, pairs.layers, **how)
    size = (reader.input_size, reader.input_size)
    count = len(pairs.files)
    whole = range(min(PAIRS, count))
    places = [place + count * (place % 2 if pairs.crops else 0) for place in whole]  # by turns, whole and a crop
    maps = make_reader(pairs, ("raw",)).read(places)[0]
    blanks: dict[int, list[torch.Tensor]] = {layer: [] for layer in pairs.layers}
    for first in range(0, BLANKS, BATCH):
        images = torch.stack([draw_blank(3, size, seed) for seed in range(first, first + BATCH)])
        for layer, features in reader.patch_features(images).items():
            blanks[layer].append(features.flatten(1, 2).cpu())
    for place, layer in enumerate(pairs.layers):
        denoisers[layer].start_leveling(flat_below(model))
        gate = fit_gate(torch.cat(blanks[layer]), maps[:, place])
        if gate is None:
            print(
                f"block {layer}: no linear map tells blank images from photographs; its denoiser has no gate for them"
            )
        else:
            denoisers[layer].start_gating(*gate)
