"""Reading files of weights, published ones and our own, and comparing what they hold with a model."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from timm_dvt.errors import UserError, first_line, printable
from timm_dvt.variants import ROWS
from timm_dvt.weights.fetching import weights_file_of
from timm_dvt.weights.limits import MAX_HEADER, MAX_TENSORS
from timm_dvt.weights.pickles import DTYPES, RefusedError, read_pickle
from timm_dvt.weights.saving import recorded_heads

State = dict[str, torch.Tensor]
Grid = tuple[int, int]


class CheckpointError(UserError, RuntimeError):
    """A file that cannot be loaded: damaged, not a checkpoint, or made for another model. Names the file."""

    def __init__(self, message: str):
        super().__init__(printable(message))  # in which names are that come from the file


class ConfigError(CheckpointError, TypeError):
    """A config.json that no model can be made by. Names the file; what is wrong with an argument in it is its cause.

    It stays what timm and torch raise for wrong arguments, as these may also be the caller's.
    """


@dataclass
class Checkpoint:
    """What a file holds: a ViT's state dict, a denoiser's (keys as in `Denoiser` or `LayerDenoisers`), or both."""

    path: str
    backbone: State = field(default_factory=dict)
    denoiser: State = field(default_factory=dict)
    made_for: str | None = None  # the backbone's name, where the file or its name says so
    grids: dict[str, Grid] = field(default_factory=dict)  # of the denoiser's embeddings by key, where the file says so
    num_heads: int | None = None  # of the denoiser, where the file says so, or the config.json beside it


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a published `.pth` (denoiser of one or n blocks, without PE, distilled; old keys too) or our safetensors.

    Nothing in the file is executed (`timm_dvt.weights.pickles`), and nothing of it is mapped: it may change meanwhile.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"a {type(path).__name__}: name a file or a folder; tensors go into load_state_dict.")
    folder = str(path).removeprefix("local-dir:")
    path = weights_file_of(folder) if os.path.isdir(folder) else folder
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such file.")
    try:
        metadata, content = _read_safetensors(path) if path.endswith(".safetensors") else ({}, read_pickle(path))
    except RefusedError as e:
        raise CheckpointError(
            f"{path}: refused. It is damaged, or a pickle that holds more than tensors; such a file could run code "
            f"when read, so it is never opened any other way. (It holds {first_line(e)}.)"
        ) from e
    except Exception as e:  # a damaged archive can raise anything from zipfile, torch or safetensors
        raise CheckpointError(f"{path}: damaged, incomplete or not a checkpoint. ({first_line(e)})") from e
    stem = Path(path).stem
    named = stem if stem in {row.backbone for row in ROWS} else None
    # A file of ours says what grids the embeddings are of, as "4x9".
    sides = {key: re.fullmatch(r"(\d{1,4})x(\d{1,4})", metadata.get(key, "")) for key in ("pos_embed", "pos_embed_out")}
    grids = {key: (int(match[1]), int(match[2])) for key, match in sides.items() if match}
    heads = recorded_heads(metadata.get("num_heads"), folder)
    return Checkpoint(path, *_split(_unwrap(content, path), path), metadata.get("backbone") or named, grids, heads)


def _read_safetensors(path: str) -> tuple[dict, State]:
    """Metadata and tensors of a file. Raises ValueError for more than any model has, SafetensorError for others."""
    content = Path(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) if length <= MAX_HEADER else {}  # a longer one takes seconds to read
    if length > MAX_HEADER or len(header) > MAX_TENSORS:
        raise UserError(f"{len(header) or f'{length} bytes of names of'} tensors, which no model has")
    return header.get("__metadata__") or {}, safetensors.torch.load(content)


def from_state_dict(state: State, path: str = "state_dict") -> Checkpoint:
    """A checkpoint from a state dict in memory, in any of the layouts."""
    return Checkpoint(path, *_split(_unwrap(state, path), path))


# What training scripts call it; timm's order, by which averaged weights come first.
HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model", "denoiser")


def _unwrap(content: object, path: str) -> State:
    """The state dict inside a training checkpoint, the authors' or timm's."""
    for key in HOLDERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict.")
    strange = [str(k) for k, v in content.items() if not isinstance(k, str) or not isinstance(v, torch.Tensor)]
    if strange:
        raise CheckpointError(
            f"{path}: no state dict under {', '.join(HOLDERS)}, and these entries are no tensors: {some(strange)}."
        )
    if others := [f"{key} of {odd}" for key, tensor in content.items() if (odd := _oddity(tensor))]:
        raise CheckpointError(f"{path}: no plain tensors of numbers as weights are: {some(others)}.")
    return content


def _oddity(tensor: torch.Tensor) -> str:
    """What makes a tensor none of plain numbers; empty for one that is."""
    if tensor.is_meta or tensor.dtype not in DTYPES.values():
        return "no memory" if tensor.is_meta else str(tensor.dtype)
    return "" if tensor.layout == torch.strided and not tensor.is_nested else str(tensor.layout)


def _renamed(state: State, rename: Callable[[str], str], path: str) -> State:
    """The same under other keys. Raises CheckpointError where two would be one."""
    new = {rename(key): tensor for key, tensor in state.items()}
    if len(new) < len(state):
        twice = [key for key, count in Counter(map(rename, state)).items() if count > 1]
        raise CheckpointError(f"{path}: holds these twice, under two names each: {some(twice)}.")
    return new


def _split(state: State, path: str) -> tuple[State, State]:
    """Backbone and denoiser of a state dict, its keys as our models name them."""
    state = _renamed(state, lambda key: key.removeprefix("module."), path)
    if all(key.startswith("model.") for key in state):  # distilled
        return _renamed(state, lambda key: key.removeprefix("model."), path), {}
    ours = any(re.match(r"denoiser\.(layers\.\d|blocks\.\d|pos_embed$)", key) for key in state)
    published = not ours and any(key.startswith("denoiser.") for key in state)
    if published:  # a published denoiser comes alone: what is beside it is unexpected
        return {}, _renamed(state, _ours, path)
    denoiser = {key.removeprefix("denoiser."): t for key, t in state.items() if key.startswith("denoiser.")}
    return {key: tensor for key, tensor in state.items() if not key.startswith("denoiser.")}, denoiser


def _ours(key: str) -> str:
    """Our name of a published denoiser's key: denoiser.norm1 is of the only block, denoiser.1.norm1 of the second."""
    name = key.removeprefix("denoiser.")
    return name if name == key else f"blocks.{name}" if re.match(r"\d+\.", name) else f"blocks.0.{name}"


