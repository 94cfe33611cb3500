"""Which samples come when: pure functions of seed and place, so that a run that continues finds its place again."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def positions(count: int, first: int, last: int, seed: int) -> list[int]:
    """Which of `count` samples come at places first to last - 1 of the endless stream of shuffled epochs.

    The same on any number of processes. No sample is left out at the end of an epoch; the batch there holds the
    beginning of the next.
    """
    places: list[int] = []
    while first < last:
        epoch, start = divmod(first, count)
        taken = _shuffled(count, seed, epoch)[start : start + last - first]
        places += taken.tolist()
        first += len(taken)
    return places


def split_places(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Which of `count` samples to train on and which to validate with; above 0, a fraction gives one at least."""
    held = round(fraction * count)
    if fraction > 0:
        held = max(held, 1)
    held_out = set(_shuffled(count, seed, -1)[:held].tolist())
    return [place for place in range(count) if place not in held_out], sorted(held_out)


@lru_cache(maxsize=4)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch + 1]).permutation(count)
