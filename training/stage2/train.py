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
from training.common.models import make_for, weights_digest
from training.figures.rows import draw_rows
from training.loop.checkpoints import CHECKPOINT, Diverged
from training.loop.distance import loss_limit
from training.loop.distributed import ALONE, Processes
from training.loop.log import TrainingLog
from training.loop.optimization import autocast, make_adamw
from training.loop.order import positions, with_crops
from training.loop.reading_ahead import reading_threads
from training.loop.run import resume, run_steps
from training.loop.settings import USUAL_PACE, Pace, TrainingSettings
from training.pairs.reader import PairReader, PairSet, read_batches
from training.stage2.denoisers import Stage2, Validation, make_denoisers
from training.stage2.starts import load_init, start_as_static, subtract_mean_artifacts
from training.stage2.targets import parts_for, raw_and_target


@dataclass(frozen=True, kw_only=True)
class Stage2Settings(TrainingSettings):
    """All that decides the weights a run ends with, beside the pairs and the backbone.

    Attributes:
        arch: of `timm_dvt.architectures.ARCHITECTURES`.
        blocks: transformer blocks of a denoiser.
        target: of `training.stage2.targets.TARGETS`, what is predicted.
        whole: share of whole images among what is learned from; the rest are crops of them, where the pairs hold crops.
        keep_length: whether, once trained, the denoisers bring tokens to the length of the raw ones.
        blank_gate: whether, once trained, they know images without content, and level them: see
            training/stage2/gates.py.
        start: "static" (see `training.stage2.starts.start_as_static`) or "random".
        init: a folder to start from instead.
    """

    arch: str = "block"
    blocks: int = 1
    target: str = "F"
    whole: float = 0.25
    start: str = "static"
    keep_length: bool = False
    blank_gate: bool = True
    init: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.whole <= 1:
            raise UserError(f"whole must be from 0 to 1, a share, got {self.whole}")


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
    init = {"init_weights": _file_digest(settings.init)} if settings.init else {}
    return {
        "task": "stage 2",
        "model": name,
        "weights": weights_digest(model),
        "pairs": {"count": len(pairs.files), "digest": pairs.digest(), "layers": list(pairs.layers)},
        "made_with": pairs.settings,
        **asdict(settings),
        **init,
    }


def train(
    pairs: PairSet,
    settings: Stage2Settings,
    folder: Path,
    device: torch.device,
    processes: Processes = ALONE,
    pace: Pace = USUAL_PACE,
    backbone: str = "",
    make_reader: Callable[[PairSet, Sequence[str]], PairReader] = PairReader,
) -> dict[int, Denoiser]:
    """Train, or continue to train, denoisers for every layer of some pairs.

    Args:
        pairs: training and validation pairs together.
        settings: what to do.
        folder: gets log, pictures and checkpoint, and is continued from.
        device: where to compute.
        processes: this process and the others.
        pace: what decides nothing of the weights.
        backbone: by which `settings.init` is checked.
        make_reader: of some pairs' maps, from a folder or from elsewhere.

    Returns:
        Denoisers by layer, on the CPU.

    Raises:
        UserError: a pair is damaged or holds NaN; names the file.
        Diverged: loss or weights are beyond reason; the last checkpoint is left as it is.
        BadCheckpoint, OutputError: see training/loop/checkpoints.py.
    """
    training, validation = pairs.split(settings.val_fraction, settings.seed)
    reader = make_reader(training, parts_for(settings.target))
    denoisers = make_denoisers(pairs, settings.arch, settings.blocks, settings.seed)
    if not ARCHITECTURES[settings.arch].trains:
        subtract_mean_artifacts(denoisers, make_reader(training, ("artifacts",)))
        settings = replace(settings, steps=0, warmup=0)  # what follows only validates
    module = Stage2(denoisers, pairs.grid, settings.loss).to(device)
    optimizer = make_adamw(module, settings.lr, settings.weight_decay, settings.decay_all)
    first = resume(folder / CHECKPOINT, module, optimizer)
    if not first and settings.init:
        load_init(denoisers, settings.init, pairs, backbone)
    elif not first and settings.start == "static" and ARCHITECTURES[settings.arch].deep and processes.first:
        start_as_static(denoisers, reader, settings.target)
    model = processes.share(module)
    autocasting = autocast(device, settings.dtype)
    shown = validation if validation.files else training
    validation_loss = Validation(make_reader(shown, parts_for(settings.target)), settings.target, device, autocasting)

    # No map is flipped or cropped: artifacts are tied to places, so that a flipped raw map is one that the backbone
    # never gives, and the denoiser would learn the mean of the artifacts and of their mirror image. Crops are of the
    # image, each with the map that the backbone gives for it.
    def places(step: int) -> list[int]:
        part, count = processes.part(step, settings.batch_size), len(training.files)
        images = positions(count, part.start, part.stop, settings.seed)
        return with_crops(images, part.start, count, training.crops, settings.whole, settings.seed)

    # A GPU is sent what the files hold and makes float32 of it faster than a CPU does.
    precision = torch.float32 if device.type == "cpu" else reader.read(places(first)[:1]).dtype
    workers = reading_threads(device) if pace.workers is None else pace.workers
    batches = read_batches(reader, places, range(first, settings.steps), precision, workers)

    clean = torch.empty(0)  # the target of the last step

    def loss(step: int) -> Tensor:
        nonlocal clean
        raw, clean = raw_and_target(next(batches).to(device, torch.float32), settings.target)
        with autocasting():
            return model(raw, clean)  # of each layer; they share nothing, so each gradient is as if it were alone

    def not_sane(loss: float, limit: float, steps: range) -> Exception:
        broken = reader.not_finite([place for step in steps for place in places(step)])
        if not broken:
            return Diverged.beyond(loss, limit, steps.stop, settings.schedule.rate(steps.stop - 1))
        names = ", ".join(map(str, broken[:3]))
        return UserError(f"NaN or infinite features in {names}; delete the pair and run training.denoise_images again")

    def validate(step: int) -> dict[str, float]:
        numbers, rows = validation_loss(module)
        log.picture(step, "raw | predicted | target", draw_rows(rows))
        return numbers

    with TrainingLog(
        folder,
        settings.steps,
        first,
        batch_size=settings.batch_size,
        samples=len(training.files),
        speaks=processes.first,
    ) as log:
        run_steps(
            module,
            optimizer,
            settings.schedule,
            loss,
            log,
            first,
            checkpoint=folder / CHECKPOINT,
            pace=pace,
            limit=lambda: loss_limit(module.distance, clean),
            explain=not_sane,
            validate=validate,
            processes=processes,
        )
        if settings.steps == 0 and processes.first:
            log.write(0, **validate(0))
    if settings.keep_length:
        for denoiser in denoisers.values():
            denoiser.start_keeping_length()
    return {layer: denoiser.cpu() for layer, denoiser in denoisers.items()}


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
