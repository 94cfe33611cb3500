"""Denoising packed patches: images of any aspect ratio in one batch, each patch with its row and column (NaFlex)."""

from collections import defaultdict
from collections.abc import Callable

import torch


def denoise(
    denoiser: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
    patches: torch.Tensor,
    coordinates: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Denoise each image's patch tokens on a grid of its own.

    Args:
        denoiser: of tokens (B, H*W, C) of a grid (H, W).
        patches: tokens (B, N, C), in any order.
        coordinates: (B, N, 2), row and column of each.
        valid: (B, N), False for padding, which is handed back as it is; default where no coordinate is negative.

    Raises:
        ValueError: an image's patches do not fill a grid.
    """
    valid = (coordinates >= 0).all(dim=-1) if valid is None else valid.bool()
    places: dict[tuple[int, int], list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for image, (at, there) in enumerate(zip(coordinates, valid)):
        kept = there.nonzero().flatten()
        rows, columns = (int(most) + 1 for most in at[kept].amax(dim=0))
        number = at[kept, 0] * columns + at[kept, 1]
        if len(number.unique()) != rows * columns or len(kept) != rows * columns:
            raise ValueError(
                f"{len(kept)} patch tokens do not fill a grid of {rows} x {columns} (image {image} of the batch); "
                "the denoiser needs every patch, once"
            )
        places[rows, columns].append((image, kept[number.argsort()]))
    clean = patches.clone()
    for grid, members in places.items():
        images = torch.tensor([image for image, _ in members], device=patches.device)[:, None]
        order = torch.stack([kept for _, kept in members])
        clean[images, order] = denoiser(patches[images, order], grid).to(clean.dtype)
    return clean
