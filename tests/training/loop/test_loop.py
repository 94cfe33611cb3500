"""Claims about the one training loop: its rates, its order, and that it goes on where it was stopped."""

import math

import pytest
import torch
from torch import nn

from training.common.command import Diverged
from training.loop.checkpoints import BadCheckpoint
from training.loop.log import TrainingLog
from training.loop.order import positions, split_places
from training.loop.run import Training, resume, run_steps
from training.loop.schedule import Schedule, stepped, straight
from training.loop.settings import Pace


def test_the_rate_rises_straight_then_falls_along_half_a_cosine_to_0():
    schedule = Schedule(steps=110, peak=3.0, warmup=10)
    assert [schedule.rate(step) for step in range(10)] == pytest.approx([0.3 * (step + 1) for step in range(10)])
    assert [schedule.rate(10 + step) for step in (0, 25, 50, 99)] == pytest.approx(
        [3.0, 1.5 + 1.5 * math.cos(math.pi / 4), 1.5, 1.5 + 1.5 * math.cos(math.pi * 0.99)]
    )


def test_an_overlapping_rise_multiplies_the_decay():
    schedule = Schedule(steps=100, peak=2.0, warmup=4, decay=straight, overlap=True)
    assert [schedule.rate(step) for step in (0, 1, 3, 50)] == pytest.approx(
        [2 * 0.25, 2 * 0.5 * 0.99, 2 * 0.97, 2 * 0.5]
    )
    drops = Schedule(steps=12, peak=1.0, decay=stepped((8 / 12, 11 / 12)), overlap=True)
    assert [drops.rate(step) for step in (7, 8, 10, 11)] == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    "given, name",
    [({"steps": -1}, "steps"), ({"peak": math.inf}, "lr"), ({"peak": -1.0}, "lr"), ({"warmup": -1}, "warmup")],
)
def test_a_schedule_that_cannot_be_names_the_setting(given, name):
    with pytest.raises(ValueError, match=name):
        Schedule(**{"steps": 5, "peak": 1.0, **given})


def test_each_sample_comes_once_an_epoch_wherever_one_starts():
    stream = positions(10, 0, 40, seed=1)
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert positions(10, 7, 23, seed=1) == stream[7:23] and positions(10, 0, 40, seed=2) != stream


def test_a_split_leaves_nothing_out_and_a_fraction_gives_one_at_least():
    training, held = split_places(20, 0.25, seed=3)
    assert sorted(training + held) == list(range(20)) and len(held) == 5
    assert len(split_places(7, 0.001, 0)[1]) == 1 and split_places(7, 0.0, 0)[1] == []


class Fit(Training):
    """A linear layer with dropout fitted to noise, so that torch's random state matters."""

    def __init__(self, checkpoint, steps=30):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 2))
        self.data = torch.randn(50, 10)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1.0)
        self.schedule = Schedule(steps, 0.05, 3)
        self.checkpoint, self.steps, self.die_at = checkpoint, steps, None
        self.validated: list[int] = []

    def loss(self, step):
        if step == self.die_at:
            raise KeyboardInterrupt
        batch = self.data[positions(50, 4 * step, 4 * step + 4, seed=0)]
        return (self.module(batch[:, :8]) - batch[:, 8:]).square().mean()

    def validate(self, step, log):
        self.validated.append(step)
        return {"val_loss": 0.0}

    def run(self, val_every=None):
        first = resume(self.checkpoint, self.module, self.optimizer)
        with TrainingLog(None, self.steps, first, batch_size=4, samples=50) as log:
            run_steps(self, log, first, self.checkpoint, Pace(checkpoint_every=7, val_every=val_every))
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


@pytest.mark.parametrize("die_at", [1, 7, 8, 20, 29])
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_was_not(tmp_path, die_at):
    whole = Fit(tmp_path / "whole").run()
    stopped = Fit(tmp_path / "stopped")
    stopped.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    torch.rand(17)  # a new process has another random state
    again = Fit(tmp_path / "stopped").run()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not torch.equal(Fit(None).module[1].weight, whole["1.weight"])  # it did learn


def test_the_last_step_is_validated_and_ten_others(tmp_path):
    fit = Fit(tmp_path / "checkpoint", steps=31)
    fit.run()
    assert fit.validated == [*range(3, 31, 3), 31]
    assert resume(tmp_path / "checkpoint", fit.module, fit.optimizer) == 31


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    fit = Fit(tmp_path / "checkpoint")
    fit.data[:] = torch.where(torch.arange(50)[:, None] == positions(50, 36, 37, seed=0)[0], math.nan, fit.data)
    with pytest.raises(Diverged, match="nan at step 10"):
        fit.run()
    assert resume(tmp_path / "checkpoint", fit.module, fit.optimizer) == 7
    assert all(bool(value.isfinite().all()) for value in fit.module.state_dict().values())


def test_one_flipped_bit_of_a_checkpoint_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "checkpoint"
    fit = Fit(path, steps=7)
    fit.run()
    whole = path.read_bytes()
    wanted, noticed = fit.module[1].weight.clone(), 0
    for place in range(0, len(whole), 53):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert resume(path, fit.module, fit.optimizer) == 7  # the bit is of what nothing hangs on
            assert torch.equal(fit.module[1].weight, wanted)
        except BadCheckpoint as error:
            noticed += 1
            assert str(path) in str(error) and "Delete it to begin this run again" in str(error)
    assert noticed >= (len(whole) - 8 - int.from_bytes(whole[:8], "little")) // 53
