"""Stage 1 as streaming linear least squares: F on a grid and G on the patches, from sums over views."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timm_dvt.options import option
from training.stage1.conditioning import IllConditioned, separation, warn_if_inseparable
from training.stage1.linear.evidence import Solution, Strengths, factorise, solve
from training.stage1.linear.normal_equations import NormalEquations, interpolate

# Nodes a side that are enough to tell outliers from the rest.
COARSE = 32
# Squared residuals below this share of the squared content are no outliers, however small the typical one is:
# without noise the worst residuals are those of sharp borders.
FLOOR = 0.02
# Random directions of the features that outliers and strengths are judged by where there are more channels: both
# ask for energies only, and those of as many directions are known to about a seventh (sqrt(2 / 96)) for each token,
# at a fraction of the cost.
SKETCH = 96
# Steps of the strengths' fixed point at the end; they seldom move by the third.
MAX_STEPS = 4


@dataclass(frozen=True)
class LinearSettings:
    """Settings of the linear solver; there is one default for all images and models.

    How it was chosen: errors of F and G over the regimes of `training.benchmark._scenes` at 8, 64 and 256 views. M from
    K to 5 K: no regime gets worse with a finer grid, because the evidence chooses the smoothness, and sharp
    borders without noise gain tenfold up to M = 64; 2 K is what a solve in a second allows at K = 37. The
    smoothness and G's penalty are not settings: they follow from the data (`training.stage1.linear.evidence`). An
    outlier fence of 6 leaves F's error with 5% of outliers within 5% of that without, also where noise nearly hides
    them, and weighs next to nothing down where there are none. Outliers and strengths are judged by a random sketch of
    96 directions instead of all channels, which changes the errors of five regimes at 64 views by 2% at most.

    Attributes:
        nodes: M, nodes of F's grid a side; None is max(2 K, 64), at most 5 K.
        first_views: views held in memory until the first estimate exists (constant memory).
        outlier: tokens whose squared residual lies this many interquartile ranges beyond the upper quartile
            lose weight (Tukey's fence, a far one); inf for never.
    """

    nodes: int | None = None
    first_views: int = 16
    outlier: float = 6.0
    artifacts: bool = option(
        True,
        "linear solver: leave G out, so that F is the view-average (Tab. 5 b)",
        "--no-artifacts",
        action="store_false",
    )


@dataclass
class LinearFit:
    """F and G of one image, both float32.

    Attributes:
        nodal: (M, M, C) F at the grid's nodes.
        artifacts: (K, K, C) G, zero mean.
        diagnostics: what was chosen and how well it is determined.
    """

    nodal: Tensor
    artifacts: Tensor
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def semantics(self, xs: Tensor, ys: Tensor) -> Tensor:
        """F at the patches of a view: (len(ys), len(xs), C)."""
        return interpolate(self.nodal, xs, ys)


class LinearSolver:
    """Takes one view's features after another, keeps sums, and gives F and G at the end.

    The first views wait in a buffer of fixed size until there is an estimate that tells outlier tokens from
    the rest; from then on each view is weighed against the running estimate, added to the equations and forgotten.
    The estimate is renewed each time the number of views has doubled. What comes out does not depend on how
    the views were batched.
    """

    def __init__(
        self, grid: int, channels: int, settings: LinearSettings | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            grid: K.
            channels: C.
            settings: see LinearSettings; None is its defaults.
            device: where the normal equations are kept and solved; needs float64.
        """
        self.settings = settings or LinearSettings()
        self.grid, self.channels, self.device = grid, channels, device
        self.nodes = self.settings.nodes or min(max(2 * grid, 64), max(5 * grid, 4))
        self.views = 0
        self._buffer: list[tuple[Tensor, Tensor, Tensor]] = []
        self._equations: NormalEquations | None = None
        self._strengths = Strengths()
        self._lost = 0.0
        self._mixing: Tensor | None = None
        if channels > SKETCH:
            signs = torch.randint(2, (channels, SKETCH), generator=torch.Generator().manual_seed(0))
            self._mixing = ((2 * signs - 1) / math.sqrt(SKETCH)).to(device)

    def add(self, xs: Tensor, ys: Tensor, features: Tensor) -> None:
        """Add one view: xs, ys (K,) image coordinates of its columns and rows, features (K, K, C) float32."""
        xs, ys, features = xs.to(self.device), ys.to(self.device), features.to(self.device)
        self.views += 1
        if self._equations is None:
            self._buffer.append((xs, ys, features.clone()))
            if self.views == self.settings.first_views:
                self._start()
            return
        if self.views > self._next:
            self._renew()
            self._next *= 2
        features = features - self._offset
        sketch = self._sketch(features)
        weights = self._weigh(self._squared_residual(xs, ys, sketch))
        self._lost += float((1 - weights).sum())
        self._equations.add(xs, ys, features, weights, sketch)

    def solve(self) -> LinearFit:
        """F and G from all views added so far.

        Raises:
            IllConditioned: there are none, or the equations cannot be solved.
        """
        if not self.views:
            raise IllConditioned("no views were added: add some before solving")
        if self._equations is None:
            self._start()
        for _ in range(MAX_STEPS):
            before, solution = self._strengths, None  # the last factors make room for the next
            solution = self._renew()
            if _close(before, self._strengths):
                break
        assert self._equations is not None and solution is not None
        equations, factors = self._equations, solution.factors
        if self._mixing is not None:
            solution = solve(equations, factors)
        level = solution.artifacts.mean(0)
        semantics = solution.semantics + level + self._offset
        diagnostics = {
            "views": self.views,
            "noise": math.sqrt(solution.noise),
            "smoothness": before.smoothness,
            "artifact_penalty": before.artifacts,
            "semantic_freedom": factors.semantic_freedom / len(solution.semantics),
            "artifact_freedom": factors.artifact_freedom / len(solution.artifacts),
            "outlier_share": self._lost / (self.views * self.grid**2),
            "unseen": self._unseen(equations),
        }
        if factors.patches is not None:
            per_patch = float(equations.gg.mean())
            diagnostics["separation"] = separation(factors.patches, before.artifacts, per_patch)
            variance = solution.noise / max(diagnostics["separation"] * per_patch, 1e-12)
            content = equations.yy / (equations.weight * self.channels)
            uncertainty = math.sqrt(variance / max(content, 1e-30))
            warn_if_inseparable(diagnostics["separation"], uncertainty, diagnostics["unseen"])
        return LinearFit(
            semantics.float().view(self.nodes, self.nodes, -1),
            (solution.artifacts - level).float().view(self.grid, self.grid, -1),
            diagnostics,
        )

    def _unseen(self, equations: NormalEquations) -> float:
        """Share of the patches' places in the whole image that no view comes near."""
        seen = (equations.ff[:, 12] > 0).double().view(1, 1, self.nodes, self.nodes)
        near = torch.nn.functional.adaptive_max_pool2d(seen, min(self.grid, self.nodes))
        return float(1 - near.mean())

    def _start(self) -> None:
        """The first estimate: iteratively re-weighted least squares over the buffer, F on a coarser grid."""
        tokens = torch.cat([features.flatten(0, 1) for _, _, features in self._buffer])
        self._offset = tokens[:: max(1, len(tokens) // 2048)].median(0).values
        self._buffer = [(xs, ys, features - self._offset) for xs, ys, features in self._buffer]
        sketches = [(xs, ys, self._sketch(features)) for xs, ys, features in self._buffer]
        residuals = torch.stack([sketch.square().sum(-1) for _, _, sketch in sketches])
        self._spread = float(residuals.quantile(0.9))
        # Nothing is fitted yet: only tokens far beyond the content's own variety are suspect.
        self._limit = 4 * self._spread
        for nodes in 2 * [min(self.nodes, COARSE)]:
            coarse = NormalEquations(nodes, self.grid, sketches[0][2].shape[-1], self.device)
            for view, residual in zip(sketches, residuals):
                coarse.add(*view, self._weigh(residual))
            self._estimate(coarse)
            residuals = torch.stack([self._squared_residual(*view) for view in sketches])
            lower, upper = residuals.quantile(0.25), residuals.quantile(0.75)
            self._limit = float(upper + self.settings.outlier * (upper - lower)) + FLOOR * self._spread
        self._equations = NormalEquations(self.nodes, self.grid, self.channels, self.device)
        for view, (_, _, sketch), residual in zip(self._buffer, sketches, residuals):
            weights = self._weigh(residual)
            self._lost += float((1 - weights).sum())
            self._equations.add(*view, weights, sketch)
        # The penalty is on differences between nodes; this keeps it the same on the field they sample.
        finer = self.nodes / min(self.nodes, COARSE)
        self._strengths = Strengths(self._strengths.smoothness * finer**2, self._strengths.artifacts)
        self._buffer = []
        self._next = 2 * self.settings.first_views

    def _sketch(self, features: Tensor) -> Tensor:
        return features if self._mixing is None else features @ self._mixing

    def _renew(self) -> Solution:
        assert self._equations is not None
        return self._estimate(self._equations if self._mixing is None else self._equations.sketched(self._mixing))

    def _estimate(self, equations: NormalEquations) -> Solution:
        """F and G of the features' sketch, that new views are held against, and the strengths to go on with.

        The solution is returned and not kept: its factors are larger than all else that the solver holds.
        """
        try:
            factors = factorise(equations, self._strengths, self.settings.artifacts)
        except torch.linalg.LinAlgError as error:
            raise IllConditioned(
                f"the equations of {self.views} views cannot be solved ({error}); use more views, of "
                "different places and sizes"
            ) from error
        solution = solve(equations, factors)
        self._strengths = solution.strengths
        self._nodal = solution.semantics.float().view(equations.nodes, equations.nodes, -1)
        self._artifacts = solution.artifacts.float().view(self.grid, self.grid, -1)
        return solution

    def _squared_residual(self, xs: Tensor, ys: Tensor, sketch: Tensor) -> Tensor:
        return (sketch - interpolate(self._nodal, xs, ys) - self._artifacts).square().sum(-1)

    def _weigh(self, squared: Tensor) -> Tensor:
        """Token weights (K, K): 1 up to the limit, then falling with the fourth power of the residual."""
        if math.isinf(self.settings.outlier):
            return torch.ones_like(squared)
        limit = max(self._limit, 1e-30)
        return (limit / squared.clamp(min=limit)).square()


def _close(old: Strengths, new: Strengths) -> bool:
    """Whether another step is not worth its cost: factors of 2 and 1.5 change F and G little."""
    return abs(math.log(old.smoothness / new.smoothness)) < 0.7 and abs(math.log(old.artifacts / new.artifacts)) < 0.4
