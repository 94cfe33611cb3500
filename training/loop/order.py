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


def with_crops(places: list[int], first: int, count: int, crops: int, whole: float, seed: int) -> list[int]:
    """Which view of the image shall come at each place: the image's own place for the whole, + k * count for crop k.

    Args:
        places: of `positions`, from place `first` of its stream on. count: of images.
        crops: of each image, all equally likely.
        whole: the share of places at which the whole image comes.
    """
    if not crops:
        return places
    chosen = []
    for stream, place in enumerate(places, start=first):
        rng = np.random.default_rng([seed, stream])
        crop = 0 if rng.random() < whole else 1 + int(rng.integers(crops))
        chosen.append(place + crop * count)
    return chosen


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
