"""A first look: a model's features with the denoiser off and on, timed and drawn side by side."""

import copy
import io
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import resolve_model_data_config
from torch import nn

from timm_dvt.attach import Denoised
from timm_dvt.bars import tqdm
from timm_dvt.errors import UserError, WeightsNotFoundError
from timm_dvt.images import PHOTOGRAPHS, read_image
from timm_dvt.layouts import input_size
from timm_dvt.loading import SCHEMES, load_any_size, pick_device
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import DEFAULT_MODEL
from timm_dvt.viewer.panel import Shown, draw
from timm_dvt.weights.files import write_whole

MAX_ASPECT = 3.0  # longer images are cropped around their middle
ROUNDS, STEADY = 5, 0.25  # timed forwards without which no time is claimed; of their median, how far apart they may be
EXPLANATION = (
    "Each square is one patch of the image. A Vision Transformer mixes the position of a patch into its features;",
    "the denoiser takes that pattern out again and leaves what the image shows.",
)
NOT_ASKED = "random weights, as asked for: no learned denoiser; the picture shows the mechanics only"


@dataclass(frozen=True)
class Measured:
    """Patch tokens (H, W, C), float32 on the CPU, and the seconds that each timed forward took."""

    features: torch.Tensor
    seconds: Sequence[float]

    @property
    def time(self) -> str:
        """The median, or no claim: of few rounds, or where they differ as they do on a busy machine."""
        if len(self.seconds) < ROUNDS:
            return ""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        middle = statistics.median(self.seconds)
        return f"{middle * 1e3:.0f} ms" if high - low <= STEADY * middle else ""


def run(
    images: Sequence[str] = (),
    model: str | None = None,
    out: str = "dvt_demo.png",
    pretrained: bool = True,
    size: int | None = None,
    device: str | None = None,
) -> Path:
    """Draw a model's features of images with its denoiser off and on; prints what it did, returns the file written.

    Args:
        images: paths; default the photographs that ship with the package.
        model: a name for timm.create_model; default `DEFAULT_MODEL`.
        out: the picture to write; its suffix says the format.
        pretrained: False for random weights.
        size: images are resized to about size x size pixels in area; default the model's own resolution.
        device: as for `pick_device`.

    Raises:
        UserError: an image, the model, the device or the output cannot be used.
    """
    path, kind = check_output(out)
    where = pick_device(device)
    sources = [Path(image) for image in images] or PHOTOGRAPHS
    photographs = [read_image(source) for source in sources]
    network: Any = load_denoised(model or DEFAULT_MODEL, pretrained)
    note = "" if pretrained else NOT_ASKED
    if note:
        print(f"note: {note}")
    network = network.to(where)
    name = model or DEFAULT_MODEL
    print(f"model:  {name} on {where}")
    shown, changes = [], []
    for source, photograph in zip(sources, photographs):
        resized, pixels = prepare(network, photograph, size)
        off, on = measure(sized(network, pixels), pixels.to(where), ROUNDS, source.name)
        rows, columns, channels = on.features.shape
        times = (off.time, on.time) if off.time and on.time else ("", "")
        timed = f"denoiser off {times[0]}, on {times[1]}" if times[0] else "no times: a busy machine"
        change = resizing(photograph, resized)
        changes += [f"{source.name}: {change}."] if change else []
        print(
            f"{source.name}: {resized.width} x {resized.height} pixels{f' ({change})' if change else ''}, "
            f"{rows} x {columns} patch tokens of {channels} channels; {timed}"
        )
        shown.append(Shown(resized, off.features.numpy(), on.features.numpy(), times))
    sheet = draw(shown, f"timm-dvt: {name}", [*EXPLANATION, *changes], note)
    picture = io.BytesIO()
    sheet.save(picture, format=kind)
    try:
        write_whole(path, lambda temporary: temporary.write_bytes(picture.getvalue()))
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}") from e
    print(f"wrote {path}")
    return path


# ---- what the command line names


