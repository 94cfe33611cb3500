"""Object discovery: Tab. 4, by LOST with the feature norm as indicator (training/evaluate/lost.py).

CorLoc: the share of images, in percent, whose one box has an IoU above 0.5 with a labelled object; images without
a labelled object do not count. On VOC for trainval of each year there is, on COCO for the 20k list of LOST.
Nothing is random: all seeds give the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from timm_dvt.errors import UserError
from training.evaluate.features import Features
from training.evaluate.lost import is_correct, lost
from training.evaluate.runner import Run

KIND = "discovery"
STATES = ("raw", "denoised")
NUMBERS = {"CorLoc/": "CorLoc"}
MEANING = "CorLoc: images of which one object is found without any training, in percent; more is better."


@dataclass(frozen=True)
class Settings:
    """LOST's k of 100 (for maps of about a thousand patches), DVT's indicator; `centre` is explained at `lost`."""

    expansion: int = 100
    indicator: str = "norm"
    centre: bool = True


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """CorLoc/PART in percent, for each set of images."""
    numbers = {}
    for part, features in data.items():
        features.extract()
        right = counted = 0
        for indices, maps in features.batches(run.state, f"LOST on {part} ({run.state})"):
            for index, image in zip(indices, maps.cpu()):
                boxes = features.split.annotation(index).boxes
                if len(boxes):
                    counted += 1
                    box = lost(image, settings.expansion, settings.indicator, settings.centre)
                    right += is_correct(box, boxes)
        if not counted:
            raise UserError(f"no image of {features.split.name} has a labelled object")
        numbers[f"CorLoc/{part}"] = 100 * right / counted
    return numbers
