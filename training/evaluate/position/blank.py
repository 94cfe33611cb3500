"""How much position is left in images without content: Fig. 3's blank images, in numbers.

What patch tokens x_p of such an image say beyond their mean, they can only know from their place. Their spread is

    s = sqrt(mean over places p and channels of (x_p - mean over places of x)^2)

of images of one color, of zero input (zero after normalization) and of uniform noise, each at several sizes:

    spread/SIZE/IMAGE    s in this state
    ratio                s over that of the raw tokens, mean over colors, zero input and sizes; of raw tokens it is 1.
                         Clean features are near 0; above 1 the denoiser adds a pattern
    ratio_worst          the largest of them
    ratio_noise          that of noise, mean over sizes. Noise has a little content, and so a spread of its own
    ratio_walls          s over that of the raw tokens in the half of a photograph that is painted over in one of the
                         colors, mean over photographs: what is beside a wall shows in it as well
    of_photographs       s of colors and zero input in percent of that in photographs of the dataset, both in this state
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from timm_dvt.errors import UserError
from timm_dvt.layouts import KNOWN
from timm_dvt.reading import final_tokens, fit_to
from training.common.backbone import autocasting, raw_copy
from training.evaluate.features.cached import Features
from training.evaluate.features.extractor import Extractor
from training.evaluate.run import Run

KIND = "images"
STATES = ("raw", "denoised")
NUMBERS = {
    "ratio": "blank ratio",
    "ratio_noise": "noise ratio",
    "ratio_walls": "walls ratio",
    "of_photographs": "blank, % of photographs",
}
MEANING = (
    "blank ratio, noise ratio, walls ratio: how far patches of an image of one color, of noise, or of a wall painted "
    "over half of a photograph still differ, denoiser on over off; 0 is clean. blank, % of photographs: the same over "
    "how far those of photographs do."
)
COLORS = {
    "gray": (0.5, 0.5, 0.5),
    "black": (0.0, 0.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "red": (0.8, 0.1, 0.1),
    "green": (0.1, 0.6, 0.2),
    "blue": (0.1, 0.2, 0.8),
    "beige": (0.96, 0.96, 0.86),
    "sky": (0.53, 0.81, 0.92),
}
NOISE = "noise"
_NOTHING = 1e-12  # a spread below it is that of a model that knows no place: no denoiser can lower it


@dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
        sizes: of blank images, a side or (height, width) in pixels, rounded to whole patches. Models of which only
            the final grid is known at their own size (no VisionTransformer or Eva) are shown that size alone.
        images: photographs, the first ones of the dataset.
    """

    sizes: tuple = (280, 518, (518, 784))
    images: int = 16


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """The numbers above."""
    features = data["val"]
    extractor = features.extractor
    spreads: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for size in blank_sizes(extractor, settings):
        read = token_reader(extractor, size)
        for name, image in blank_images(extractor, size, run.seed):
            tokens, key = read(image), f"{size[0]}x{size[1]}/{name}"
            spreads[key] = spread(tokens[run.state])
            ratios[key] = spreads[key] / max(spread(tokens["raw"]), _NOTHING)
    noise = [key for key in spreads if key.endswith(NOISE)]
    blank = [key for key in spreads if key not in noise]
    numbers = {
        "ratio": fmean(ratios[key] for key in blank),
        "ratio_worst": max(ratios[key] for key in blank),
        "ratio_noise": fmean(ratios[key] for key in noise),
    }
    chosen = range(min(settings.images, len(features)))
    if chosen:
        photos = fmean(spread(features.maps([i], run.state)[0].flatten(0, 1)) ** 2 for i in chosen)
        numbers["ratio_walls"] = 1.0 if run.state == "raw" else fmean(walls(features, chosen, run.state))
        numbers["of_photographs"] = 100 * (fmean(spreads[key] ** 2 for key in blank) / max(photos, _NOTHING**2)) ** 0.5
    return {**numbers, **{f"spread/{key}": value for key, value in spreads.items()}}


def walls(features: Features, indices: Sequence[int], state: str) -> Iterator[float]:
    """s of a wall over that of its raw tokens, photograph by photograph: sides and colors by turns."""
    extractor, grid = features.extractor, features.grid
    read = token_reader(extractor, (extractor.reader.input_size,) * 2)
    for number, image in zip(indices, features.images(indices)):
        hidden = torch.zeros(grid, grid, dtype=torch.bool)
        hidden[: max(1, grid // 2)] = True
        hidden = hidden.rot90(number)
        pixels = interpolate(hidden[None, None].float(), image.shape[1:], mode="nearest")[0].bool()
        color = torch.tensor([*COLORS.values()][number % len(COLORS)]).view(3, 1, 1)
        tokens = {name: x[hidden.flatten()] for name, x in read(torch.where(pixels, color, image)).items()}
        yield spread(tokens[state]) / max(spread(tokens["raw"]), _NOTHING)


def spread(tokens: Tensor) -> float:
    """s of patch tokens (N, C)."""
    exact = tokens.double()
    return float((exact - exact.mean(0)).square().mean().sqrt())


def blank_sizes(extractor: Extractor, settings: Settings) -> list[tuple[int, int]]:
    """Height and width of blank images, whole patches of the model.

    Raises:
        ValueError: sizes that are none.
    """
    patch = extractor.reader.patch
    wanted: Any = settings.sizes if isinstance(extractor.model, KNOWN) else (extractor.reader.input_size,)
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in wanted]
    if not pairs or any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise UserError(f"sizes must be pixels or (height, width), like (518, (518, 784)), got {settings.sizes}")
    return list(dict.fromkeys((_whole(height, patch), _whole(width, patch)) for height, width in pairs))


def blank_images(extractor: Extractor, size: tuple[int, int], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and images (3, h, w) in [0, 1]: colors, the zero input and noise drawn from the seed."""
    for name, color in COLORS.items():
        yield name, torch.tensor(color).view(3, 1, 1).expand(3, *size)
    yield "zero", extractor.reader.mean[0].cpu().expand(3, *size)
    yield NOISE, torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def token_reader(extractor: Extractor, size: tuple[int, int]) -> Callable[[Tensor], dict[str, Tensor]]:
    """image (3, h, w) of this size -> {state: patch tokens (N, C)}, of all states of the extractor."""
    model = raw_copy(extractor.model)
    layout = fit_to(model, size)
    weight = next(model.parameters())

    @torch.no_grad()
    def read(image: Tensor) -> dict[str, Tensor]:
        inputs = extractor.reader.normalized(image[None])
        with autocasting(weight, extractor.reader.dtype):
            _, raw, grid = final_tokens(model, inputs, layout)
        if extractor.denoiser is None:
            return {"raw": raw[0]}
        return {"raw": raw[0], "denoised": extractor.denoiser(raw.to(weight.dtype), grid, inputs)[0]}

    return read


def _whole(pixels: int, patch: int) -> int:
    return max(1, round(pixels / patch)) * patch
