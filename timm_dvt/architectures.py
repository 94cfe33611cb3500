"""The architectures of denoisers: the paper's block, its ablations (Tab. 6) and the baselines that cost nothing.

To add one, add a row: building it, knowing its weights again, and what a card says follow from that.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`.

    Attributes:
        build: (channels, heads, blocks, {"device", "dtype"}) -> what maps tokens (B, H*W, C), or maps (B, C, H, W).
        owns: whether a denoiser's state dict, without what any architecture can have beside its own, is of this one. Of
            each state dict this is true of one row at the most: of new weights, no other row's may be true.
        kind: what a card says that there is of it; {s} is an s where there are several.
        pos_embed: has a learned position embedding, added to the tokens before `build`'s.
        on_maps: takes maps (B, C, H, W).
        deep: can have several blocks.
        branches: layers of each block; with their weights at zero it is the identity, as stage 2 starts it (`--start`).
        trains: has something to learn by steps; if not, stage 2 takes the mean artifact map as it is.
        identity: starts as the identity.
    """

    build: Callable[[int, int, int, dict[str, Any]], nn.Sequential]
    owns: Callable[[State], bool]
    kind: str
    pos_embed: bool = False
    on_maps: bool = False
    deep: bool = False
    branches: tuple[str, ...] = ()
    trains: bool = True
    identity: bool = False


def _blocks(dim: int, num_heads: int, depth: int, factory: dict[str, Any]) -> nn.Sequential:
    norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm asks for a class, and gives its own models a partial
    options: Any = dict(mlp_ratio=4.0, qkv_bias=True, norm_layer=norm, **factory)
    return nn.Sequential(*[Block(dim, num_heads, **options) for _ in range(depth)])


def _convolutions(size: int, dim: int, num_heads: int, depth: int, factory: dict[str, Any]) -> nn.Sequential:
    """Three convolutions with ReLUs between them, zero-padded."""
    conv = partial(nn.Conv2d, dim, dim, size, padding=size // 2, **factory)
    return nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())


def _linear(dim: int, num_heads: int, depth: int, factory: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim, **factory))


def _nothing(dim: int, num_heads: int, depth: int, factory: dict[str, Any]) -> nn.Sequential:
    return nn.Sequential()


def _layers(state: State) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of plain layers, by key; a transformer block is none, its weights lie deeper."""
    return {key: tuple(x.shape) for key, x in state.items() if re.fullmatch(r"blocks\.\d+\.weight", key)}


def _is_convolutions(size: int, state: State) -> bool:
    layers = _layers(state)
    return set(layers) == {f"blocks.{i}.weight" for i in (0, 2, 4)} and all(
        len(shape) == 4 and shape[-1] == size for shape in layers.values()
    )


_ATTENTION = "blocks.0.attn.qkv.weight"  # by which a transformer block is known
_BRANCHES = ("attn.proj", "mlp.fc2")

ARCHITECTURES = {
    # Paper, Tab. 6 d: F = block(y + PE), the denoiser of Eq. 11.
    "block": Architecture(
        _blocks,
        lambda state: "pos_embed" in state and _ATTENTION in state,
        "transformer block{s}",
        pos_embed=True,
        deep=True,
        branches=_BRANCHES,
    ),
    # Tab. 6 e.
    "block-no-pe": Architecture(
        _blocks,
        lambda state: "pos_embed" not in state and _ATTENTION in state,
        "transformer block{s} without position embedding",
        deep=True,
        branches=_BRANCHES,
    ),
    # Tab. 6 b.
    "conv1x1": Architecture(
        partial(_convolutions, 1),
        partial(_is_convolutions, 1),
        "convolution{s} of 1 x 1",
        on_maps=True,
    ),
    # Tab. 6 c.
    "conv3x3": Architecture(
        partial(_convolutions, 3),
        partial(_is_convolutions, 3),
        "convolution{s} of 3 x 3",
        on_maps=True,
    ),
    # F = y + PE: for PE = -G, the artifact field subtracted.
    "static": Architecture(
        _nothing,
        lambda state: set(state) == {"pos_embed"},
        "artifact map subtracted",
        pos_embed=True,
        trains=False,
        identity=True,
    ),
    # F = W y + b: for W = I - U U^T, the directions U of position projected out.
    "project": Architecture(
        _linear,
        lambda state: [(key, len(shape)) for key, shape in _layers(state).items()] == [("blocks.0.weight", 2)],
        "linear map{s} of each token",
        identity=True,
    ),
}


def initialize(arch: str, blocks: nn.Sequential, pos_embed: nn.Parameter | None) -> None:
    """Initialize as timm initializes a ViT, truncated normals of deviation 0.02 and zero biases, or as the identity.

    Other layers than linear ones keep what torch gives them.
    """
    identity = ARCHITECTURES[arch].identity
    if pos_embed is not None:
        nn.init.zeros_(pos_embed) if identity else trunc_normal_(pos_embed, std=0.02)
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight) if identity else trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def architecture_of(state: State) -> str:
    """The architecture of a state dict; "block" for one that is of none, whose keys then tell what is wrong."""
    return next((name for name, row in ARCHITECTURES.items() if row.owns(state)), "block")
