"""A gate for trained denoisers, by which they know patches without content: `timm_dvt.calibration.blanks`.

Blank images among those that a block learns from would teach it the same, one forward pass each. Trials with a
DINOv2-S: after 300 steps with a quarter of blank images their tokens differ by their places 0.42 times as much as raw
ones do, where a gate leaves less than 0.01 times that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from timm_dvt.calibration.blanks import BETWEEN, BUSY, draw_plain, fit_gate
from timm_dvt.denoiser import Denoiser
from training.common.backbone import FeatureReader
from training.pairs.reader import PairReader, PairSet

PAIRS, BATCH = 32, 8


def add_gates(
    denoisers: Mapping[int, Denoiser],
    model: nn.Module,
    pairs: PairSet,
    make_reader: Callable[[PairSet, Sequence[str]], PairReader] = PairReader,
) -> None:
    """Let denoisers know patches without content; says of which layers nothing tells them from others.

    Args:
        denoisers: by layer of the pairs. model: the backbone that the pairs were made with, on its device.
        make_reader: of the pairs' maps.
    """
    how = {key: pairs.settings[key] for key in ("input_size", "stride", "dtype") if pairs.settings.get(key)}
    reader = FeatureReader(model, pairs.layers, **how)
    size = (reader.input_size, reader.input_size)
    pair_reader, places = make_reader(pairs, ("raw",)), range(min(PAIRS, len(pairs.files)))
    maps = pair_reader.read(places)[0]
    described = [pair_reader.busy(place) for place in places]
    images, kinds = draw_plain(3, size, (reader.grid, reader.grid))
    plain: dict[int, list[torch.Tensor]] = {layer: [] for layer in pairs.layers}
    for batch in images.split(BATCH):
        for layer, features in reader.patch_features(batch).items():
            plain[layer].append(features.flatten(1, 2).cpu())
    unknown = "1" * kinds.shape[1]  # of older pairs: nothing is plain for sure
    busy = torch.tensor([[digit == "1" for digit in digits or unknown] for digits in described])
    kinds = torch.cat([kinds, torch.where(busy, BUSY, BETWEEN)])
    for place, layer in enumerate(pairs.layers):
        gate = fit_gate(torch.cat([*plain[layer], maps[:, place].float()]), kinds)
        if gate is None:
            print(f"block {layer}: no linear map tells blank images from others; its denoiser has no gate for them")
        else:
            denoisers[layer].start_gating(*gate)
