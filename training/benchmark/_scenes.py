"""Synthetic stage-1 scenes whose F, G and residual are known, over the regimes a solver has to stand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.common.views import Views, patch_centers, view_axes
from training.stage1.decompose import Stage1Settings, image_views


@dataclass(frozen=True)
class Regime:
    """What one synthetic image is like; amplitudes are relative to F's root mean square.

    Attributes:
        semantics: "smooth" (a few waves across the image) or "blobby" (regions with sharp borders).
        artifacts: "none", "low" (waves across the patch grid), "high" (independent from patch to patch) or
            "border" (the outermost patches stand out, as in many real ViTs).
        artifact_size: of G.
        residual: of the part that depends on content and position together (paper Eq. 5, h).
        outliers: share of tokens replaced by a large vector of one common direction, at random places.
        outlier_size: of such a token.
        noise: standard deviation of white noise, a token and channel.
        grid: K.
        channels: C.
    """

    semantics: str = "smooth"
    artifacts: str = "low"
    artifact_size: float = 0.8
    residual: float = 0.05
    outliers: float = 0.0
    outlier_size: float = 6.0
    noise: float = 0.1
    grid: int = 14
    channels: int = 192


REGIMES: dict[str, Regime] = {
    "smooth, low": Regime(),
    "smooth, high": Regime(artifacts="high"),
    "blobby, low": Regime(semantics="blobby"),
    "blobby, high": Regime(semantics="blobby", artifacts="high"),
    "no noise": Regime(semantics="smooth", artifacts="high", noise=0.0, residual=0.0),
    "blobby, no noise": Regime(semantics="blobby", artifacts="low", noise=0.0, residual=0.0),
    "border artifacts": Regime(semantics="blobby", artifacts="border"),
    "2% outliers": Regime(semantics="blobby", artifacts="high", outliers=0.02),
    "5% outliers": Regime(semantics="smooth", artifacts="low", outliers=0.05),
    "5% large outliers": Regime(semantics="blobby", artifacts="high", outliers=0.05, outlier_size=30.0),
    "medium noise": Regime(semantics="blobby", artifacts="low", noise=0.4),
    "strong noise": Regime(semantics="smooth", artifacts="high", noise=1.0),
    "strong noise, blobby": Regime(semantics="blobby", artifacts="low", noise=1.0, outliers=0.02),
    "weak artifacts": Regime(semantics="smooth", artifacts="low", artifact_size=0.3),
    "no artifacts": Regime(semantics="blobby", artifacts="none", noise=0.4),
    "no artifacts, no noise": Regime(semantics="smooth", artifacts="none", noise=0.0, residual=0.0),
    "no artifacts, strong noise": Regime(semantics="smooth", artifacts="none", noise=1.0),
    "K 32, C 384": Regime(semantics="blobby", artifacts="low", grid=32, channels=384, outliers=0.02),
    "K 37, C 768": Regime(semantics="blobby", artifacts="high", grid=37, channels=768, outliers=0.02),
    "K 37, C 1024": Regime(semantics="smooth", artifacts="low", grid=37, channels=1024, noise=0.4),
}


class Scene:
    """One synthetic image: its fields, and the features a backbone would give for its views.

    Attributes:
        artifacts: (K, K, C) G, zero mean.
        centers: (K,) patch centers of an input.
    """

    def __init__(self, regime: Regime, seed: int = 0) -> None:
        self.regime, self.seed = regime, seed
        draw = torch.Generator().manual_seed(seed)
        channels, grid = regime.channels, regime.grid
        if regime.semantics == "smooth":
            self._waves = torch.randn(16, 2, generator=draw).double() * 2 * math.pi
            self._phases = torch.rand(16, generator=draw).double() * 2 * math.pi
            self._mix = torch.randn(16, channels, generator=draw) / math.sqrt(8)
        else:
            self._seeds = torch.rand(24, 2, generator=draw).double()
            self._mix = torch.randn(24, channels, generator=draw)
        self._direction = torch.randn(channels, generator=draw)
        self._couple = torch.randn(channels, channels, generator=draw) / math.sqrt(channels)
        self._place = torch.randn(grid, grid, channels, generator=draw)
        self.centers = patch_centers(grid * 16, 16, 16)
        self.artifacts = self._artifact_map(draw)

    def semantics(self, xs: Tensor, ys: Tensor) -> Tensor:
        """F at columns xs (K,) and rows ys (K,) of the image: (len(ys), len(xs), C) float32."""
        at = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), -1).flip(-1)
        if self.regime.semantics == "smooth":
            basis = torch.cos(at @ self._waves.T + self._phases)
        else:
            # Nearest seed wins, with a border as wide as a patch of a typical view sees it.
            distance = (at[..., None, :] - self._seeds).norm(dim=-1)
            basis = torch.softmax(-distance * 4 * self.regime.grid, -1)
        return basis.float() @ self._mix

    def entanglement(self, semantics: Tensor) -> Tensor:
        """What depends on content and position together, of features (K, K, C): (K, K, C)."""
        return (semantics @ self._couple) * self._place

    def view(self, views: Views, index: int) -> Tensor:
        """The features (K, K, C) of one view; the same whatever was asked for before."""
        xs, ys = view_axes(views[index : index + 1], self.centers)
        regime, draw = self.regime, torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + index)
        semantics = self.semantics(xs[0], ys[0])
        features = semantics + self.artifacts
        if regime.residual:
            features = features + regime.residual * self.entanglement(semantics)
        if regime.noise:
            features = features + regime.noise * torch.randn(features.shape, generator=draw)
        if regime.outliers:
            struck = torch.rand(features.shape[:2], generator=draw) < regime.outliers
            features[struck] = (
                regime.outlier_size * self._direction * (0.8 + 0.4 * torch.rand(int(struck.sum()), 1, generator=draw))
            )
        return features

    def views(self, count: int) -> Views:
        """The whole image, then random crops."""
        return image_views(Stage1Settings(views=count, seed=self.seed), (4096, 4096))

    def _artifact_map(self, draw: torch.Generator) -> Tensor:
        regime = self.regime
        grid, channels = regime.grid, regime.channels
        place = torch.stack(torch.meshgrid(self.centers, self.centers, indexing="ij"), -1).float()
        if regime.artifacts == "none":
            return torch.zeros(grid, grid, channels)
        if regime.artifacts == "low":
            waves = torch.randn(6, 2, generator=draw) * math.pi
            phases = torch.rand(6, generator=draw) * 2 * math.pi
            values = torch.cos(place @ waves.T + phases) @ torch.randn(6, channels, generator=draw)
        elif regime.artifacts == "high":
            values = torch.randn(grid, grid, channels, generator=draw)
        else:
            inner = torch.zeros(grid, grid)
            inner[1:-1, 1:-1] = 1
            values = (1 - inner)[..., None] * torch.randn(channels, generator=draw)
            values = values + 0.2 * torch.randn(grid, grid, channels, generator=draw)
        values = values - values.mean((0, 1))
        return values * (regime.artifact_size / values.square().mean().sqrt())


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """|estimate - truth| / |truth|, both (K, K, C), each channel's constant taken out of both."""
    estimate, truth = (x.double() - x.double().mean((0, 1)) for x in (estimate, truth))
    return float((estimate - truth).norm() / truth.norm())
