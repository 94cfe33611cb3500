"""What a training run tells: a progress bar, lines of JSON, pictures, and TensorBoard where it is installed."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from timm_dvt.colors import fit_projection
from training.shared_folder import read_lines, write_atomically

LOG = "log.jsonl"
CELL = 160  # pixels of one map in a picture


class TrainingLog:
    """The log of a run in its folder; with `speaks` False, as on all processes but the first, it does nothing.

    Lines that a killed run wrote after its last checkpoint are dropped on continuing: those steps come again.
    """

    def __init__(self, folder: Path, steps: int, step: int, images_per_step: int, speaks: bool = True) -> None:
        """
        Args:
            folder: gets log.jsonl, pictures and tensorboard.
            steps: of the whole run. step: how many are done.
            images_per_step: over all processes.
        """
        self.folder, self.speaks, self._per_step = folder, speaks, images_per_step
        self._seconds, self._started = 0.0, time.perf_counter()
        self._steps = 0
        total = steps * images_per_step
        self.bar = tqdm(total=total, initial=step * images_per_step, unit="images", disable=not speaks, mininterval=0.5)
        self._board: Any = None
        if speaks:
            kept = [record for record, _ in read_lines(folder / LOG) if record["step"] <= step]
            write_atomically(folder / LOG, "".join(json.dumps(record) + "\n" for record in kept).encode())
            self._board = _tensorboard(folder / "tensorboard", step)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self._board is not None:
            self._board.close()

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

    def write(self, step: int, **values: float) -> None:
        """One line of numbers after `step` steps; also on the bar and in TensorBoard."""
        if not self.speaks:
            return
        with open(self.folder / LOG, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = {name: value for name, value in values.items() if "loss" in name}
        if shown:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, rows: list[tuple[np.ndarray, ...]]) -> None:
        """Draw maps after `step` steps: each row's (K, K, C) maps side by side, coloured by the last one's components.

        So raw | predicted | target differ in colour where, and only where, they differ.
        """
        if not self.speaks:
            return
        drawn = []
        for maps in rows:
            if not all(np.isfinite(one).all() for one in maps):
                continue
            projection = fit_projection(maps[-1])
            cells = [(projection.colors(one) * 255).round().astype(np.uint8) for one in maps]
            drawn.append(np.concatenate([np.array(_enlarged(cell)) for cell in cells], axis=1))
        if not drawn:
            return
        image = np.concatenate(drawn, axis=0)
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        write_atomically(self.folder / "pictures" / f"step-{step:07d}.png", data.getvalue())
        if self._board is not None:
            self._board.add_image("raw | predicted | target", image, step, dataformats="HWC")


def _enlarged(cell: np.ndarray) -> Image.Image:
    return Image.fromarray(cell).resize((CELL, CELL), Image.Resampling.NEAREST)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step)
