"""A first look: a model's features with the denoiser off and on, timed and drawn side by side."""

import io
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import timm
import torch
from PIL import Image, ImageOps
from timm.data import resolve_model_data_config
from torch import nn

from timm_dvt.bars import tqdm
from timm_dvt.fetching import WeightsNotFoundError, first_line
from timm_dvt.files import write_whole
from timm_dvt.images import ImageError, to_rgb, upright
from timm_dvt.loading import SCHEMES, create_model, did_you_mean
from timm_dvt.model import Denoised
from timm_dvt.panel import Shown, draw
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import FOCUS
from timm_dvt.weights import CheckpointError

DEFAULT_MODEL = FOCUS.name
MAX_ASPECT = 3.0  # longer images are cropped around their middle
ASSETS = Path(str(resources.files("timm_dvt"))) / "assets"
PHOTOGRAPHS = (ASSETS / "cat.jpg", ASSETS / "mountain.jpg")  # README.md there says whose they are
EXPLANATION = (
    "Each square is one patch of the image. A Vision Transformer mixes the position of a patch into its features;",
    "the denoiser takes that pattern out again and leaves what the image shows.",
)
NOT_ASKED = "random weights, as asked for: no learned denoiser; the picture shows the mechanics only"


class DemoError(Exception):
    """Something the person at the command line can put right; the message says what."""


@dataclass(frozen=True)
class Measured:
    """Patch tokens (H, W, C), float32 on the CPU, and the milliseconds of a forward."""

    features: torch.Tensor
    milliseconds: float


