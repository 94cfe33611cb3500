"""The normal equations of the linear stage 1: all that is kept of the views, whatever their number."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class NormalEquations:
    """Weighted normal equations of y = F(coords) + G(patch), summed view by view in float64.

    F lives on an M x M grid over the image (bilinear, node a at (a + 1/2) / M, constant beyond the outer
    nodes), G on the K x K patches. With W the bilinear weights of all tokens, S their one-hot patch indices
    and w the tokens' weights, this holds W'wW, W'wS, S'wS, W'wy, S'wy, y'wy and the sum of w. A view's W is
    the Kronecker product of one small matrix a side, because crops are axis-aligned.

    Attributes:
        ff: (M * M, 25) W'wW by its diagonals, as in training.stage1.linear.banded.
        fg: (M * M, K * K) W'wS.
        gg: (K * K,) diagonal of S'wS.
        fy, gy: (M * M, C), (K * K, C).
        yy: sum of w * |y|^2 over tokens and channels.
        weight: sum of w.
        sketch_yy: as yy, of the features' sketch.
    """

    def __init__(self, nodes: int, grid: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.nodes, self.grid, self.channels = nodes, grid, channels

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.ff = zeros(nodes**2, 25)
        self.fg = zeros(nodes**2, grid**2)
        self.gg = zeros(grid**2)
        self.fy = zeros(nodes**2, channels)
        self.gy = zeros(grid**2, channels)
        self.yy = self.sketch_yy = 0.0
        self.weight = 0.0

    def add(self, xs: Tensor, ys: Tensor, features: Tensor, weights: Tensor, sketch: Tensor | None = None) -> None:
        """Add one view.

        Args:
            xs, ys: (K,) float64 image coordinates of the patch columns and rows.
            features: (K, K, C) float32.
            weights: (K, K) token weights.
            sketch: (K, K, c), the features times the matrix that `sketched` will be called with.
        """
        grid, nodes = self.grid, self.nodes
        weights = weights.double()
        weighted = features * weights[..., None].to(features.dtype)
        self.yy += float(torch.linalg.vecdot(weighted, features).sum(dtype=torch.float64))
        self.weight += float(weights.sum())
        if sketch is not None:
            self.sketch_yy += float((sketch.square().sum(-1) * weights).sum())
        self.gg += weights.flatten()
        self.gy += weighted.flatten(0, 1)

        left, right_share = cell_of(xs, nodes)
        top, bottom_share = cell_of(ys, nodes)
        rows = torch.stack([1 - bottom_share, bottom_share])  # (2, K)
        columns = torch.stack([1 - right_share, right_share])
        corner = rows[:, None, :, None] * columns[None, :, None, :]  # (2, 2, K, K)
        base = top[:, None] * nodes + left
        step = torch.tensor([[0, 1], [nodes, nodes + 1]], device=base.device)
        node = base + step[..., None, None]  # (2, 2, K, K)
        patch = torch.arange(grid * grid, device=base.device).view(grid, grid)
        self.fg.view(-1).index_add_(0, (node * grid * grid + patch).flatten(), (corner * weights).flatten())
        offset = torch.tensor([[0, 1], [5, 6]], device=base.device)
        offset = 12 + offset - offset[..., None, None]  # (2, 2, 2, 2): from a corner to another
        entry = node[:, :, None, None] * 25 + offset[..., None, None]
        product = corner[:, :, None, None] * corner * weights
        self.ff.view(-1).index_add_(0, entry.flatten(), product.flatten())

        # Only the nodes a view touches: about half of each side.
        x_from, x_to = int(left.min()), int(left.max()) + 2
        y_from, y_to = int(top.min()), int(top.max()) + 2
        to_rows = axis_matrix(ys, nodes)[:, y_from:y_to].T.to(features.dtype)
        to_columns = axis_matrix(xs, nodes)[:, x_from:x_to].T.to(features.dtype)
        by_row = (to_rows @ weighted.flatten(1)).view(-1, grid, self.channels)
        window = self.fy.view(nodes, nodes, -1)[y_from:y_to, x_from:x_to]
        window += to_columns @ by_row

    def sketched(self, mixing: Tensor) -> NormalEquations:
        """The equations of features @ mixing, for mixing (C, c): what is of geometry alone is shared, not copied."""
        equations = copy.copy(self)
        equations.channels, equations.yy = mixing.shape[1], self.sketch_yy
        equations.fy, equations.gy = self.fy @ mixing.double(), self.gy @ mixing.double()
        return equations


def cell_of(coords: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """The cell between nodes that each coordinate lies in, and the share of the cell's far node."""
    place = (coords * nodes - 0.5).clamp(0, nodes - 1)
    cell = place.floor().clamp(max=nodes - 2)
    return cell.long(), place - cell


def axis_matrix(coords: Tensor, nodes: int) -> Tensor:
    """(len(coords), M) float64: linear interpolation from M nodes along one axis."""
    cell, share = cell_of(coords, nodes)
    matrix = torch.zeros(len(coords), nodes, dtype=torch.float64, device=coords.device)
    matrix.scatter_(1, cell[:, None], 1 - share[:, None])
    matrix.scatter_(1, cell[:, None] + 1, share[:, None])
    return matrix


def interpolate(nodal: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """A nodal field (M, M, C) at the patches of a view: (len(ys), len(xs), C), in the field's dtype."""
    nodes = len(nodal)
    (x_from, x_to), (y_from, y_to) = (
        (int(c.min()), int(c.max()) + 2) for c in (cell_of(xs, nodes)[0], cell_of(ys, nodes)[0])
    )
    window = nodal[y_from:y_to, x_from:x_to]
    rows = axis_matrix(ys, nodes)[:, y_from:y_to].to(nodal.dtype)
    columns = axis_matrix(xs, nodes)[:, x_from:x_to].to(nodal.dtype)
    by_column = columns @ window  # (y nodes, K, C)
    return (rows @ by_column.flatten(1)).view(len(ys), len(xs), -1)
