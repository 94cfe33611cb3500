"""Correlation of features with position: Tab. 1, by the maximal information coefficient (Eqs. S1 and S2).

For each of 100 random images the largest MIC over the channels against x and against y, averaged over both and
over the images: of raw features, of denoised ones (in place of F) and of their difference (in place of G).
mic_shuffled is the same number with the patches of each map permuted at random: what chance gives on a map of
this size, to be read beside the others. How MIC is computed: training/evaluate/position/information.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from timm_dvt.bars import tqdm
from training.evaluate.features.cached import Features
from training.evaluate.position.information import position_mic
from training.evaluate.run import Run

KIND = "images"
STATES = ("raw", "denoised", "artifacts")
PAIRS = True
NUMBERS = {"mic": "MIC", "mic_shuffled": "MIC by chance"}
MEANING = "MIC: how well single channels tell the position of a patch, from 0 to 1; beside it what chance gives."


@dataclass(frozen=True)
class Settings:
    """Appendix A.4's.

    Attributes:
        images: drawn at random from the validation images; all of them if there are fewer.
        shuffled: of them, for so many chance is measured too; 0 for none.
    """

    images: int = 100
    shuffled: int = 5


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """mic and mic_shuffled, from 0 to 1."""
    features = data["val"]
    generator = torch.Generator().manual_seed(run.seed)
    chosen = torch.randperm(len(features), generator=generator)[: settings.images].tolist()
    scores: list[float] = []
    chance: list[float] = []
    for index in tqdm(chosen, desc=f"mic ({run.state})", unit="image", leave=False):
        maps = features.maps([index], run.state)[0].cpu()
        scores.append(position_mic(maps))
        if len(chance) < settings.shuffled:
            order = torch.randperm(maps.shape[0] * maps.shape[1], generator=generator)
            chance.append(position_mic(maps.flatten(0, 1)[order].unflatten(0, maps.shape[:2])))
    numbers = {"mic": sum(scores) / len(scores)}
    return {**numbers, "mic_shuffled": sum(chance) / len(chance)} if chance else numbers
