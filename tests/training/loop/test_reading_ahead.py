"""Claims about reading ahead: results keep their order, errors their place, and threads to themselves."""

import time

import pytest
import torch

from training.loop.reading_ahead import read_ahead, reading_threads


def test_reading_ahead_keeps_the_order_and_raises_where_the_error_belongs():
    def task(i):
        time.sleep(0.01 * (i % 3))
        if i == 7:
            raise ValueError("seven")
        return i

    threads = torch.get_num_threads()
    torch.set_num_threads(threads)  # from now on torch says so to every new thread
    assert set(read_ahead(torch.get_num_threads for _ in range(9))) == {1} and torch.get_num_threads() == threads
    for workers in (0, 1, 3):
        assert list(read_ahead([], workers)) == []
        found = []
        with pytest.raises(ValueError, match="seven"):
            for value in read_ahead((lambda i=i: task(i) for i in range(20)), workers):
                found.append(value)
        assert found == list(range(7))


def test_without_workers_nothing_runs_before_it_is_asked_for():
    done = []
    results = read_ahead((lambda i=i: done.append(i) or i for i in range(5)), workers=0)
    assert not done
    assert [next(results), next(results)] == [0, 1] and done == [0, 1]


def test_a_cpu_that_trains_reads_in_between():
    assert reading_threads(torch.device("cpu")) == 0 and reading_threads(torch.device("cuda")) > 0
