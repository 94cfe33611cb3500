"""Feature maps as colours: principal components on one projection, and a scale for norms and similarities."""

from dataclasses import dataclass

import numpy as np
import torch

PERCENTILES = (0.01, 0.99)  # a few outlier tokens must not decide the contrast of all others

# Dark blue over green to yellow, rising in lightness all the way: readable in grey and by colour-blind readers.
SCALE = np.array([(24, 15, 61), (48, 60, 130), (33, 113, 142), (38, 160, 124), (122, 199, 77), (253, 231, 55)])


@dataclass(frozen=True)
class Projection:
    """Three principal components as red, green and blue, with the range of values that fills each colour.

    Attributes:
        mean: (C,) what is taken off first.
        axes: (C, 3) orthonormal, by falling variance; each axis' largest entry is positive, which fixes its sign.
        low, high: (3,) values that become 0 and 1.
    """

    mean: torch.Tensor
    axes: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def colors(self, features: torch.Tensor) -> np.ndarray:
        """Features (H, W, C) to colours (H, W, 3), uint8. A component without variance is mid-grey."""
        values = (features.double() - self.mean) @ self.axes
        span = self.high - self.low
        flat = span <= 1e-9 * (self.high.abs() + self.low.abs()).clamp_min(1e-9)
        scaled = ((values - self.low) / torch.where(flat, 1.0, span)).clamp(0, 1)
        return (torch.where(flat, 0.5, scaled) * 255).round().byte().numpy()


def fit_projection(features: torch.Tensor) -> Projection:
    """The projection on the three largest principal components of features (H, W, C), C >= 3."""
    rows = features.double().flatten(0, -2)
    mean = rows.mean(dim=0)
    centred = rows - mean
    # The eigenvectors of C x C: unlike the tokens' own SVD it gives three axes for fewer than three tokens too.
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    low, high = torch.quantile(centred @ axes, torch.tensor(PERCENTILES, dtype=torch.float64), dim=0)
    return Projection(mean, axes, low, high)


def heat(values: torch.Tensor, low: float, high: float) -> np.ndarray:
    """Values (H, W) on the scale from `low` to `high`: colours (H, W, 3), uint8."""
    span = high - low
    place = ((values.double().numpy() - low) / (span if span > 0 else 1)).clip(0, 1) * (len(SCALE) - 1)
    channels = [np.interp(place, np.arange(len(SCALE)), SCALE[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def centre_similarity(features: torch.Tensor) -> torch.Tensor:
    """Cosine similarity (H, W) of each token of a map (H, W, C) to the token in the middle, (H // 2, W // 2)."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return unit @ unit[features.shape[0] // 2, features.shape[1] // 2]
