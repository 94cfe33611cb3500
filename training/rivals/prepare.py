"""A row's model: learned once, kept as a folder, and loaded from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from timm_dvt.calibration.samples import sources
from timm_dvt.denoised import Denoised
from timm_dvt.errors import UserError
from timm_dvt.layouts import meant_size
from timm_dvt.version import __version__
from timm_dvt.weights.saving import save_pretrained
from training.common.models import DENOISER as DENOISER_WEIGHTS
from training.common.models import load_backbone, load_model, make_for, weights_digest
from training.evaluate.tables import write_json
from training.rivals import registers
from training.rivals.registry import DENOISER, FITS, RAW, REGISTERS
from training.rivals.sample import Sample

FACTS = "rival.json"


class LeftOut(UserError):
    """The row is none for this model; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A row's model.

    Attributes:
        name: for results; where it begins with local-dir:, timm.create_model loads it.
        learned: in words; "" of what was given.
    """

    model: Any
    name: str
    learned: str = ""


class Preparer:
    """Makes the models of all rows from one backbone and one set of photographs.

    Attributes:
        size: side of the inputs, in pixels.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool,
        seed: int,
        images: list[str],
        views: int,
        out: Path,
        device: torch.device,
        size: int | None = None,
        keep_length: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.name, self.pretrained, self.seed, self.device, self.out = name, pretrained, seed, device, out
        self.keep_length = keep_length
        self.given = load_model(name, pretrained=pretrained, seed=seed)
        self.size = size or meant_size(self.given)[0]
        self._images = sources(images, views)
        files = [Path(str(image)) for image in self._images]
        self._facts: dict[str, Any] = {
            "model": name,
            "weights": weights_digest(self.given, without=DENOISER_WEIGHTS),
            "images": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
            "views": views,
            "input_size": self.size,
            "keep_length": keep_length,
            "dtype": dtype,
            "version": __version__,
        }

    @cached_property
    def sample(self) -> Sample:
        """What rows learn from, read when one does."""
        views, dtype = self._facts["views"], self._facts["dtype"]
        return Sample(self._backbone(), self._images, self.size, views, dtype=dtype)

    def __call__(self, row: str) -> Prepared:
        """The model of a row of `training.rivals.registry.ROWS`, on its device.

        Raises:
            LeftOut: it is none for this model.
        """
        if row == RAW:
            return Prepared(self._backbone(), self.name)
        if row == DENOISER:
            if not isinstance(self.given, Denoised):
                raise LeftOut("the model has no denoiser")
            return Prepared(self.given.to(self.device), self.name)
        folder = self.out / "models" / row
        facts = {"rival": row, **self._facts}
        known = _read(folder / FACTS)
        if known.get("facts") != facts:
            known = {"facts": facts, **(self._find_registers() if row == REGISTERS else self._fit(row, folder))}
            write_json(folder / FACTS, known)  # last: by it the folder is known as whole
        if "left_out" in known:
            raise LeftOut(known["left_out"])
        if row == REGISTERS:
            model = self._backbone()
            registers.add_register(model, [(block, neuron) for block, neuron in known["neurons"]])
            return Prepared(model, f"{self.name}+{row}", known["learned"])
        name = f"local-dir:{folder}"
        return Prepared(load_model(name).to(self.device), name, known["learned"])

    def _backbone(self) -> Any:
        model = load_backbone(self.name, self.pretrained, self.seed)
        make_for(model, self.size)
        return model.to(self.device)

    def _fit(self, row: str, folder: Path) -> dict[str, Any]:
        model = self._backbone()
        learned = FITS[row](model, self.sample)
        for denoiser in model.denoisers().values() if self.keep_length else ():
            denoiser.start_keeping_length()
        (folder / FACTS).unlink(missing_ok=True)
        save_pretrained(model, folder, model_args=model.recorded_arguments)
        return {"learned": learned}

    def _find_registers(self) -> dict[str, Any]:
        model = self._backbone()
        try:
            neurons = registers.find(model, self.sample)
        except registers.NotForThisModel as error:
            return {"left_out": str(error)}
        blocks = sorted({block for block, _ in neurons})
        return {"neurons": neurons, "learned": f"{len(neurons)} neurons of blocks {', '.join(map(str, blocks))}"}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
