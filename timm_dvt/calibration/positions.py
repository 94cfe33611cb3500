"""What position adds to a ViT's features, told apart from what images show: sums over views, and what follows of them.

A canvas is an image, and its windows are the views of it that the model is given, shifted by whole patches, half of
them mirrored and half of them upside down. The patch at place p of window w shows the cell c_w(p) of the canvas, so its
token is

    y_w(p) = F(c_w(p)) + G(p) + residual                                    (paper, Eq. 3, with G shared by all images)

F is one value a cell, G one a place. Given G, a cell is the mean of y - G over the n windows that show it, pulled
towards the mean of the canvas as if PRIOR more windows had shown that one: F's cells are random effects, the residual's
variance is PRIOR times theirs. Putting that F into the least squares of G leaves, a canvas,

    R G = R y,    (R y)(p) = sum over windows of [y_w(p) - sum over windows of y_w' at c_w(p) / (n + PRIOR)]

If all canvases are cut alike, R is one matrix, and G = R^-1 (mean of R y over canvases): a sum is all that is kept of
an image. With one window a canvas, G is the plain mean.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# With 8 images of 8 windows of a real ViT, 0.5, 1, 2 and 3 leave 2.24, 2.20, 2.29 and 2.39% of the variance of other
# images to position, the plain mean 3.37%, nothing done 6.40%; with no window upside down.
PRIOR = 1.0
MOST_GROUPS = 8  # of images, whose estimates are compared; more tell the error no better, and each is kept
LEAST = 0.01  # of the mean map's square that is taken for G's at the least
TURNS = ((), (1,), (0,), (0, 1))  # by turns
SPLITS = 20  # into two halves, whose differences say what noise alone would look like


def without_noise(square: float, squares: float, evenness: float) -> float:
    """|G|^2 without the noise of its estimates G_g of weights w_g, unbiased, so that it may be below 0.

    Args:
        square: |sum of w_g G_g|^2. squares: the sum of |w_g G_g|^2. evenness: the sum of w_g^2, below 1.
    """
    return (square - squares) / (1 - evenness)


@dataclass(frozen=True)
class Windows:
    """How each canvas is cut: rows and columns of patches from its corner, and the axes (H, W) that are reversed.

    Where all images have their sky above, what the sums leave of content is the same at a place of all windows, and
    would pass for what position adds; but not if half of the windows have it below. From 16 landscapes position keeps
    3.9% of the variance of other images (raw 6.4%), where windows mirrored left to right alone leave it 6.1%; from 16
    composed images 2.7 and 3.3%.
    """

    places: tuple[tuple[int, int, tuple[int, ...]], ...]
    margin: tuple[int, int]  # patches by which the canvas is larger than a window

    @classmethod
    def draw(cls, count: int, margin: tuple[int, int], seed: int = 0) -> "Windows":
        """Windows spread at random, not regularly: a pattern with the period of a lattice would pass for content."""
        draw = np.random.default_rng(seed)
        rows, columns = (draw.integers(0, most + 1, count).tolist() for most in margin)
        return cls(tuple(zip(rows, columns, (TURNS[place % len(TURNS)] for place in range(count)))), margin)

    @classmethod
    def whole(cls) -> "Windows":
        """One window that is the canvas."""
        return cls(((0, 0, ()),), (0, 0))

    def without_content(self, maps: torch.Tensor) -> torch.Tensor:
        """R y: maps (..., V, H, W, C) of the windows of a canvas to (..., H, W, C)."""
        rows, columns = maps.shape[-3], maps.shape[-2]
        size = (rows + self.margin[0], columns + self.margin[1])
        canvas, shown = maps.new_zeros(*maps.shape[:-4], *size, maps.shape[-1]), maps.new_zeros(*size, 1)
        left = maps.sum(-4)
        for view, (y, x, turned) in zip(maps.unbind(-4), self.places):
            canvas[..., y : y + rows, x : x + columns, :] += view.flip(_dims(turned))
            shown[y : y + rows, x : x + columns] += 1
        canvas /= shown + PRIOR
        for y, x, turned in self.places:
            left -= canvas[..., y : y + rows, x : x + columns, :].flip(_dims(turned))
        return left

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """R^-1 of (..., H, W, C), by conjugate gradients."""

        def product(maps: torch.Tensor) -> torch.Tensor:
            return self.without_content(maps.unsqueeze(-4).expand(*maps.shape[:-3], len(self.places), *maps.shape[-3:]))

        solution, residual = torch.zeros_like(right), right.clone()
        direction, size = residual.clone(), residual.square().sum()
        enough = 1e-12 * size
        for _ in range(100):  # R's eigenvalues lie within V and V / (V + 1): a dozen steps will do
            if size <= enough:
                break
            image = product(direction)
            step = size / (direction * image).sum()
            solution += step * direction
            residual -= step * image
            before, size = size, residual.square().sum()
            direction = residual + (size / before) * direction
        return solution


class Position:
    """What position adds, as far as the images told it: float64, on the CPU.

    Each group g of images has an estimate G_g of its own, and their mean has weights w_g. As the noise of one group is
    independent of another's,

        E[sum over g != h of w_g w_h G_g^T G_h] = (1 - sum of w_g^2) G^T G

    has none of it, and says how large G is, and in which directions. With signs that split the groups into halves there
    is no G in that sum, and it says what noise alone looks like. The mean is shrunk by s = |G|^2 / (|G|^2 + noise^2),
    which makes its expected error the smallest, s noise^2, and never larger than if nothing were subtracted.

    Attributes:
        artifacts: (H, W, C) G, each channel with zero mean over the places.
        mean: (C,) of all tokens.
        total: (C, C) covariance over the places of the tokens of a view.
    """

    def __init__(self, estimates: torch.Tensor, weights: torch.Tensor, mean: torch.Tensor, total: torch.Tensor) -> None:
        """
        Args:
            estimates: (groups, H, W, C), two groups at least. weights: (groups,), of sum 1.
        """
        self.mean, self.total = mean, total
        maps = estimates.flatten(1, 2)
        self._weighted = (maps - maps.mean(1, keepdim=True)) * weights[:, None, None]
        self._mean_map = self._weighted.sum(0)
        self._scale = float(1 - weights.square().sum())
        square = float(self._mean_map.square().sum())
        signal = without_noise(square, float(self._weighted.square().sum()), float(weights.square().sum()))
        # |G|^2 is told by a few groups only: where they see none of it, there may still be some.
        self._signal = max(signal, LEAST * square)
        self._noise = max(square - self._signal, 0.0)
        self._shrink = self._signal / max(self._signal + self._noise, 1e-30)
        self.artifacts = (self._shrink * self._mean_map).unflatten(0, estimates.shape[1:3])

    @property
    def error(self) -> float:
        """Expected |artifacts - G| / |G|, at most 1."""
        return (1 - self._shrink) ** 0.5

    @property
    def share(self) -> float:
        """Estimated fraction of the variance within a view that position explains."""
        return _fraction(self._signal, self._places * float(self.total.trace()))

    @property
    def share_without_artifacts(self) -> float:
        """The same after `artifacts` was subtracted, whose error is left."""
        left = self._shrink * self._noise
        return _fraction(left, self._places * float(self.total.trace()) - self._signal + left)

    def share_after(self, matrix: torch.Tensor) -> float:
        """The same of tokens (N, C) that were multiplied by `matrix` (C, C), a symmetric one."""
        signal, total = (float((matrix @ square @ matrix).trace()) for square in (self._products(), self.total))
        return _fraction(signal, self._places * total)

    def components(self) -> torch.Tensor:
        """(C, r) orthonormal directions in which position shows, and little else.

        The eigenvalue of such a direction is above the largest one that any of `SPLITS` differences of halves has, so
        that noise alone would not make it; and position explains at least half of what varies there, or to lose the
        direction would be to lose content.
        """
        values, vectors = torch.linalg.eigh(self._products())
        draw = np.random.default_rng(0)
        signs = [(-1.0) ** group for group in range(len(self._weighted))]
        noise = [torch.linalg.eigvalsh(self._products(draw.permutation(signs)))[-1] for _ in range(SPLITS)]
        # What rounding leaves is no noise of the images, and no signal either.
        least = max(*map(float, noise), 1e-6 * float(values[-1]), 0.0)
        varies = self._places * (vectors * (self.total @ vectors)).sum(0)
        return vectors[:, (values > least) & (values > varies / 2)]

    @property
    def _places(self) -> int:
        return len(self._mean_map)

    def _products(self, signs: np.ndarray | None = None) -> torch.Tensor:
        """(C, C) the sum over g != h above, for these signs of the groups; without, an estimate of G^T G."""
        combined = self._mean_map if signs is None else torch.tensordot(torch.from_numpy(signs), self._weighted, 1)
        flat = self._weighted.flatten(0, 1)
        return (combined.T @ combined - flat.T @ flat) / self._scale


class PositionSums:
    """Sums over canvases, in float32 where the model is; memory does not grow with their number.

    Args:
        windows: how the canvases are cut.
        groups: of images, up to `MOST_GROUPS`. Their estimates are compared, so images of different groups must not
            have their content in common.
        directions: sum up the covariance too, which `estimate` needs and `of_groups` does not.
    """

    def __init__(self, windows: Windows, groups: int, directions: bool = True) -> None:
        self.windows, self.directions = windows, directions
        self.canvases = [0] * groups
        self.variances = [0.0] * groups
        self.sums: list[Any] = [None] * groups
        self.tokens: Any = 0.0
        self.covariance: Any = 0.0

    def add(self, maps: torch.Tensor, group: int) -> None:
        """Count a canvas: maps (V, H, W, C) of its windows."""
        maps = maps.float()
        left = self.windows.without_content(maps - maps.mean((0, 1, 2)))
        before = self.sums[group]
        self.sums[group] = left if before is None else before + left
        self.canvases[group] += 1
        tokens = maps.flatten(1, 2)
        self.tokens = self.tokens + tokens.mean((0, 1))
        tokens = (tokens - tokens.mean(1, keepdim=True)).flatten(0, 1)
        self.variances[group] += float(tokens.square().sum()) / len(tokens)
        if self.directions:
            self.covariance = self.covariance + tokens.T @ tokens / len(tokens)

    def of_groups(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """G as each group tells it (groups, H, W, C), the groups' weights, and the variance within their views.

        All float64, on the CPU. Groups without a canvas are left out; at least two must have some.
        """
        groups = [group for group, count in enumerate(self.canvases) if count]
        counts = torch.tensor([self.canvases[group] for group in groups], dtype=torch.float64)
        right = torch.stack([self.sums[group] / self.canvases[group] for group in groups])
        variances = torch.tensor([self.variances[group] for group in groups], dtype=torch.float64) / counts
        return self.windows.solve(right).cpu().double(), counts / counts.sum(), variances

    def estimate(self) -> Position:
        """What the canvases so far tell."""
        maps, weights, _ = self.of_groups()
        count = sum(self.canvases)
        return Position(maps, weights, *(sums.cpu().double() / count for sums in (self.tokens, self.covariance)))


def _dims(axes: tuple[int, ...]) -> list[int]:
    """Axes of a map (H, W) as dimensions of (..., H, W, C)."""
    return [axis - 3 for axis in axes]


def _fraction(part: float, whole: float) -> float:
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
