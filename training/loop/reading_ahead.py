"""Whether a training's batches are read ahead, and the threads that do it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Batch = TypeVar("Batch")


def read_ahead(tasks: Iterable[Callable[[], Batch]], workers: int = 2) -> Iterator[Batch]:
    """Results of the tasks in their order, worked out by threads a few ahead of the one that is asked for.

    Without workers each is worked out when it is asked for. An error in a task is raised where its result is asked for.
    """
    if not workers:
        for task in tasks:
            yield task()
        return
    waiting: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(workers, "read-ahead", _compute_alone)
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def reading_threads(device: torch.device) -> int:
    """How many threads should read ahead of a training on that device.

    None on a CPU: where the arithmetic needs all cores, a thread that reads stops one of them, and the others wait for
    that one. It delays a step by several times what reading in between takes.
    """
    return 0 if device.type == "cpu" else 2


def _compute_alone() -> None:
    """Have torch use this thread alone: it would start as many again for each, and they would wait for each other."""
    torch.get_num_threads()  # a thread's first question sets the number that is in force elsewhere; later ones do not
    threadpool_limits(limits=1, user_api="openmp")
