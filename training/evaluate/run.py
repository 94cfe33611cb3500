"""What a task is told beside its data and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Run:
    """What a task is told beside its data and settings.

    Attributes:
        state: "raw", "denoised" or "artifacts"; of pairs one of `training.evaluate.features.pairs.STATES`.
        seed: of everything random in this run.
        device: where probes are trained.
        checkpoint: file for the state of a training that is under way; None to keep none.
    """

    state: str
    seed: int = 0
    device: torch.device = torch.device("cpu")
    checkpoint: Path | None = None
