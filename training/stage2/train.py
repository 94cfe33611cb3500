"""Stage 2, from pairs to a folder that timm loads: its settings, its checks, and what a step of it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_dvt import save_pretrained
from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.attach import attach_denoiser
from timm_dvt.denoiser import Denoiser, combine
from timm_dvt.errors import UserError
from timm_dvt.layouts import layout_of
from timm_dvt.loading import weights_digest
from timm_dvt.options import option
from training.common.command import Diverged
from training.common.models import make_for
from training.figures.rows import draw_rows
from training.loop.distance import loss_limit
from training.loop.distributed import ALONE, Processes
from training.loop.log import TrainingLog
from training.loop.order import positions, with_crops
from training.loop.run import FolderTraining
from training.loop.settings import REPOSITORY, USUAL_PACE, OverAll, Pace, TrainingSettings
from training.pairs.reader import PairReader, PairSet
from training.stage2.denoisers import Stage2, Validation, make_denoisers
from training.stage2.starts import find_content, load_init, start_as_static, subtract_mean_artifacts
from training.stage2.targets import TARGETS, Target


@dataclass(frozen=True, kw_only=True)
class Stage2Settings(TrainingSettings):
    """All that decides the weights a run ends with, beside the pairs and the backbone; recipes are in `STAGE2`."""

    arch: str = option(
        "block",
        "the denoiser to train: "
        + "; ".join(f"{name}, {row.kind.format(s='')}" for name, row in ARCHITECTURES.items())
        + " (default: the paper's %(default)s)",
        choices=list(ARCHITECTURES),
    )
    blocks: int = option(
        1, "how many, where the architecture can have several (default: the paper's %(default)s)", least=1
    )
    target: str = option(
        "F",
        "what to predict: the paper's F, F at the length of raw - G, raw - G, or the mean of the first and the last "
        "(default: %(default)s); see training/pairs/mixtures.py",
        choices=TARGETS,
    )
    keep_content: bool = option(
        False,
        "put back into the target what a linear map of raw tokens explains of its change: a regression shrinks it, and "
        "it is not position (default: no, as in the paper); see training/stage2/content.py",
    )
    whole: float = option(
        0.25,
        "of whole images among what is learned from, where the pairs hold crops too; 1 leaves crops out, as the paper "
        "does (default: %(default)s)",
        metavar="SHARE",
    )
    start: str = option(
        "static",
        "of a block: from the mean correction, the block an identity (default), or from random weights alone; the "
        "paper does not say",
        choices=("static", "random"),
    )
    keep_length: bool = option(
        False,
        "once trained, bring tokens to the length of the raw ones: for what lives on lengths, as object discovery does "
        "(default: no, as in the paper)",
    )
    blank_gate: bool = option(
        True,
        "once trained, know images without content (plain colors, noise) and patches without texture (walls, skies), "
        "and level them (default: yes)",
    )
    init: str | None = option(None, "start from a trained denoiser instead", metavar="FOLDER")
    val_fraction: float = option(0.05, "of the pairs, held out for the validation loss (default: %(default)s)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.whole <= 1:
            raise UserError(f"whole must be from 0 to 1, a share, got {self.whole}")
        if self.blocks > 1 and not ARCHITECTURES[self.arch].deep:
            raise UserError(f"--blocks must be 1 with --arch {self.arch}, got {self.blocks}")
        if self.init is not None and not ARCHITECTURES[self.arch].trains:
            raise UserError("--init starts a training, and --arch static needs none; leave out one of the two")


PAPER = Stage2Settings(batch_size=OverAll(64), start="random", whole=1.0, blank_gate=False)
STAGE2 = {
    "ours": Stage2Settings(),
    "paper": PAPER,
    "repository": replace(PAPER, steps=50_000, batch_size=OverAll(128), **REPOSITORY),
}


def check_fit(model: nn.Module, pairs: PairSet, name: str) -> None:
    """Raise UserError unless the pairs can be of this model, by its width and number of blocks."""
    layout = layout_of(model)
    if layout.channels != pairs.channels:
        raise UserError(
            f"{pairs.folder} holds features of {pairs.channels} channels, but --model {name} has {layout.channels}: "
            f"they are of another model ({pairs.settings.get('model', 'unnamed')})"
        )
    if max(pairs.layers) >= layout.maps:
        raise UserError(
            f"{pairs.folder} holds features of block {max(pairs.layers)}, but the last of --model {name} is "
            f"{layout.maps - 1}: they are of another model ({pairs.settings.get('model', 'unnamed')})"
        )


def describe_training(name: str, model: nn.Module, pairs: PairSet, settings: Stage2Settings) -> dict[str, Any]:
    """What settings.json says: a run is only continued if all of it is the same."""
    init = {"init_weights": _file_digest(settings.init)} if settings.init is not None else {}
    return {
        "task": "stage 2",
        "model": name,
        "weights": weights_digest(model),
        "pairs": {"count": len(pairs.files), "digest": pairs.digest(), "layers": list(pairs.layers)},
        "made_with": pairs.settings,
        **asdict(settings),
        **init,
    }


class Stage2Training(FolderTraining):
    """Denoisers for every layer of some pairs.

    Attributes:
        denoisers: by layer.
    """

    module: Stage2

    def __init__(
        self,
        pairs: PairSet,
        settings: Stage2Settings,
        device: torch.device,
        processes: Processes = ALONE,
        backbone: str = "",
        make_reader: Callable[[PairSet, Sequence[str]], PairReader] = PairReader,
    ) -> None:
        """
        Args:
            pairs: training and validation pairs together.
            backbone: by which `settings.init` is checked.
            make_reader: of some pairs' maps, from a folder or from elsewhere.
        """
        training, validation = pairs.split(settings.val_fraction, settings.seed)
        self.denoisers = make_denoisers(pairs, settings.arch, settings.blocks, settings.seed)
        self.settings, self.backbone = settings, backbone
        module = Stage2(self.denoisers, pairs.grid, settings.loss).to(device)
        super().__init__(module, settings, len(training.files), device, processes)
        if not ARCHITECTURES[settings.arch].trains:
            subtract_mean_artifacts(self.denoisers, make_reader(training, ("artifacts",)))
            self.steps, self.schedule = 0, replace(self.schedule, steps=0, warmup=0)  # what follows only validates
        self.target = Target(settings.target)
        self.reader = make_reader(training, self.target.parts)
        if settings.keep_content:
            self.target.content = find_content(self.reader, self.target).to(device)
        shown = make_reader(validation if validation.files else training, self.target.parts)
        self.validation = Validation(shown, self.target, device, self.autocasting)

    def run(self, folder: Path, pace: Pace = USUAL_PACE) -> None:
        super().run(folder, pace)
        for denoiser in self.denoisers.values():
            denoiser.cpu()
            if self.settings.keep_length:
                denoiser.start_keeping_length()

    def start(self, first: int) -> None:
        settings = self.settings
        if not first and settings.init is not None:
            load_init(self.denoisers, settings.init, self.reader.pairs, self.backbone)
        elif (
            not first and settings.start == "static" and ARCHITECTURES[settings.arch].branches and self.processes.first
        ):
            start_as_static(self.denoisers, self.reader, self.target)
        # A GPU is sent what the files hold and makes float32 of it faster than a CPU does.
        on_cpu = self.device.type == "cpu"
        self.precision = torch.float32 if on_cpu else self.reader.read(self.places(first)[:1]).dtype

    # No map is flipped or cropped: artifacts are tied to places, so that a flipped raw map is one that the backbone
    # never gives, and the denoiser would learn the mean of the artifacts and of their mirror image. Crops are of the
    # image, each with the map that the backbone gives for it.
    def places(self, step: int) -> list[int]:
        """What this process reads for a step: see `PairReader.read`."""
        settings, pairs = self.settings, self.reader.pairs
        part, count = self.processes.part(step, settings.batch_size), len(pairs.files)
        images = positions(count, part.start, part.stop, settings.seed)
        return with_crops(images, part.start, count, pairs.crops, settings.whole, settings.seed)

    def read(self, step: int) -> Tensor:
        return self.reader.read(self.places(step), self.precision)

    def loss(self, step: int) -> Tensor:
        """Of each layer; they share nothing, so each gradient is as if it were alone."""
        raw, self.clean = self.target(next(self.batches).to(self.device, torch.float32))
        with self.autocasting():
            return self.model(raw, self.clean)

    def limit(self) -> float:
        return loss_limit(self.module.distance, self.clean)

    def diverged(self, loss: float, limit: float, steps: range) -> Exception:
        broken = self.reader.not_finite([place for step in steps for place in self.places(step)])
        if not broken:
            return Diverged.beyond(loss, limit, steps.stop, self.schedule.rate(steps.stop - 1))
        names = ", ".join(map(str, broken[:3]))
        return UserError(f"NaN or infinite features in {names}; delete the pair and run training.denoise_images again")

    def validate(self, step: int, log: TrainingLog) -> dict[str, float]:
        numbers, rows = self.validation(self.module)
        log.picture(step, draw_rows(rows))
        return numbers


def save(model: Any, denoisers: dict[int, Denoiser], folder: Path, pairs: PairSet) -> None:
    """Write the backbone with its denoisers, for images as the pairs were made of, as a folder that timm loads."""
    make_for(model, pairs.settings.get("input_size"))
    attach_denoiser(model, combine(denoisers, layout_of(model).maps - 1))
    save_pretrained(model, folder, model_args=model.recorded_arguments)


def _file_digest(folder: str) -> str:
    path = Path(folder) / "model.safetensors"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--init {folder}: {path} cannot be read ({error.strerror or error})") from error
