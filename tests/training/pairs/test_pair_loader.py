"""Claims about how training reads pairs: in the order that the seed decides, ahead of time, from memory or disk."""

import time

import pytest
import torch

from tests.helpers.pair_folders import write_pairs
from training.loop.order import positions
from training.pairs.reader import PairReader, open_pairs, read_batches


def test_every_epoch_visits_every_pair_once_in_another_order_that_step_and_seed_decide():
    whole = positions(10, 0, 30, seed=3)
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and positions(10, 0, 30, seed=4) != whole
    assert sum((positions(10, first, first + 3, 3) for first in range(0, 30, 3)), []) == whole


def test_pairs_kept_in_memory_are_those_on_disk(tmp_path):
    found = open_pairs(write_pairs(tmp_path))
    kept, read = PairReader(found), PairReader(found, cache_bytes=0)
    for _ in range(2):
        assert torch.equal(kept.read([3, 1, 3]), read.read([3, 1, 3]))
    assert len(kept._kept) == 2 and not read._kept


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_stays_as_it_is_until_the_next_is_asked_for(tmp_path, workers):
    reader = PairReader(open_pairs(write_pairs(tmp_path)), cache_bytes=0)
    count = len(reader.pairs.files)
    steps = range(3, 20)

    def places(step):
        return positions(count, 2 * step, 2 * step + 2, seed=1)

    seen = 0
    for step, batch in zip(steps, read_batches(reader, places, steps, torch.float32, workers), strict=True):
        time.sleep(0.02)
        assert batch.dtype == torch.float32
        assert torch.equal(batch, reader.read(places(step)).float())
        seen += 1
    assert seen == len(steps)


def test_no_steps_are_no_batches(tmp_path):
    reader = PairReader(open_pairs(write_pairs(tmp_path)))
    assert list(read_batches(reader, lambda step: [0], range(0), torch.float32)) == []
