"""Images without content, flat color or noise, and a gate that knows their tokens from those of photographs.

Nothing but position tells the patches of such an image apart, so what is clean of them is known: their mean. They lie
so far from nearly all tokens of photographs that one linear map parts the two.
"""

from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

MOST_TOKENS = 20_000  # of either kind, to fit a gate
CERTAIN = 6.0  # logits beyond which 99% of blank and 99.9% of other tokens lie; the sigmoid is then 0.9975
WEIGHT_DECAY = 1e-4  # keeps the weights of kinds that can be parted finite


def draw_blank(channels: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """An image (channels, *size) in [0, 1]: one color, gray, or noise around one, of 1, 2 or 4 pixels, faint or strong.

    Coarser noise shows blobs, which a model takes for things.
    """
    draw = torch.Generator().manual_seed(seed)
    color, spread = torch.rand(channels, 1, 1, generator=draw), torch.rand(4, generator=draw).tolist()
    if seed % 4 == 0:
        color = color.mean().expand(channels, 1, 1)
    if seed % 2 == 0:
        return color.expand(channels, *size).clone()
    cell = 1 if spread[0] < 0.5 else 2 if spread[1] < 0.5 else 4
    cells = [-(-side // cell) for side in size]
    noise = torch.randn(1, channels if spread[2] < 0.5 else 1, *cells, generator=draw)
    noise = interpolate(noise, size=size, mode="nearest" if cell == 1 else "bilinear")[0]
    return (color + noise * 10 ** (-3 + 2.6 * spread[3])).clamp(0, 1)


def fit_gate(blank: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """The linear map by which tokens of blank images are known: see `Denoiser`, `blank_gate`.

    Args:
        blank, other: tokens (n, N, C) of n blank images and (m, M, C) of photographs, as the denoiser is given
            them.

    Returns:
        Weight (C,) and bias by logistic regression, scaled so that nearly all tokens lie beyond `CERTAIN`; None where
        the two kinds cannot be parted, or of which there is one image alone.
    """
    if min(len(blank), len(other)) < 2:
        return None
    # Few tokens of many channels can always be parted: half of the images tell whether the others are, too.
    (learned, held_out), (seen, unseen) = (kind.tensor_split(2) for kind in (blank, other))
    trial = _direction(_some(learned), _some(seen))
    if not (_some(held_out) @ trial).median() > (_some(unseen) @ trial).quantile(0.999):
        return None
    kinds = _some(blank), _some(other)
    direction = _direction(*kinds)
    low, high = float((kinds[0] @ direction).quantile(0.01)), float((kinds[1] @ direction).quantile(0.999))
    if not low > high:
        return None
    stretch = 2 * CERTAIN / (low - high)
    return direction * stretch, -stretch * (low + high) / 2


def _direction(blank: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Weights (C,) of a logistic regression between tokens (N, C) and (M, C), as many of which count alike."""
    scale = blank.square().mean().sqrt().clamp(min=1e-12)
    tokens = torch.cat([blank, other]) / scale
    wanted = torch.cat([torch.ones(len(blank)), torch.zeros(len(other))])
    balance = torch.cat([torch.full((len(kind),), 0.5 / len(kind)) for kind in (blank, other)])
    weight, bias = torch.zeros(tokens.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    solver: Any = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = binary_cross_entropy_with_logits(tokens @ weight + bias, wanted, balance, reduction="sum")
        value = value + WEIGHT_DECAY * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach() / scale


def _some(tokens: torch.Tensor) -> torch.Tensor:
    """At most `MOST_TOKENS` of (n, N, C), evenly spread: (M, C) float32."""
    flat = tokens.flatten(0, 1)
    return flat[:: -(-len(flat) // MOST_TOKENS)].float()
