"""Checkpoints of a training run: one safetensors file, there whole or not at all, from which it continues exactly."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.optim import Optimizer

from timm_dvt.errors import UserError
from timm_dvt.shared_folder import write_atomically
from training.common.command import Diverged

CHECKPOINT = "checkpoint.safetensors"


class BadCheckpoint(UserError):
    """A checkpoint that cannot be continued from; names the file."""


def save_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Write what a run needs to continue after `step` steps.

    That is weights, the optimizer's moments and torch's random state; the data's order and the learning rate are
    functions of the step. Tensors alone: no pickle, so reading a checkpoint runs nothing.

    Raises:
        Diverged: a weight is not finite; the checkpoint before is left as it is.
        OutputError: a full disk, say.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise Diverged(f"weights are not finite after step {step}: {', '.join(broken[:4])}")
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    # A copy of each: safetensors refuses tensors that share memory.
    content = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    run = {"step": step}
    write_atomically(path, save(content, {"run": json.dumps({**run, "checksum": _checksum(run, content)})}))


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Put a checkpoint's state into model and optimizer; returns its step, 0 if there is no file.

    Raises:
        BadCheckpoint: the file is damaged or belongs to another model.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            run = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        known = run.pop("checksum", None)  # none in those of older versions
        if known is not None and known != _checksum(run, tensors):
            raise UserError("it is damaged, its checksum is another")
        model.load_state_dict(_below("model.", tensors))
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in _below("optimizer.", tensors).items():
            number, name = key.split(".")
            states.setdefault(int(number), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{path} cannot be continued from: {error}\nDelete it to begin this run again from its start"
        ) from error
    return run["step"]


def _checksum(run: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int:
    """The CRC-32 of all that a checkpoint holds."""
    checksum = zlib.crc32(json.dumps(run, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
