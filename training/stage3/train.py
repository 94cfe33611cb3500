"""Stage 3, from a denoised model and images to a plain ViT: its settings and what a step of it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from timm_dvt.attach import remove_denoiser
from timm_dvt.image_files import Source
from timm_dvt.options import option
from training.common.command import Diverged
from training.figures.rows import draw_rows
from training.loop.distance import loss_limit
from training.loop.distributed import Processes
from training.loop.log import TrainingLog
from training.loop.order import positions, split_places
from training.loop.run import FolderTraining
from training.loop.settings import REPOSITORY, AtBatch256, Epochs, OverAll, TrainingSettings
from training.stage3.crops import AUGMENTS, CropReader
from training.stage3.student import MOST_VALIDATION, Student, Validation, as_tokens, freeze_unused


@dataclass(frozen=True, kw_only=True)
class Stage3Settings(TrainingSettings):
    """All that decides the weights a run ends with, beside the model and the images; recipes are in `STAGE3`.

    Attributes:
        input_size: side of the square inputs in pixels; 0 on a command line is the denoised model's own.
    """

    input_size: int = option(0, "(default: the denoised model's own)", least=1, metavar="PX")
    augment: str = option(
        "crop",
        "random crops and flips, or whole images with random flips alone (default: %(default)s)",
        choices=AUGMENTS,
    )
    tokens: str = option(
        "all",
        "learn prefix tokens too, so that a classifier goes on working, or patch tokens alone (%(default)s)",
        choices=("all", "patches"),
    )
    val_fraction: float = option(0.05, "of the images, held out for the validation loss (default: %(default)s)")


OURS = Stage3Settings(lr=AtBatch256(2e-4), warmup=0.15, weight_decay=1e-5)
STAGE3 = {
    "ours": OURS,
    "paper": OURS,
    "repository": replace(
        OURS, steps=Epochs(5), batch_size=OverAll(512), augment="flip", tokens="patches", **REPOSITORY
    ),
}


class Distillation(FolderTraining):
    """A student, whose module.vit is a plain ViT, learns the tokens that a denoised model has for random crops."""

    module: Student

    def __init__(
        self,
        teacher: Any,
        sources: Sequence[Source],
        settings: Stage3Settings,
        device: torch.device,
        processes: Processes,
    ) -> None:
        """
        Args:
            teacher: frozen; left as it is, but moved to the device.
            sources: training and validation images together.
        """
        training, validation = split_places(len(sources), settings.val_fraction, settings.seed)
        self.crops, shown = (
            CropReader([sources[i] for i in places], settings.input_size, settings.seed, settings.augment)
            for places in (training, (validation or training)[:MOST_VALIDATION])
        )
        self.teacher, self.seed = teacher.to(device).eval(), settings.seed
        # In eval mode: a pretrained ViT has no layer that training would change, and nothing random to be continued.
        learned_from = teacher.layout.prefix if settings.tokens == "patches" else 0
        vit = remove_denoiser(copy.deepcopy(teacher))
        student = Student(vit, teacher.norm_after_pool, settings.loss, learned_from).eval().requires_grad_(True)
        freeze_unused(student, torch.zeros(1, 3, settings.input_size, settings.input_size, device=device))
        super().__init__(student, settings, len(training), device, processes)
        config = resolve_model_data_config(teacher)
        self.mean, self.std = (torch.tensor(config[key], device=device).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.validation = Validation(teacher, shown, self.normalize, self.autocasting)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the teacher takes them, on its device."""
        return (images.to(self.device) - self.mean) / self.std

    def read(self, step: int) -> Tensor:
        part = self.processes.part(step, self.batch_size)
        return self.crops.random(positions(len(self.crops), part.start, part.stop, self.seed), part.start)

    def loss(self, step: int) -> Tensor:
        images = self.normalize(next(self.batches))
        with self.autocasting():
            with torch.no_grad():
                self.wanted = as_tokens(self.teacher.forward_features(images), self.teacher.layout)
            return self.model(images, self.wanted)

    def limit(self) -> float:
        return loss_limit(self.module.distance, self.wanted[:, self.module.first :])

    def diverged(self, loss: float, limit: float, steps: range) -> Exception:
        rate = self.schedule.rate(steps.stop - 1)
        return Diverged.beyond(loss, limit, steps.stop, rate, " (or the denoised model gives NaN)")

    def validate(self, step: int, log: TrainingLog) -> dict[str, float]:
        numbers, rows = self.validation(self.module)
        log.picture(step, draw_rows(rows))
        return numbers
