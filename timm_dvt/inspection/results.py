"""What an inspection tells: numbers with their errors, and what chance would give in their place."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number.

    Attributes:
        error: its standard error, by leaving out groups of images in turn.
        chance: what features without any of it would give, at the most (two standard errors), or on average where the
            measure says so.
    """

    value: float
    error: float
    chance: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g} (chance {self.chance:.2g})"

    @property
    def is_chance(self) -> bool:
        """Whether chance explains the number."""
        return self.value <= self.chance or self.value <= 2 * self.error


@dataclass(frozen=True)
class Blank:
    """What images without content show.

    Attributes:
        share: of the variance in these images that position explains.
        pattern: the variance that position makes in them over that within photographs, denoiser off. Beside
            `Layer.share` it says whether the pattern is stronger or weaker without content.
        alike: correlation of their mean map with that of photographs, from -1 to 1.
    """

    share: Estimate
    pattern: Estimate
    alike: Estimate


@dataclass(frozen=True)
class Outliers:
    """Tokens whose norm stands out.

    Attributes:
        share: of the patches, above `cut`; chance is what as many norms of a log-normal distribution would give.
        cut: the emptiest place of the histogram of norms above its mode (*Vision Transformers Need Registers* sets it
            by eye, at 150 for DINOv2-g); None where there is no second mode, and so no such outlier.
        robust_share: of the patches above `robust_cut`: by median and median absolute deviation of the log norms, so
            far out that of all patches one would be by chance.
        count, robust_count, patches: numbers of tokens.
        ratio: median norm of those above the cut over the median of all; 1 if there are none.
        border, place, low_content: of those above the cut, or if there is none the robust one; None if fewer than two
            images have any, and place if there are but two images.
        border: share of them in the outermost ring of patches; chance is the ring's share of all patches, on average.
        place: share of the variance of "is one of them" that position explains.
        low_content: chance that such a patch varies less in its pixels than another of the same view; 0.5 by chance, on
            average.
    """

    share: Estimate
    cut: float | None
    robust_share: Estimate
    robust_cut: float
    count: int
    robust_count: int
    patches: int
    ratio: float
    border: Estimate | None
    place: Estimate | None
    low_content: Estimate | None


@dataclass(frozen=True)
class Grid:
    """The energy of the mean map by the wavelength of its patterns, as fractions. Chance is a map of white noise.

    Attributes:
        low: wavelengths of 8 patches and more: gradients, blobs.
        high: below 4 patches: a fine grid.
        patch: of 2 patches, where neighbors differ: the patch frequency.
    """

    low: Estimate
    high: Estimate
    patch: Estimate


@dataclass(frozen=True)
class Layer:
    """Patch tokens at one place of the model.

    Attributes:
        name: "block N", as the block leaves them; "features", final-normed; with ", denoised" behind it.
        block: counted from 0. denoised: whether a denoiser is behind it. final: whether these are the features.
        share: of the variance within views of photographs that position explains (`timm_dvt.calibration.positions`).
        row, column: R2 of a linear map from tokens to the place, on images held out. Chance is that of places of which
            half the views' are turned round, so that no token can know them.
        flat, noise: images of one color, and of noise.
    """

    name: str
    block: int
    denoised: bool
    final: bool
    grid_size: tuple[int, int]
    share: Estimate
    row: Estimate
    column: Estimate
    flat: Blank
    noise: Blank
    outliers: Outliers
    grid: Grid


@dataclass(frozen=True)
class Trial:
    """What `calibrate` did at once (`--try`): calibrated on one half of the images, judged by the other."""

    method: str
    before: Estimate
    after: Estimate


@dataclass(frozen=True)
class Finding:
    """A sentence or two for readers who have not read the paper, and the commands that follow from it.

    Attributes:
        kind: "nothing", "position", "outliers", "blank", "random weights", "note".
    """

    kind: str
    text: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """What the page draws.

    Attributes:
        photograph: (h, w, 3) in [0, 1]. maps: its tokens (H, W, C) by the layers' names.
        means: mean maps (H, W, C) of photographs by the layers' names, of the features alone. flat: of one color.
        norms: edges of bins and counts, by the layers' names.
        places: how often a patch was an outlier, (H, W) in [0, 1], by the layers' names.
    """

    photograph: np.ndarray
    maps: dict[str, np.ndarray]
    means: dict[str, np.ndarray]
    flat: dict[str, np.ndarray]
    norms: dict[str, tuple[np.ndarray, np.ndarray]]
    places: dict[str, np.ndarray]


@dataclass(frozen=True)
class Inspection:
    """What `timm_dvt.inspect` found.

    Attributes:
        model, kind: its name and class. device, size: where it ran, at (height, width) pixels.
        trained: False where all norms are as they are initialized, so that the weights are random.
        images, parts, views, blanks: how many photographs there were, whether they are parts of the package's two,
            forward passes of them, and of blank images.
        seconds: a view takes.
        layers: blocks in their order, then the features; denoised ones behind their raw ones.
        trial: with `try_calibration`.
        findings: the end of it, in words.
        pictures: for the page; not in `to_dict`.
    """

    model: str
    kind: str
    device: str
    size: tuple[int, int]
    trained: bool
    images: int
    parts: bool
    views: int
    blanks: int
    seconds: float
    layers: tuple[Layer, ...]
    trial: Trial | None
    findings: tuple[Finding, ...]
    pictures: Pictures = field(repr=False, compare=False)

    def layer(self, denoised: bool = False) -> Layer:
        """The features, with the denoiser off or on. Raises KeyError where there is no denoiser behind them."""
        for layer in self.layers:
            if layer.final and layer.denoised == denoised:
                return layer
        raise KeyError("denoised features")

    def to_dict(self) -> dict[str, Any]:
        """As json.dumps takes it, without the pictures."""
        kept = {name: value for name, value in vars(self).items() if name != "pictures"}
        return {name: _plain(value) for name, value in kept.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
