"""How well a linear map reads a patch's place out of its token, on images that it was not fitted to.

Ridge regression of n tokens x (standardized) to places t, by sums that are kept of the images it is fitted to, float64:

    b = (X^T X + r n I)^-1 X^T t,    R2 = 1 - sum (t - x b)^2 / sum (t - mean t)^2    over the images held out

where for each of these r is what is best for all others of them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from timm_dvt.inspection.estimates import jackknife
from timm_dvt.inspection.results import Estimate

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # r, of a standardized channel's variance; the last leaves hardly anything


class PlaceProbe:
    """Row and column, and as a control the same with half of the views turned round, which no token can know."""

    def __init__(self) -> None:
        self.count = 0
        self.products: Any = 0.0
        self.right: Any = 0.0
        self.tokens: Any = 0.0
        self.places: Any = 0.0
        self.missed: dict[int, torch.Tensor] = {}
        self.whole: dict[int, torch.Tensor] = {}
        self._weights: torch.Tensor | None = None
        self._draw = torch.Generator().manual_seed(0)

    def add(self, maps: torch.Tensor) -> None:
        """Fit to the tokens of maps (V, H, W, C)."""
        x, t = self._tokens(maps)
        self.count += len(x)
        self.tokens, self.places = self.tokens + x.sum(0), self.places + t.sum(0)
        self.products, self.right = self.products + x.T @ x, self.right + x.T @ t

    def test(self, maps: torch.Tensor, image: int) -> None:
        """Judge by the tokens of maps (V, H, W, C) of an image; the fit ends with the first."""
        if self._weights is None:
            self._fit()
        x, t = self._tokens(maps)
        left = ((x - self.tokens) @ self._weights).unflatten(1, (len(RIDGES), -1)) + (self.places - t)[:, None]
        missed, whole = left.square().sum(0).cpu(), (t - t.mean(0)).square().sum(0).cpu()
        self.missed[image] = self.missed.get(image, 0) + missed
        self.whole[image] = self.whole.get(image, 0) + whole

    def r2(self) -> tuple[Estimate, Estimate]:
        """Of row and column."""
        missed, whole = (torch.stack([*sums.values()]) for sums in (self.missed, self.whole))
        if len(missed) > 1:
            best = (missed.sum(0) - missed).argmin(1)  # (images, 4): the ridge that is best for the others
            missed = missed.gather(1, best[:, None])[:, 0]
        else:
            missed = missed[:, 1]

        def of(column: int) -> tuple[float, float]:
            def value(kept: Sequence[int]) -> float:
                return 1 - float(missed[kept, column].sum() / whole[kept, column].sum())

            return jackknife(value, len(missed))

        (row, row_error), (column, column_error), *controls = (of(place) for place in range(4))
        chances = [min(max(value + 2 * error, 0.0), 1.0) for value, error in controls]  # few images tell little of it
        return Estimate(row, row_error, chances[0]), Estimate(column, column_error, chances[1])

    def _fit(self) -> None:
        mean, places = self.tokens / self.count, self.places / self.count
        covariance = self.products / self.count - mean[:, None] * mean
        scale = covariance.diagonal().clamp(min=1e-30).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
        right = vectors.T @ (scale[:, None] * (self.right / self.count - mean[:, None] * places))
        weights = [vectors @ (right / (values.clamp(min=0) + ridge)[:, None]) for ridge in RIDGES]
        self._weights = scale[:, None] * torch.cat(weights, 1)
        self.tokens, self.places = mean, places
        del self.products, self.right

    def _tokens(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(V*H*W, C) and their targets (V*H*W, 4), from -1 to 1."""
        if maps.device.type == "mps":  # which has no float64
            maps = maps.cpu()
        views, rows, columns = maps.shape[:3]
        grid = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in (rows, columns)), indexing="ij")
        place = torch.stack(grid, -1).flatten(0, 1).expand(views, -1, 2)
        turned = torch.randint(0, 2, (views, 1, 2), generator=self._draw) * 2 - 1
        targets = torch.cat([place, place * turned], -1).flatten(0, 1)
        return maps.flatten(0, 2).double(), targets.to(maps.device).double()
