"""What stage 1 will cost on this machine, told before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from training.common.backbone import FeatureReader


@torch.no_grad()
def seconds_of(work: Callable[[], object]) -> float:
    """How long some work takes, the second time it is done."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seconds_a_view(reader: FeatureReader, batch_size: int) -> float:
    """How long a view takes, from a timed batch."""
    views = torch.rand(batch_size, 3, reader.input_size, reader.input_size)
    return seconds_of(lambda: reader.patch_features(views)[reader.layers[-1]].sum().item()) / batch_size


def describe_cost(images: int, views: int, each: float, processes: int = 1) -> str:
    """In words, of so many images, `each` being the seconds of a view."""
    passes = images * views
    return (
        f"stage 1: {images} images x {views} views = {passes} forward passes at {each:.3g} s, "
        f"about {passes * each / processes / 60:.3g} minutes"
    )
