"""Backbones by name, for the command lines: timm's, from a folder or the hub, or with random weights."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import timm_dvt  # noqa: F401  registers the *_dvt names
from timm_dvt.loading import create_model, did_you_mean
from timm_dvt.model import check_supported
from timm_dvt.saving import recorded_arguments


def load_model(name: str, *, pretrained: bool = True, seed: int = 0, **options: Any) -> nn.Module:
    """A timm model in eval mode, on the CPU.

    Args:
        name: whatever timm.create_model takes, and the `*_dvt` names of this package.
        pretrained: with its weights, from timm's cache, the hub or the folder named; else random ones.
        seed: of random weights: same seed, same weights.
        options: further arguments of the model.

    Raises:
        ValueError: no such model, or no weights to be had for it; the message says what else can be done.
    """
    torch.manual_seed(seed)
    try:
        return create_model(name, pretrained, **options).eval()
    except Exception as error:  # timm, its hub client and torch each raise their own kinds
        if not pretrained:
            raise ValueError(f"timm makes no model {name!r}: {error}{did_you_mean(name)}") from error
        raise ValueError(
            f"timm loads no model {name!r} with pretrained weights: {error}\nWithout a network, name a "
            f"folder that holds it (local-dir:FOLDER), or take random weights (--no-pretrained){did_you_mean(name)}"
        ) from error


def load_pairs_model(name: str, pretrained: bool, made_with: Mapping[str, Any], where: str) -> Any:
    """The backbone that pairs were made with, at their resolution, ready for a denoiser.

    Args:
        name, pretrained: as in `load_model`; random weights are drawn from the seed that made the pairs.
        made_with: the pairs' settings. Those of another origin may leave out what they do not know.
        where: the pairs' folder, for the errors.

    Raises:
        ValueError: no such model, or the pairs are of another one or of other weights.
        TypeError: the model cannot have a denoiser.
    """
    check_supported(load_model(name, pretrained=False, device="meta"))
    seed = made_with.get("seed", 0)
    model: Any = load_model(name, pretrained=pretrained, seed=seed, dynamic_img_size=True)
    origin = f"{where}/settings.json: the pairs were made with model {made_with.get('model')!r}"
    if "weights" in made_with:
        if made_with["weights"] != weights_digest(model):
            kind = "" if made_with.get("pretrained", True) else " with random weights (--no-pretrained)"
            raise ValueError(f"{origin}{kind}, whose weights are not those of --model {name}")
    elif "model" in made_with and made_with["model"] != name:
        raise ValueError(f"{origin}, not with --model {name}")
    if made_with.get("input_size"):
        # The position embedding stays on its own grid, to be resampled once, in forward; the config alone says for
        # images of which size the denoiser is.
        size = (model.in_chans, made_with["input_size"], made_with["input_size"])
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": size, "fixed_input_size": False}
    model.recorded_arguments = recorded_arguments(name)
    return model


def weights_digest(model: nn.Module, without: str | None = None) -> str:
    """sha256 over names, shapes, types and values of all weights, so that two checkpoints differ.

    Args:
        without: leave out weights whose names begin so.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if without is not None and name.startswith(without):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is this process's GPU (torchrun's LOCAL_RANK) if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that torch has here, got {name!r}: {error}") from error
