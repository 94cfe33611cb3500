"""Adam over a large table that only pays for the rows a step touches, and still follows dense Adam."""

import torch
from torch import Tensor


class TouchedAdam:
    """Adam for a table of which every step reads, and has gradients for, a few rows only.

    Dense Adam also moves the rows that a step did not touch: their gradient is zero, but their momentum
    carries on. (torch.optim.SparseAdam and tiny-cuda-nn's own Adam leave them where they are: another
    trajectory.) Here those moves are owed, and paid when the row is next touched or by `settle`. A row last
    touched at step s, with moments m and v, owes for the steps i = s+1 .. t

        sum_i  lr_i * (b1^(i-s) m / (1 - b1^i)) / (sqrt(b2^(i-s) v / (1 - b2^i)) + eps)

    which is m / sqrt(v) times a number that depends on s and t only, but for eps, which is held at its share
    of step s+1. So rows follow torch.optim.Adam to rounding wherever eps is small beside their gradients.

    table: (E, F) float tensor; `settle` puts the result there, steps leave it alone. max_steps: how many
    steps will be taken at most. Memory: three more tables (E, F) and E integers.
    """

    def __init__(
        self, table: Tensor, max_steps: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.table, self.betas, self.eps = table, betas, eps
        # A row's values and both its moments lie side by side, for fetching rows from all over memory is what
        # a step costs most beside its arithmetic.
        self.state = torch.zeros(len(table), 3, table.shape[1], dtype=table.dtype, device=table.device)
        self.state[:, 0] = table
        self.touched_at = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        self.steps = 0
        # By the step s a row was last touched at: what it owes by now in units of m / (sqrt(v) + floor), that
        # floor, and what is left of its first and second moments.
        self.debts = torch.zeros(max_steps + 1, 4, dtype=torch.float64, device=table.device)
        self._open_account()

    def gather(self, rows: Tensor) -> Tensor:
        """The values (U, F) that distinct rows (U,) have now, owed moves paid; `step` is for these rows."""
        debts = self.debts[: self.steps + 1].to(self.table.dtype)
        debts = debts.index_select(0, self.touched_at.index_select(0, rows))
        owed, floor, first_left, second_left = debts.split(1, dim=1)
        values, first, second = map(Tensor.contiguous, self.state.index_select(0, rows).unbind(1))
        scale = second.sqrt().add_(floor)
        values.addcmul_(torch.div(first, scale, out=scale), owed, value=-1)
        self.gathered = (rows, first.mul_(first_left), second.mul_(second_left))
        return values

    def step(self, values: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """One Adam step of the rows last gathered: values (U, F) as `gather` gave them, gradient (U, F)."""
        rows, first, second = self.gathered
        rate, floor = self._corrected(self.steps + 1, learning_rate)
        first.lerp_(gradient, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        scale = second.sqrt().add_(floor)
        self.steps += 1
        self._put(rows, torch.addcdiv(values, first, scale, value=-rate), first, second)
        # Every row owes one move more, with what is left of its moments.
        owed, _, first_left, second_left = self.debts[: self.steps].unbind(1)
        first_left.mul_(self.betas[0])
        second_left.mul_(self.betas[1])
        owed.addcdiv_(first_left, second_left.sqrt(), value=rate)
        self._open_account()

    def settle(self, chunk: int = 1 << 18) -> None:
        """Pays what every row owes: the table is then what dense Adam would have left, after any step."""
        for rows in torch.arange(len(self.table), device=self.table.device).split(chunk):
            values = self.gather(rows)
            self._put(rows, values, *self.gathered[1:])
            self.table[rows] = values

    def _corrected(self, step: int, learning_rate: float) -> tuple[float, float]:
        """(rate, floor) for Adam's update as rate * m / (sqrt(v) + floor): bias corrections folded in."""
        second = (1 - self.betas[1] ** step) ** 0.5
        return learning_rate * second / (1 - self.betas[0] ** step), self.eps * second

    def _open_account(self) -> None:
        _, floor = self._corrected(self.steps + 1, 1.0)
        self.debts[self.steps] = torch.tensor([0.0, floor, 1.0, 1.0])

    def _put(self, rows: Tensor, values: Tensor, first: Tensor, second: Tensor) -> None:
        _wide(self.state).index_copy_(0, rows, _wide(torch.stack((values, first, second), dim=1)))
        self.touched_at.index_fill_(0, rows, self.steps)


def _wide(state: Tensor) -> Tensor:
    """The same memory (E, 3 * F) as few wide elements: PyTorch copies scattered rows element by element."""
    flat = state.flatten(1)
    return flat.view(torch.complex128) if flat.shape[1] * flat.element_size() % 16 == 0 else flat