def check_state(
    model: nn.Module,
    state: State,
    path: str,
    prefix: str = "",
    optional: Iterable[str] = (),
    adapts: Iterable[str] = (),
) -> None:
    """Compare a state dict with a model before anything is loaded.

    Args:
        optional: keys that may be missing, or too many. adapts: keys that timm brings to another shape itself.

    Raises:
        CheckpointError: names the file and the keys that are missing, unexpected or of a wrong shape.
    """
    wanted = model.state_dict()
    whole = {key for key, tensor in wanted.items() if not tensor.is_floating_point()}  # a batch norm's counter
    missing = [prefix + key for key in wanted if key not in state and key not in optional]
    unexpected = [prefix + key for key in state if key not in wanted and key not in optional]
    shapes = [
        f"{prefix}{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and key not in adapts and key not in optional and state[key].shape != wanted[key].shape
    ]
    strange = [f"{prefix}{key} of {x.dtype}" for key, x in state.items() if x.is_floating_point() == (key in whole)]
    mismatches = {
        "missing keys": missing,
        "unexpected keys": unexpected,
        "wrong shapes": shapes,
        "numbers of another kind than the model's": strange,
    }
    problems = [f"{what}: {some(keys)}" for what, keys in mismatches.items() if keys]
    if problems:
        raise CheckpointError(f"{path}: not weights for this model; nothing was loaded. {'; '.join(problems)}.")


def some(keys: Iterable[str]) -> str:
    """The first of many keys, in words."""
    names = [str(key)[:200] for key in keys]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
