"""Which of timm's model classes can have a denoiser, found out from timm's registry: `timm-dvt families`."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from timm.models import create_model, list_models, list_modules
from torch import nn

from timm_dvt.bars import tqdm
from timm_dvt.errors import UnsupportedModelError
from timm_dvt.layouts import layout_of


def families(progress: bool = False) -> dict[str, str]:
    """Why a class of timm's cannot have a denoiser, by its name; empty for those that can. Takes a minute.

    A class of which some architectures can have one, in any of timm's modules, is among those that can.

    Args:
        progress: show a bar.
    """
    reasons: dict[str, str] = {}
    for _, model in examples(progress):
        kind, reason = type(model).__name__, ""
        try:
            layout_of(model)
        except UnsupportedModelError as e:
            reason = e.reason
        reasons[kind] = reasons.get(kind, reason) and reason
    return dict(sorted(reasons.items()))


def examples(progress: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """An architecture and its model, without weights, for each class that each of timm's modules makes models of.

    It is a small one of them, as far as names tell.
    """
    for module in tqdm(list_modules(), "timm's classes", unit="module", leave=False, disable=not progress):
        source = sys.modules.get(f"timm.models.{module}")
        if source is None:  # a module of ours, or of another plug-in
            continue
        missing = {kind for kind in vars(source).values() if _makes_features(kind, source.__name__)}
        for number, name in enumerate(sorted(list_models(module=module), key=_size)):
            if number and not missing:
                break
            model = without_weights(name)
            if not number or type(model) in missing:
                yield name, model
            missing.discard(type(model))


def without_weights(name: str, **arguments) -> nn.Module:
    """A timm model on the meta device, or on the CPU where it reads values while it is made (timm's CSATv2 did)."""
    try:
        with torch.device("meta"):
            return create_model(name, **arguments)
    except NotImplementedError:
        return create_model(name, **arguments)


def _makes_features(kind: Any, module: str) -> bool:
    """Whether a name in a module of timm's is a class of models that it defines."""
    named = isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module
    return named and hasattr(kind, "forward_features") and hasattr(kind, "forward_intermediates")


def _size(name: str) -> tuple[int, str]:
    """Sorts architectures by what their names say of their size."""
    words = ("test_", "atto|femto|pico|nano|_xxs", "_xs|tiny|_ti_", "small|_s[_0-9]", "base|medium|_m[_0-9]|_b_")
    ranks = [rank for rank, word in enumerate(words) if re.search(word, name)]
    return ranks[0] if ranks else len(words), name
