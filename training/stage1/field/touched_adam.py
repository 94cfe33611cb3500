"""Adam over a large table that only pays for the rows a step touches, and still follows dense Adam."""

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam


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
        self.state = _vast_zeros(len(table), 3, table.shape[1], like=table)
        self.state[:, 0] = table
        self.touched_at = torch.zeros(len(table), dtype=torch.int32, device=table.device)
        # What a step computes with, kept from step to step: to get new pages for it costs as much as the arithmetic.
        self.room = table.new_empty(0)
        self.steps = 0
        # By the step s a row was last touched at: what it owes by now in units of m / (sqrt(v) + floor), that
        # floor, and what is left of its first and second moments.
        self.debts = torch.zeros(max_steps + 1, 4, dtype=torch.float64, device=table.device)
        self._open_account()

    def gather(self, rows: Tensor) -> Tensor:
        """The values (U, F) that distinct rows (U,) have now, owed moves paid.

        They are there until the next call; `step` is for these rows.
        """
        debts = self.debts[: self.steps + 1].to(self.table.dtype)
        debts = debts.index_select(0, self.touched_at.index_select(0, rows))
        owed, floor, first_left, second_left = debts.split(1, dim=1)
        state, values, first, second, scale = self._working_room(len(rows))
        torch.index_select(self.state, 0, rows, out=state)
        old_values, old_first, old_second = state.unbind(1)
        # Not below the least number: roots of zero, which most moments are at first, take long.
        torch.clamp_min(old_second, torch.finfo(scale.dtype).tiny, out=scale).sqrt_().add_(floor)
        torch.addcmul(old_values, torch.div(old_first, scale, out=scale), owed, value=-1, out=values)
        torch.mul(old_first, first_left, out=first)
        torch.mul(old_second, second_left, out=second)
        self.gathered = (rows, state, values, first, second)
        return values

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """One Adam step of the rows last gathered, whose gradient (U, F) this is."""
        _, _, values, first, second = self.gathered
        done = torch.tensor(float(self.steps), device=values.device)  # adam counts it up
        adam(
            [values], [gradient], [first], [second], [], [done], fused=values.device.type in ("cpu", "cuda"),
            lr=learning_rate, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps, weight_decay=0, amsgrad=False,
            maximize=False,
        )
        self.steps += 1
        self._put()
        # Every row owes one move more, with what is left of its moments.
        rate = learning_rate * self._second_correction() / (1 - self.betas[0] ** self.steps)
        owed, _, first_left, second_left = self.debts[: self.steps].unbind(1)
        first_left.mul_(self.betas[0])
        second_left.mul_(self.betas[1])
        owed.addcdiv_(first_left, second_left.sqrt(), value=rate)
        self._open_account()

    def settle(self, chunk: int = 1 << 18) -> None:
        """Pays what every row owes: the table is then what dense Adam would have left, after any step."""
        for rows in torch.arange(len(self.table), device=self.table.device).split(chunk):
            self.table[rows] = self.gather(rows)
            self._put()

    def _second_correction(self, ahead: int = 0) -> float:
        """Root of Adam's bias correction of the second moments, so many steps ahead of the last."""
        return (1 - self.betas[1] ** (self.steps + ahead)) ** 0.5

    def _open_account(self) -> None:
        floor = self.eps * self._second_correction(ahead=1)
        self.debts[self.steps] = torch.tensor([0.0, floor, 1.0, 1.0])

    def _working_room(self, count: int) -> tuple[Tensor, ...]:
        """For `count` rows: state as it is stored (U, 3, F), and four tables (U, F)."""
        features = self.table.shape[1]
        size = 7 * count * features
        if len(self.room) < size:
            self.room = self.table.new_empty(size + size // 8)
        room = self.room[:size].view(7, count, features)
        return room[:3].view(count, 3, features), *room[3:].unbind(0)

    def _put(self) -> None:
        """Stores the rows last gathered as they are now."""
        rows, state, *parts = self.gathered
        for one, packed in zip(parts, state.unbind(1), strict=True):
            packed.copy_(one)
        _wide(self.state).index_copy_(0, rows, _wide(state))
        self.touched_at.index_fill_(0, rows, self.steps)


def _vast_zeros(*shape: int, like: Tensor) -> Tensor:
    """Zeros of that type and place. On a CPU by NumPy, which asks for huge pages: rows all over it are found faster."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    return torch.from_numpy(np.zeros(shape, like.numpy().dtype))


def _wide(state: Tensor) -> Tensor:
    """The same memory (E, 3 * F) as few wide elements: PyTorch copies scattered rows element by element."""
    flat = state.flatten(1)
    return flat.view(torch.complex128) if flat.shape[1] * flat.element_size() % 16 == 0 else flat
