"""Numbers of a mean map from independent estimates of it, with their errors and what chance would give.

Groups g of images have an estimate G_g = G + noise_g each, of weight w_g. All that is asked of them is quadratic, so it
follows from their products K_gh = <G_g, G_h>, and so does what is left when a group is left out (the jackknife), and
what noise alone would be like: groups whose signs split them into halves, in whose sum there is no G.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch

from timm_dvt.calibration.positions import without_noise
from timm_dvt.inspection.results import Estimate, Grid

LOW, HIGH, PATCH = 1 / 8, 1 / 4, 7 / 16  # cycles a patch: `Grid`


def jackknife(statistic: Callable[[Sequence[int]], float], count: int) -> tuple[float, float]:
    """A statistic of the groups, given which of them are kept, and its standard error."""
    everything = list(range(count))
    without = [statistic([group for group in everything if group != out]) for out in everything]
    mean = sum(without) / count
    error = ((count - 1) / count * sum((value - mean) ** 2 for value in without)) ** 0.5
    return statistic(everything), error


def position_share(products: torch.Tensor, weights: torch.Tensor, variances: torch.Tensor) -> Estimate:
    """The share of the variance that G explains: `Position.share`, unclipped, so that it is 0 on average by chance.

    Args:
        products: K (groups, groups), a mean over places.
        weights: (groups,). variances: (groups,) of the tokens within a view, that of a place.
    """

    def share(kept: Sequence[int]) -> float:
        some = weights[kept] / weights[kept].sum()
        inner = products[kept][:, kept]
        variance = float(some @ variances[kept])
        signal = without_noise(
            float(some @ inner @ some), float(some.square() @ inner.diagonal()), float(some.square().sum())
        )
        return signal / variance if variance > 0 else 0.0

    value, error = jackknife(share, len(weights))
    variance = float(weights @ variances)
    noise = _of_splits(products, weights).std() / (1 - float(weights.square().sum()))
    return Estimate(value, error, float(2 * noise) / variance if variance > 0 else 0.0)


def alikeness(products: torch.Tensor, weights: torch.Tensor, with_other: torch.Tensor, other: float) -> Estimate:
    """The correlation of the mean map with another, from the groups' products (groups,) with it, and its own square."""

    def correlation(kept: Sequence[int]) -> float:
        some = weights[kept] / weights[kept].sum()
        square = float(some @ products[kept][:, kept] @ some) * other
        return float(some @ with_other[kept]) / square**0.5 if square > 0 else 0.0

    value, error = jackknife(correlation, len(weights))
    centered = with_other - weights @ with_other
    splits = torch.stack([(signs * weights) @ centered for signs in _signs(len(weights))])
    noises = _of_splits(products, weights).clamp(min=1e-30)
    chance = (splits / (noises * max(other, 1e-30)).sqrt()).square().mean().sqrt()
    return Estimate(value, error, float(2 * chance))


def grid_energy(maps: torch.Tensor, weights: torch.Tensor) -> Grid:
    """Energies by wavelength, of maps (groups, H, W, C)."""
    waves = torch.fft.fft2(maps, dim=(1, 2))
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64).abs() for side in maps.shape[1:3])
    frequency = torch.maximum(rows[:, None], columns)
    inside = frequency > 0
    bands = {"low": inside & (frequency <= LOW), "high": frequency > HIGH, "patch": frequency > PATCH}
    squares = {name: _products(waves[:, band]) for name, band in {**bands, "all": inside}.items()}

    def energy(name: str) -> Estimate:
        def fraction(kept: Sequence[int]) -> float:
            some = weights[kept] / weights[kept].sum()

            def signal(of: torch.Tensor) -> float:
                inner = of[kept][:, kept]
                diagonal = float(some.square() @ inner.diagonal())
                return without_noise(float(some @ inner @ some), diagonal, float(some.square().sum()))

            whole = signal(squares["all"])
            return min(max(signal(squares[name]) / whole, 0.0), 1.0) if whole > 0 else 0.0

        chance = float(bands[name].sum() / inside.sum().clamp(min=1))
        return Estimate(*jackknife(fraction, len(weights)), chance)

    return Grid(energy("low"), energy("high"), energy("patch"))


def products_of(maps: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
    """K (groups, groups) of maps (groups, H, W, C) over the places, or with other maps; each channel centered."""
    flat, other = (_centered(features) for features in (maps, maps if others is None else others))
    return flat @ other.T / (maps.shape[1] * maps.shape[2])


def _centered(maps: torch.Tensor) -> torch.Tensor:
    tokens = maps.flatten(1, 2)
    return (tokens - tokens.mean(1, keepdim=True)).flatten(1)


def _products(waves: torch.Tensor) -> torch.Tensor:
    flat = torch.view_as_real(waves.flatten(1)).flatten(1)
    return flat @ flat.T


def _signs(groups: int) -> list[torch.Tensor]:
    """All ways to split groups into halves, as signs."""
    ways = product((1.0, -1.0), repeat=groups - 1)
    return [torch.tensor((1.0, *way), dtype=torch.float64) for way in ways if abs(1 + sum(way)) <= groups % 2]


def _of_splits(products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """|sum of s_g w_g (G_g - G)|^2 for each split s."""
    away = torch.eye(len(weights), dtype=torch.float64) - weights
    noise = away @ products @ away.T
    return torch.stack([(signs * weights) @ noise @ (signs * weights) for signs in _signs(len(weights))])
