"""What a training run tells: a progress bar, lines of JSON, and pictures."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from timm_dvt.bars import tqdm
from timm_dvt.image_files import PICTURES
from timm_dvt.shared_folder import read_lines, write_atomically

LOG = "log.jsonl"


class TrainingLog:
    """The log of a run in its folder; with `speaks` False, as on all processes but the first, it does nothing.

    Lines that a killed run wrote after its last checkpoint are dropped on continuing: those steps come again.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        step: int,
        *,
        batch_size: int,
        samples: int,
        speaks: bool = True,
        label: str | None = None,
    ) -> None:
        """
        Args:
            folder: gets log.jsonl and pictures; None leaves the bar alone, which then goes at the end.
            steps: of the whole run. step: how many are done.
            batch_size: images a step, over all processes. samples: images of an epoch.
            label: in front of the bar.
        """
        self.folder, self.speaks, self._per_step, self._samples = folder, speaks, batch_size, samples
        self._seconds, self._started = 0.0, time.perf_counter()
        self._steps = 0
        self.bar = tqdm(
            total=steps * batch_size,
            initial=step * batch_size,
            desc=label,
            unit="images",
            disable=not speaks,
            leave=folder is not None,
            mininterval=0.5,
        )
        if speaks and folder is not None:
            known = read_lines(folder / LOG) if steps else ()  # of no steps the one line is written again
            kept = [record for record, _ in known if record["step"] <= step]
            write_atomically(folder / LOG, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def steps_done(self, count: int = 1) -> None:
        """Count steps; their time is that since the last call, or since `resume`."""
        now = time.perf_counter()
        self._seconds, self._started, self._steps = self._seconds + now - self._started, now, self._steps + count
        self.bar.update(count * self._per_step)

    def resume(self) -> None:
        """Leave the time since the last step (a validation, say) out of the rate."""
        self._started = time.perf_counter()

    @property
    def images_per_second(self) -> float:
        """Over all processes, of the steps since the run was started here."""
        return self._steps * self._per_step / max(self._seconds, 1e-9)

    def training(self, step: int, loss: float, lr: float) -> None:
        """The line that every training writes after some steps."""
        epoch = step * self._per_step / self._samples
        self.write(step, loss=loss, lr=lr, epoch=epoch, images_per_second=self.images_per_second)

    def write(self, step: int, **values: float) -> None:
        """One line of numbers after `step` steps; losses also on the bar."""
        if not self.speaks:
            return
        shown = {name: value for name, value in values.items() if "loss" in name}
        if shown:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        if self.folder is not None:
            with open(self.folder / LOG, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def picture(self, step: int, image: np.ndarray | None) -> None:
        """Keep an image (H, W, 3) uint8 drawn after `step` steps; None is left out."""
        if not self.speaks or self.folder is None or image is None:
            return
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        write_atomically(self.folder / PICTURES / f"step-{step:07d}.png", data.getvalue())
