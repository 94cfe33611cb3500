"""Symmetric matrices that couple an M x M grid's near neighbors: their factor, and the roughness penalty."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Such a matrix is kept by its 25 diagonals: (M * M, 25), entry (n, 5 * (dy + 2) + dx + 2) couples node n, in
# row n // M, with the node dy rows and dx columns further on; couplings that would leave the grid are zero.


class BandedFactor:
    """Cholesky factor of such a matrix, taken as block tridiagonal with two grid rows a block."""

    def __init__(self, diagonals: Tensor, nodes: int) -> None:
        """
        Args:
            diagonals: (M * M, 25) float64.
            nodes: M, at least 4.

        Raises:
            torch.linalg.LinAlgError: the matrix is not positive definite.
        """
        self.nodes, self.block = nodes, 2 * nodes
        self._lower: list[Tensor] = []
        self._below: list[Tensor] = []
        for start in range(0, len(diagonals), self.block):
            rows = diagonals[start : start + self.block]
            strip = self._strip(rows)
            diagonal = strip[:, self.block : self.block + len(rows)]
            if self._lower:
                below = strip[:, : self.block]
                below = torch.linalg.solve_triangular(self._lower[-1], below.T, upper=False).T
                self._below.append(below)
                diagonal = diagonal - below @ below.T
            self._lower.append(torch.linalg.cholesky(diagonal))

    def forward(self, right: Tensor) -> Tensor:
        """L^-1 right, for right (M * M, any)."""
        out = torch.empty_like(right)
        for index, lower in enumerate(self._lower):
            rows = slice(index * self.block, index * self.block + len(lower))
            part = right[rows]
            if index:
                part = part - self._below[index - 1] @ out[rows.start - self.block : rows.start]
            out[rows] = torch.linalg.solve_triangular(lower, part, upper=False)
        return out

    def backward(self, right: Tensor) -> Tensor:
        """L'^-1 right, for right (M * M, any)."""
        out = torch.empty_like(right)
        for index in reversed(range(len(self._lower))):
            rows = slice(index * self.block, index * self.block + len(self._lower[index]))
            part = right[rows]
            if index + 1 < len(self._lower):
                below = self._below[index]
                part = part - below.T @ out[rows.stop : rows.stop + len(below)]
            out[rows] = torch.linalg.solve_triangular(self._lower[index].T, part, upper=True)
        return out

    def _strip(self, rows: Tensor) -> Tensor:
        """Dense (rows, ...): first the block below the diagonal, from column 0, then the diagonal block."""
        strip = rows.new_zeros(len(rows), 4 * self.block)
        diagonal = torch.arange(len(rows), device=rows.device)[:, None] + self.block
        shifts = torch.tensor([self._shift(index) for index in range(25)], device=rows.device)
        columns = (diagonal + shifts).clamp(min=0)  # clamped ones leave the grid: zeros
        return strip.scatter_add_(1, columns, rows)

    def _shift(self, index: int) -> int:
        return (index // 5 - 2) * self.nodes + index % 5 - 2


@lru_cache(maxsize=4)
def roughness_diagonals(nodes: int) -> Tensor:
    """(M * M, 25) float64: f'Rf is the sum of f_xx^2 + 2 f_xy^2 + f_yy^2, all differences of nodes."""
    first, second = _differences(nodes)
    straight, mixed = second.T @ second, first.T @ first
    bands = {}
    eye = torch.eye(nodes, dtype=torch.float64)
    for name, matrix in (("eye", eye), ("straight", straight), ("mixed", mixed)):
        padded = torch.nn.functional.pad(matrix, (2, 2))
        bands[name] = torch.stack([padded.diagonal(offset) for offset in range(5)], 1)  # (M, 5)
    product = torch.zeros(nodes, nodes, 5, 5, dtype=torch.float64)
    for weight, vertical, horizontal in (1, "straight", "eye"), (1, "eye", "straight"), (2, "mixed", "mixed"):
        product += weight * torch.einsum("yi,xj->yxij", bands[vertical], bands[horizontal])
    return product.reshape(nodes * nodes, 25)


def roughness(field: Tensor, nodes: int) -> float:
    """f'Rf of a field (M * M, C), summed over channels."""
    field = field.view(nodes, nodes, -1)
    across = field[:, 1:] - field[:, :-1]
    # One first difference serves the second differences along x and the mixed ones.
    energy = (across[:, 1:] - across[:, :-1]).norm() ** 2 + 2 * (across[1:] - across[:-1]).norm() ** 2
    return float(energy + (field[2:] + field[:-2]).sub_(field[1:-1], alpha=2).norm() ** 2)


@lru_cache(maxsize=4)
def roughness_probes(nodes: int, count: int) -> Tensor:
    """(M * M, count) float64 random vectors z with E[z z'] = R, the same at every call."""
    first, second = _differences(nodes)
    draw = torch.Generator().manual_seed(0)

    def signs(height: int, width: int) -> Tensor:
        return torch.randint(2, (count, height, width), generator=draw).double() * 2 - 1

    probes = second.T @ signs(nodes - 2, nodes) + signs(nodes, nodes - 2) @ second
    probes += 2**0.5 * first.T @ signs(nodes - 1, nodes - 1) @ first
    return probes.flatten(1).T.contiguous()


def _differences(nodes: int) -> tuple[Tensor, Tensor]:
    eye = torch.eye(nodes, dtype=torch.float64)
    return eye.diff(dim=0), eye.diff(n=2, dim=0)
