"""The rows of the table: the model without and with its denoiser, rivals, and ours without training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm_dvt.calibration.calibrate import calibrate
from training.rivals import insid3, mean_map, rasa
from training.rivals.sample import Sample


def _calibrate(model: Any, sample: Sample, method: str) -> str:
    calibrate(model, sample.images, method=method, views=sample.views, batch_size=sample.batch_size, progress=True)
    denoisers = model.denoisers()
    facts = denoisers[max(denoisers)].calibration
    directions = f"{facts.components} directions, " if facts.components else ""
    return f"{directions}{facts.views} views of {facts.images} images"


RAW, DENOISER, REGISTERS = "raw", "denoiser", "registers"
# Each gives a backbone a denoiser, in place, and says in words what it learned.
FITS: dict[str, Callable[[Any, Sample], str]] = {
    "mean-map": mean_map.fit,
    "insid3": insid3.fit,
    "insid3-matching": partial(insid3.fit, channels=insid3.MATCHING),
    "insid3-energy": partial(insid3.fit, energy=insid3.ENERGY),
    "rasa": rasa.fit,
    "static": partial(_calibrate, method="static"),
    "project": partial(_calibrate, method="project"),
}
ROWS = (RAW, "mean-map", "insid3", "insid3-matching", "insid3-energy", "rasa", REGISTERS, "static", "project", DENOISER)
