"""Images without content, flat color or noise, walls beside content, and a gate that knows their tokens.

Nothing but position tells the patches of a blank image apart, so what is clean of them is known: their mean. Of a plain
wall beside something it is not much else. One linear map parts the tokens of both from those that show something.
"""

from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits, interpolate

from timm_dvt.calibration.samples import canvas
from timm_dvt.images import PHOTOGRAPHS

GATE_BLANKS, GATE_WALLS = 16, 64  # images that a gate is fitted to, beside photographs
MOST_TOKENS = 20_000  # of a kind, to fit a gate
SPARED = 0.98  # of busy patches, below a logit of 0
CERTAIN = 6.0  # the logit that 99% of the tokens of blank images have at least; the sigmoid is then 0.9975
PLAIN, BETWEEN, BUSY = range(3)
BUSY_LEAST = 0.01  # deviation of the pixels of a patch, whose values are 0 to 1
WEIGHT_DECAY = 1e-4  # keeps the weights of kinds that can be parted finite


def draw_plain(channels: int, size: tuple[int, int], grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, channels, *size) in [0, 1] for a gate, blank ones and, for RGB, walls; their kinds (n, H*W)."""
    walls = [draw_wall(size, grid, seed) for seed in range(GATE_WALLS if channels == 3 else 0)]
    images = [*(draw_blank(channels, size, seed) for seed in range(GATE_BLANKS)), *(image for image, _ in walls)]
    hidden = torch.stack([*torch.ones(GATE_BLANKS, *grid, dtype=torch.bool), *(mask for _, mask in walls)])
    return torch.stack(images), torch.where(hidden, PLAIN, BETWEEN).flatten(1)


def draw_wall(size: tuple[int, int], grid: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A photograph (3, *size) a part of which is painted over, and the patches (H, W) of the grid that this hides.

    A side of it or a box in it; one color, faint noise, or a light that falls off.
    """
    draw = torch.Generator().manual_seed(seed)
    shares, places, color = (torch.rand(count, generator=draw).tolist() for count in (2, 2, 3))
    shape, noise, light, fall = torch.rand(4, generator=draw).tolist()
    lengths = [round(side * (0.25 + 0.5 * share)) for side, share in zip(grid, shares)]
    starts = [round((side - length) * place) for side, length, place in zip(grid, lengths, places)]
    if shape < 0.6:  # all along one axis, at either end of the other
        axis = int(shape > 0.3)
        lengths[axis], starts[axis] = grid[axis], 0
        starts[1 - axis] = round(places[1 - axis]) * (grid[1 - axis] - lengths[1 - axis])
    rows, columns = (slice(start, start + max(1, length)) for start, length in zip(starts, lengths))
    hidden = torch.zeros(grid, dtype=torch.bool)
    hidden[rows, columns] = True
    wall = torch.tensor([0.3 * value + 0.7 * shares[0] for value in color]).view(3, 1, 1).expand(3, *size)
    if noise < 0.4:
        wall = wall + 0.1 * noise * torch.randn(1, *size, generator=draw)
    if light < 0.4:
        down, across = (torch.linspace(-1, 1, side) for side in size)
        wall = wall * (1 + (light - 0.2) * down[:, None] + 0.3 * (fall - 0.5) * across)
    pixels = interpolate(hidden[None, None].float(), size, mode="nearest")[0].bool()
    return torch.where(pixels, wall.clamp(0, 1), canvas(PHOTOGRAPHS[seed % len(PHOTOGRAPHS)], size, seed)), hidden


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


def busy_patches(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """In which patches of images (B, channels, h, w) in [0, 1], as the model sees them, there is something: (B, H, W)."""
    means, squares = (adaptive_avg_pool2d(x, grid) for x in (images, images.square()))
    return (squares - means.square()).mean(1).clamp(min=0).sqrt() > BUSY_LEAST


def fit_gate(tokens: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """The linear map by which tokens of patches without content are known: see `Denoiser`, `blank_gate`.

    Few tokens of many channels can always be parted: weights are fitted to the busy patches of half of the photographs,
    and those of the others tell where to part, and whether that can be done.

    Args:
        tokens: (n, N, C) of images, as the denoiser is given them.
        kinds: (n, N), what their patches show: PLAIN ones are to be known, BUSY ones are not, others may be.

    Returns:
        Weight (C,) and bias by logistic regression; None where blank images, which are PLAIN all over, are not known
        by it, or where there are none, or fewer than two images with BUSY patches.
    """
    photographs = (kinds == BUSY).any(1).nonzero()[:, 0]
    seen, unseen = (_some(tokens[some][kinds[some] == BUSY]) for some in (photographs[::2], photographs[1::2]))
    blank = _some(tokens[(kinds == PLAIN).all(1)])
    if not min(map(len, (blank, seen, unseen))):
        return None
    direction = _direction(_some(tokens[kinds == PLAIN]), seen)
    low, high = float((blank @ direction).quantile(0.01)), float((unseen @ direction).quantile(SPARED))
    if not low > high:
        return None
    stretch = max(1.0, CERTAIN / (low - high))
    return direction * stretch, -stretch * high


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
    """At most `MOST_TOKENS` of (..., C), evenly spread: (M, C) float32."""
    flat = tokens.flatten(0, -2)
    return flat[:: max(1, -(-len(flat) // MOST_TOKENS))].float()
