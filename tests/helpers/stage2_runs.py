"""training.train_denoiser as tests of stage 2 call it: for `test_vit` with random weights, in batches of 4."""

from pathlib import Path

import torch

from tests.helpers.pair_folders import MODEL
from tests.helpers.processes import weights
from training import train_denoiser


def arguments(pairs: Path, out: Path, *options: str) -> list[str]:
    return [*MODEL, "--pairs", str(pairs), "--out", str(out), "--batch-size", "4", *options]


def run(pairs: Path, out: Path, *options: str) -> int:
    """The command in this process; returns its exit code."""
    return train_denoiser.main(arguments(pairs, out, *options))


def command(pairs: Path, out: Path, *options: str) -> list[str]:
    """What starts it in a process of its own."""
    return ["training.train_denoiser", *arguments(pairs, out, *options)]


def denoiser_weights(out: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights(out).items() if key.startswith("denoiser.")}
