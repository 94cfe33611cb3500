"""Random weights of large layers out of two pools: to draw them, most of it in vain, is most of what a model takes."""

import functools
import math

import torch
from timm.layers import weight_init
from torch.nn import init

LARGE = 1 << 16
_POOL = 1_000_003  # a prime: no two rows of a matrix are the same numbers
_kaiming, _truncated = init.kaiming_uniform_, weight_init._trunc_normal_


@functools.cache
def _pool(kind: str) -> torch.Tensor:
    """A million numbers of variance 1, the same in every process."""
    drawn = torch.empty(_POOL, device="cpu", dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    return drawn.normal_(generator=generator) if kind == "normal" else drawn.uniform_(-1, 1, generator=generator)


@torch.no_grad()
def _fill(tensor: torch.Tensor, kind: str, scale: float, mean: float = 0) -> torch.Tensor:
    """The pool from a random place on, again and again."""
    flat, start, at = tensor.view(-1), 0, int(torch.randint(_POOL, (1,), device="cpu"))
    while start < len(flat):
        part = _pool(kind)[at : at + len(flat) - start]
        flat[start : start + len(part)] = part
        start, at = start + len(part), 0
    return tensor.mul_(scale).add_(mean) if mean else tensor.mul_(scale)


def _kaiming_uniform(
    tensor: torch.Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu", **more
):
    if tensor.numel() <= LARGE or more or mode != "fan_in":
        return _kaiming(tensor, a, mode, nonlinearity, **more)
    bound = init.calculate_gain(nonlinearity, a) * math.sqrt(3 / init._calculate_fan_in_and_fan_out(tensor)[0])
    return tensor if tensor.is_meta else _fill(tensor, "uniform", bound)


def _trunc_normal(tensor: torch.Tensor, mean: float, std: float, *ends: float) -> torch.Tensor:
    """On the meta device none: they take half a second a model and are nowhere. No ends are cut off large ones."""
    if tensor.is_meta:
        return tensor
    return _fill(tensor, "normal", std, mean) if tensor.numel() > LARGE else _truncated(tensor, mean, std, *ends)


def install() -> None:
    init.kaiming_uniform_, weight_init._trunc_normal_ = _kaiming_uniform, _trunc_normal
