"""Backbones by name, for the command lines: timm's, from a folder or the hub, or with random weights."""

import hashlib
import os

import timm
import torch
from torch import nn

import timm_dvt  # noqa: F401  registers the *_dvt names


def load_model(name: str, *, pretrained: bool = True, seed: int = 0) -> nn.Module:
    """A timm model in eval mode, on the CPU.

    Args:
        name: whatever timm.create_model takes, and the `*_dvt` names of this package.
        pretrained: with its weights, from timm's cache, the hub or the folder named; else random ones.
        seed: of random weights: same seed, same weights.

    Raises:
        ValueError: no such model, or no weights to be had for it; the message says what else can be done.
    """
    torch.manual_seed(seed)
    try:
        return timm.create_model(name, pretrained=pretrained).eval()
    except Exception as error:  # timm, its hub client and torch each raise their own kinds
        if not pretrained:
            raise ValueError(f"timm makes no model {name!r}: {error}") from error
        raise ValueError(
            f"timm loads no model {name!r} with pretrained weights: {error}\nWithout a network, name a "
            "folder that holds it (local-dir:FOLDER), or take random weights (--no-pretrained)"
        ) from error


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes, types and values of all weights, so that two checkpoints differ."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
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