def check_output(out: str) -> tuple[Path, str]:
    """The path and Pillow's name of the format, before anything slow is done. Raises UserError."""
    path = Path(out)
    if path.is_dir():
        raise UserError(f"cannot write {out}: it is a folder")
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot write {out}: {path.suffix!r} is no suffix of an image format; use .png")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {out}: the folder {path.parent} is read-only")
    return path, kind


def load_denoised(name: str, pretrained: bool = True) -> nn.Module:
    """A model of that name that has a denoiser to switch. Raises UserError."""
    try:
        model = load_any_size(name, pretrained)
    except WeightsNotFoundError as error:
        if name in VARIANTS or name.startswith(SCHEMES):
            raise
        text = str(error).rstrip(".")
        raise UserError(f"{text}; timm-dvt list prints the models that have a denoiser") from error
    if not isinstance(model, Denoised) or model.denoiser is None:
        raise UserError(f"{name!r} has no denoiser to switch; timm-dvt list prints those that have")
    if model.in_chans != 3:
        raise UserError(f"{name!r} takes images of {model.in_chans} channels; a photograph has 3")
    return model


# ---- features


def resizing(original: Image.Image, resized: Image.Image) -> str:
    """What `prepare` did to an image beside making it smaller, in words; nothing where it did nothing else."""
    scale = max(resized.width / original.width, resized.height / original.height)
    kept = resized.width * resized.height / (original.width * original.height * scale**2)
    words = [f"enlarged from {original.width} x {original.height}"] if scale > 1 else []
    words += [f"{max(1 - kept, 0.01):.0%} cropped"] if kept < 0.995 else []
    return ", ".join(words)


def prepare(model: Any, image: Image.Image, size: int | None = None) -> tuple[Image.Image, torch.Tensor]:
    """The image resized to whole patches, its aspect ratio kept, and as the model's input (1, 3, h, w)."""
    config = resolve_model_data_config(model)
    side = size or config["input_size"][-1]
    aspect = min(max(image.width / image.height, 1 / MAX_ASPECT), MAX_ASPECT) ** 0.5
    (rows, columns), (full_height, full_width) = model.layout.grid, model.layout.img_size
    patch_height, patch_width = full_height // rows, full_width // columns
    width = max(round(side * aspect / patch_width), 2) * patch_width
    height = max(round(side / aspect / patch_height), 2) * patch_height
    resized = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return resized, ((pixels.permute(2, 0, 1) / 255 - mean) / std).unsqueeze(0)


def sized(model: Any, pixels: torch.Tensor) -> Any:
    """A model that takes this input: the same, or of a class that is made for one size a copy, whose embeddings timm
    resamples. Resampled in place, they would be others after each image.
    """
    size = pixels.shape[2], pixels.shape[3]
    if getattr(model, "dynamic_img_size", False) or not hasattr(model, "set_input_size") or size == input_size(model):
        return model
    twin = copy.deepcopy(model)
    twin.set_input_size(img_size=size)
    return twin


@torch.inference_mode()
def measure(
    model: Any,
    pixels: torch.Tensor,
    rounds: int,
    label: str = "",
) -> tuple[Measured, Measured]:
    """The patch tokens of an input (1, 3, h, w) with the denoiser off and on, and how long each takes.

    Args:
        rounds: timed forwards of each state, by turns, behind one that warms up at this size.
        label: of a progress bar; none without.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    features = {}
    for i in tqdm(range(rounds + 1), label, unit="round", leave=False, disable=not label):
        for state in (False, True) if i % 2 else (True, False):  # neither always follows the other
            with model.denoising(state):
                start = time.perf_counter()
                features[state] = patch_tokens(model, pixels)
                if i:  # the first forward warms up
                    seconds[state].append(time.perf_counter() - start)
    return Measured(features[False], seconds[False]), Measured(features[True], seconds[True])


def patch_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Final-normed patch tokens (H, W, C) on the CPU; copying them there also waits for an accelerator."""
    tokens = model.layout.patches(model.forward_features(pixels), model.prefix_tokens())
    if model.norm_after_pool and not model.denoise:
        tokens = model.fc_norm(tokens)
    grid = model.layout.grid_at(pixels.shape[2], pixels.shape[3], tokens.shape[1])
    return tokens[0].float().cpu().unflatten(0, grid)
