"""Pairs with a known clean map, as one backbone would give them: many scenes that share their artifacts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from timm_dvt.image_files import Fingerprint, Source
from training.benchmark._scenes import Regime, Scene
from training.pairs.folder import PairFolder

MODELS = {64: "test_vit", 192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}


class World:
    """The images of one synthetic backbone: what position does is the backbone's, what is shown is each image's.

    raw = F + (1 + v) G + residual (F A) * P + noise: F is each image's own; G, A and P are the same for all (in
    training/benchmark/_scenes.py every scene has its own, which one forward pass could not know); v is drawn for each
    image.
    """

    def __init__(self, regime: Regime, seed: int = 0, variation: float = 0.1) -> None:
        self.regime, self.seed, self.variation = regime, seed, variation
        self._backbone = Scene(regime, 1_000_000 + seed)

    def maps(self, image: int) -> dict[str, Tensor]:
        """raw, clean and artifacts (K, K, C) of an image."""
        regime, backbone = self.regime, self._backbone
        draw = torch.Generator().manual_seed(1000 * self.seed + image)
        clean = Scene(regime, 1000 * self.seed + image).semantics(backbone.centers, backbone.centers)
        artifacts = backbone.artifacts * (1 + self.variation * torch.randn(1, generator=draw))
        residual = regime.residual * backbone.entanglement(clean)
        noise = regime.noise * torch.randn(clean.shape, generator=draw)
        return {"raw": clean + artifacts + residual + noise, "clean": clean, "artifacts": artifacts}

    def write(self, folder: Path, count: int) -> str:
        """Write the pairs of the first `count` images as stage 1 does; returns the model to name to stage 2."""
        name = MODELS[self.regime.channels]
        layer = 5 if name == "test_vit" else 11
        grid = self.regime.grid
        settings = {
            "model": name,
            "pretrained": False,
            "seed": 0,
            "grid": grid,
            "channels": self.regime.channels,
            "layers": [layer],
            "input_size": 16 * grid,
            "stride": 16,
        }
        with PairFolder(folder, settings) as pairs:
            for image in range(count):
                digest = hashlib.sha256(f"{self.seed} {image}".encode()).hexdigest()
                source = Source(f"{image:05d}.png", folder)
                pairs.save(source, Fingerprint(digest, 0, 0), {layer: self.maps(image)}, {})
        return name