def run(
    images: Sequence[str] = (),
    model: str | None = None,
    out: str = "dvt_demo.png",
    pretrained: bool = True,
    size: int | None = None,
    rounds: int = 3,
) -> Path:
    """Draw a model's features of images with its denoiser off and on; prints what it did, returns the file written.

    Args:
        images: paths; default the photographs that ship with the package.
        model: a name for timm.create_model; default `DEFAULT_MODEL`.
        out: the picture to write; its suffix says the format.
        pretrained: False for random weights.
        size: images are resized to about size x size pixels in area; default the model's own resolution.
        rounds: forwards of each state, of which the median time is given.

    Raises:
        DemoError: an image, the model or the output cannot be used.
    """
    path, kind = check_output(out)
    sources = [Path(image) for image in images] or PHOTOGRAPHS
    photographs = [read_image(source) for source in sources]
    network, note = load_model(model, pretrained)
    if note:
        print(f"note: {note}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device).eval()
    name = model or DEFAULT_MODEL
    print(f"model:  {name} on {device}")
    shown = []
    for source, photograph in zip(sources, photographs):
        resized, pixels = prepare(network, photograph, size)
        off, on = measure(network, pixels.to(device), rounds, label=source.name)
        rows, columns, channels = on.features.shape
        print(
            f"{source.name}: {resized.width} x {resized.height} pixels, {rows} x {columns} patch tokens of {channels} "
            f"channels; denoiser off {off.milliseconds:.0f} ms, on {on.milliseconds:.0f} ms (median of {rounds})"
        )
        times = (f"{off.milliseconds:.0f} ms", f"{on.milliseconds:.0f} ms")
        shown.append(Shown(resized, off.features.numpy(), on.features.numpy(), times))
    sheet = draw(shown, f"What {name} sees, patch by patch", EXPLANATION, note)
    picture = io.BytesIO()
    sheet.save(picture, format=kind)
    try:
        write_whole(path, lambda temporary: temporary.write_bytes(picture.getvalue()))
    except OSError as e:
        raise DemoError(f"cannot write {out}: {e.strerror or e}") from e
    print(f"wrote {path}")
    return path


# ---- what the command line names


def check_output(out: str) -> tuple[Path, str]:
    """The path and Pillow's name of the format, before anything slow is done. Raises DemoError."""
    path = Path(out)
    if path.is_dir():
        raise DemoError(f"cannot write {out}: it is a folder")
    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise DemoError(f"cannot write {out}: {path.suffix!r} is no suffix of an image format; use .png")
    if not path.parent.is_dir():
        raise DemoError(f"cannot write {out}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise DemoError(f"cannot write {out}: the folder {path.parent} is read-only")
    return path, kind


def read_image(source: Path) -> Image.Image:
    """The image as RGB, upright, what is transparent on white. Raises DemoError."""
    try:
        if source.exists() and not source.is_file():  # opening a named pipe would wait for ever
            raise DemoError(f"{source}: not a file")
        with source.open("rb") as file:
            return decode(file, str(source))
    except OSError as e:
        raise DemoError(f"{source}: {e.strerror or e}") from e


def decode(file: BinaryIO, name: str, formats: list[str] | None = None, max_pixels: float = math.inf) -> Image.Image:
    """As `read_image`, of an open file.

    Args:
        name: what errors call it.
        formats: those that Pillow may try; default all.
        max_pixels: more are refused before they are decoded.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > max_pixels:
                size = math.ceil(image.width * image.height / 1e5) / 10  # never as much as what would be taken
                raise DemoError(
                    f"{name}: {size:g} megapixels ({image.width} x {image.height}); the most that is taken is "
                    f"{max_pixels / 1e6:g}. Make it smaller and try again"
                )
            image.load()
            return to_rgb(upright(image))
    except ImageError as e:
        raise DemoError(f"{name}: {e}") from e
    except Image.UnidentifiedImageError as e:
        kinds = f"is taken; choose one of {', '.join(formats)}" if formats else "Pillow can read"
        raise DemoError(f"{name}: not an image that {kinds}") from e
    except Image.DecompressionBombError as e:  # it comes before the size can be asked for
        most = f"the most that is taken is {max_pixels / 1e6:g} megapixels. " if max_pixels < math.inf else ""
        raise DemoError(f"{name}: far too many pixels to be read; {most}Make it smaller and try again") from e
    except OSError as e:
        raise DemoError(f"{name}: {e.strerror or e}") from e
    except DemoError:
        raise
    except Exception as e:  # on damaged files Pillow raises nearly anything, IndexError included
        raise DemoError(f"{name}: not an image that can be read ({e or type(e).__name__})") from e


def load_model(name: str | None, pretrained: bool = True) -> tuple[nn.Module, str]:
    """The model, and a note that says so where its weights are random. Raises DemoError."""
    torch.manual_seed(0)
    if not pretrained:
        return create(name or DEFAULT_MODEL, pretrained=False), NOT_ASKED
    return create(name or DEFAULT_MODEL, pretrained=True), ""


def create(name: str, pretrained: bool) -> nn.Module:
    """timm's model of that name, checked to be one the demo can show."""
    scheme = name.startswith(SCHEMES)
    if not scheme and not timm.is_model(name):
        raise DemoError(
            f"{name!r} is not a model; python -m timm_dvt list prints the names there are{did_you_mean(name)}"
        )
    try:
        model = create_model(name, pretrained)
    except CheckpointError as e:
        raise DemoError(str(e)) from e
    except Exception as e:  # a folder, a hub repo or a tag that does not exist: timm's, the client's or json's errors
        remedy = did_you_mean(name) or (
            "" if scheme or name in VARIANTS else "; python -m timm_dvt list prints the models that have a denoiser"
        )
        what = f"cannot create {name!r}: {type(e).__name__}: {first_line(e)}"
        raise DemoError((str(e) if isinstance(e, WeightsNotFoundError) else what).rstrip(".") + remedy) from e
    if not isinstance(model, Denoised) or model.denoiser is None:
        raise DemoError(f"{name!r} has no denoiser to switch; python -m timm_dvt list prints those that have")
    if model.in_chans != 3:
        raise DemoError(f"{name!r} takes images of {model.in_chans} channels; the demo has 3")
    return model


# ---- features


def prepare(model: Any, image: Image.Image, size: int | None = None) -> tuple[Image.Image, torch.Tensor]:
    """The image resized to whole patches, its aspect ratio kept, and as the model's input (1, 3, h, w)."""
    config = resolve_model_data_config(model)
    side = size or config["input_size"][-1]
    aspect = min(max(image.width / image.height, 1 / MAX_ASPECT), MAX_ASPECT) ** 0.5
    (rows, columns), (full_height, full_width) = model.layout.grid, model.layout.img_size
    patch_height, patch_width = full_height // rows, full_width // columns
    width = max(round(side * aspect / patch_width), 2) * patch_width
    height = max(round(side / aspect / patch_height), 2) * patch_height
    if hasattr(model, "set_input_size") and not getattr(model, "dynamic_img_size", False):
        model.set_input_size(img_size=(height, width))
    resized = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return resized, ((pixels.permute(2, 0, 1) / 255 - mean) / std).unsqueeze(0)


@torch.inference_mode()
def measure(
    model: Any,
    pixels: torch.Tensor,
    rounds: int,
    of: Callable[[Sequence[float]], float] = statistics.median,
    label: str = "",
) -> tuple[Measured, Measured]:
    """The patch tokens of an input (1, 3, h, w) with the denoiser off and on, and how long each takes.

    Args:
        rounds: forwards of each state, by turns, behind one that warms up at this size; 0 for no times.
        of: what counts of their times.
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
    off, on = (Measured(features[state], of(seconds[state] or [0.0]) * 1e3) for state in (False, True))
    return off, on


def patch_tokens(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Final-normed patch tokens (H, W, C) on the CPU; copying them there also waits for an accelerator."""
    tokens = model.layout.patches(model.forward_features(pixels), model.prefix_tokens())
    if model.norm_after_pool and not model.denoise:
        tokens = model.fc_norm(tokens)
    grid = model.layout.grid_at(pixels.shape[2], pixels.shape[3], tokens.shape[1])
    return tokens[0].float().cpu().unflatten(0, grid)
