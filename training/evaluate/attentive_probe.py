"""Classification by attentive probing: Tab. S3, after AIM (El-Nouby et al., 2024).

One learned query attends over the patch tokens; the class token is left out. The tokens pass a batch norm without
weights, then linear keys and values without bias; the pooled token is classified linearly. Only this is trained:
AdamW at 1e-3, weight decay 0.05, cosine decay, 10 epochs (the paper's), batches of 1,024. Top-1 on the validation
images. Nothing is augmented, since features are extracted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from timm_dvt.denoiser import default_num_heads
from timm_dvt.errors import UserError
from training.evaluate.features.cached import Features
from training.evaluate.probe import train
from training.evaluate.run import Run
from training.loop.schedule import cosine

KIND = "labels"
STATES = ("raw", "denoised")
NUMBERS = {"top1": "top-1"}
MEANING = "top-1: images whose class a head with attention over the patches finds, in percent."


@dataclass(frozen=True)
class Settings:
    """The paper's epochs, AIM's probe. heads: 0 for one to 64 channels."""

    epochs: int = 10
    batch_size: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 500
    heads: int = 0


SMALL = Settings(epochs=15, batch_size=64, warmup=20)


class AttentiveProbe(nn.Module):
    """Logits (B, classes) of patch tokens (B, N, C) through one learned query."""

    def __init__(self, channels: int, classes: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise UserError(f"heads must divide the {channels} channels, got {heads}")
        self.heads = heads
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(1, 1, channels) * 0.02)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.classify = nn.Linear(channels, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.query.expand(len(tokens), -1, -1), self.key(tokens), self.value(tokens))
        )
        pooled = scaled_dot_product_attention(query, key, value)
        return self.classify(pooled.transpose(1, 2).flatten(1))


def run(data: Mapping[str, Features], settings: Settings, run: Run) -> dict[str, float]:
    """top1 in percent."""
    training, val = data["train"], data["val"]
    training.extract()
    val.extract()
    heads = settings.heads or default_num_heads(training.channels)

    def loss(indices: list[int]) -> Tensor:
        labels = torch.tensor([training.split.annotation(i) for i in indices], device=run.device)
        return cross_entropy(probe(training.maps(indices, run.state).flatten(1, 2)), labels)

    torch.manual_seed(run.seed)
    probe = AttentiveProbe(training.channels, len(val.split.classes), heads).to(run.device)
    steps = settings.epochs * max(1, len(training) // settings.batch_size)
    train(probe, loss, len(training), run, settings, steps, cosine, "attentive-probe")
    right = 0
    with torch.no_grad():
        for indices, maps in val.batches(run.state, f"attentive-probe ({run.state})"):
            predicted = probe(maps.flatten(1, 2)).argmax(1).cpu()
            right += int((predicted == torch.tensor([val.split.annotation(i) for i in indices])).sum())
    return {"top1": 100 * right / len(val)}
