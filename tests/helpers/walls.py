"""Images of which a part is a wall: without texture, as a camera or a file shows one."""

import torch

GRID, PATCH = (5, 6), (14, 16)


def wall(sigma: float = 0.0, seed: int = 0, grid=GRID, patch=PATCH) -> torch.Tensor:
    """An image (3, h, w) in [0, 1], of 8 bits: texture, but for a shaded wall of noise `sigma` (of 255) on its left."""
    draw = torch.Generator().manual_seed(seed)
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    image = torch.rand(3, height, width, generator=draw)
    columns = grid[1] // 2 * patch[1]
    shade = 0.6 - 0.2 * torch.arange(columns) / width + 0.1 * torch.arange(height)[:, None] / height
    image[:, :, :columns] = shade + sigma / 255 * torch.randn(3, height, columns, generator=draw)
    return (image.clamp(0, 1) * 255).round() / 255
