"""Saving a model as a folder that timm.create_model("local-dir:FOLDER") loads."""

import inspect
import json
import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.layers import DropPath
from timm.models import get_pretrained_cfg
from torch import nn

from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.attach import Denoised
from timm_dvt.errors import UnsupportedModelError, UserError, first_line
from timm_dvt.layouts import input_size, meant_size, unwrapping
from timm_dvt.timm_private import save_config_for_hf
from timm_dvt.variants import saved_architecture
from timm_dvt.version import __version__
from timm_dvt.weights.fetching import WEIGHTS_NAME
from timm_dvt.weights.files import Write, folder_path, write_together


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike, denoiser_only: bool = False, model_args: dict | None = None
) -> Path:
    """Write `config.json` (timm's format) and `model.safetensors`, both or neither; returns the folder.

    Args:
        model: a denoised model.
        folder: made if it does not exist.
        denoiser_only: leave the backbone's weights out (8% of the size for a ViT-B). The folder names the backbone,
            whose own published weights are fetched when timm loads it: not for a backbone that was fine-tuned, nor
            for transformers, which fetches none.
        model_args: arguments the backbone was created with beyond its image size, channels, classes and pooling
            (those are known), where timm has not recorded them itself.

    Warns where what was written will not load as this model, as of one with adapters or a head of another kind.

    Raises:
        TypeError: the model has no denoiser (timm.models.save_for_hf saves a plain one).
        ValueError: timm does not know the backbone by a name, weights are no plain tensors, or no file can hold an
            argument that the backbone was made with.
    """
    if not isinstance(model, Denoised) or model.denoiser is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no denoiser to save; timm.models.save_for_hf saves plain models."
            f"{unwrapping(model)}"
        )
    if not model.backbone_name:
        raise UserError("The model's backbone has no timm name, so nothing could rebuild it; use timm.create_model.")
    state = model.state_dict()
    if denoiser_only:
        state = {key: tensor for key, tensor in state.items() if key.startswith("denoiser.")}
    metadata = {"format": "pt", "backbone": str(model.backbone_name), "timm_dvt": __version__, **_shapes(model)}
    tensors = _apart(state)
    _check_kept(_arguments(model, model_args))
    folder = folder_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_folder(folder, tensors, metadata, lambda path: _write_config(model, path, model_args or {}))
    published = get_pretrained_cfg(model.backbone_name)
    if denoiser_only and model.num_classes not in (0, published.num_classes if published else 0):
        warnings.warn(
            f"{folder} holds no weights of the head of {model.num_classes} classes; save the model whole to keep them",
            stacklevel=2,
        )
    if problem := _problem(model, folder, tensors):
        warnings.warn(
            f"{folder} will not load as the model that was saved: {problem}. Merge adapters into the layers that they "
            "wrap, set the classes by reset_classifier, and pass what the backbone was made with as model_args",
            stacklevel=2,
        )
    return folder


def _problem(model: nn.Module, folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    """What keeps a folder's model from taking these weights; "" where nothing does."""
    try:
        sketch = timm.create_model(f"local-dir:{folder}", device="meta")
    except Exception as e:  # of timm, of whatever kind: arguments that it does not take
        return f"config.json makes no model ({first_line(e)})"
    expected = {key: tuple(value.shape) for key, value in sketch.state_dict().items()}
    denoiser_only = all(key.startswith("denoiser.") for key in tensors)
    if denoiser_only:
        expected = {key: shape for key, shape in expected.items() if key.startswith("denoiser.")}
    saved = {key: tuple(value.shape) for key, value in tensors.items()}
    others = sorted(key for key in {*expected, *saved} if expected.get(key) != saved.get(key))
    others = others or ([] if denoiser_only else _different(model, sketch))
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return f"{', '.join(others[:4])}{more} differ" if others else ""


def _different(model: nn.Module, sketch: nn.Module) -> list[str]:
    """Names of modules that compute something else with weights of the same shapes: heads, activations, epsilons.

    Of a timm before 1.0.31 config.json does not know what a model was made with.
    """
    ours, theirs = ({name: _form(module) for name, module in of.named_modules()} for of in (model, sketch))
    return [name for name in ours if name in theirs and ours[name] != theirs[name]]


def _form(module: nn.Module) -> tuple:
    """What a module computes with its weights, as far as shapes do not tell. What drops is not saved."""
    own = getattr(module, "num_heads", None), getattr(module, "eps", None)
    holds = next(module.parameters(), None) is not None or next(module.children(), None) is not None
    if holds or isinstance(module, (nn.Dropout, DropPath, nn.Identity)):
        return own
    return *own, type(module).__name__, module.extra_repr().replace("inplace=True", "")  # an activation


def _write_folder(folder: Path, tensors: dict, metadata: dict[str, str], write_config: Write) -> Path:
    """Both files of a model, so that those of two models never stand beside each other; returns the folder."""
    write_weights = partial(write_tensors, tensors, metadata=metadata)
    write_together({folder / WEIGHTS_NAME: write_weights, folder / "config.json": write_config})
    return folder


def _shapes(model: Any) -> dict[str, str]:
    """What no tensor tells: the denoisers' heads, and grids of position embeddings, 4 x 9 places or 6 x 6."""
    denoiser = next(iter(model.denoisers().values()))  # all are of one kind
    grids = {"pos_embed": denoiser.grid_size, "pos_embed_out": denoiser.out_grid_size}
    there = {key: f"{rows}x{columns}" for key, (rows, columns) in grids.items() if getattr(denoiser, key) is not None}
    return {"num_heads": str(denoiser.num_heads), **there}


def recorded_arguments(name: str) -> dict[str, Any]:
    """Arguments that a local folder's config.json gives its model, as `model_args` of `save_pretrained`.

    Older timm versions do not keep them on the model. Of any other name than local-dir:FOLDER there are none.
    """
    scheme, _, folder = name.partition(":")
    if scheme != "local-dir":
        return {}
    return json.loads((Path(folder) / "config.json").read_text()).get("model_args") or {}


def recorded_heads(said: str | None, folder: str) -> int | None:
    """A denoiser's heads by its file's metadata, or, of an older version's, by the config.json of its folder."""
    if said is not None and re.fullmatch(r"[1-9]\d{0,2}", said):
        return int(said)
    try:
        heads = json.loads(Path(folder, "config.json").read_text())["model_args"]["denoiser"]["num_heads"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return heads if type(heads) is int and 0 < heads < 1000 else None


def save_plain(model: nn.Module, folder: str | os.PathLike, name: str) -> Path:
    """Write a plain ViT, a distilled one say, as a folder that timm alone loads; returns the folder.

    Args:
        model: without a denoiser.
        folder: made if it does not exist.
        name: the model's timm name, ARCH or ARCH.TAG.
    """
    tensors, architecture = _apart(model.state_dict()), name.split(".")[0]
    _check_kept(_arguments(model))
    folder = folder_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return _write_folder(
        folder, tensors, {"format": "pt"}, lambda path: _write(model, path, architecture, _arguments(model))
    )


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as safetensors takes them: on the CPU, and each with memory of its own, where CoaT shares layers.

    Raises:
        ValueError: weights that are no plain tensors, as of a quantized model or of FSDP.
    """
    seen: set[int] = set()
    tensors = {}
    for key, tensor in state.items():
        if type(tensor) is not torch.Tensor:
            raise UserError(
                f"{key} is a {type(tensor).__name__}, no plain tensor; save a model before it is quantized, and one of "
                "FSDP after its full state dict was loaded into a model that is not sharded"
            )
        plain = tensor.detach().cpu().contiguous()
        tensors[key] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return tensors


def _write_config(model: Any, path: Path, model_args: dict) -> None:
    denoisers = model.denoisers()
    denoiser = denoisers[max(denoisers)]  # all are of one kind
    arguments = {
        **_arguments(model, model_args),
        "backbone": model.backbone_name,
        "denoiser": {
            "grid_size": list(denoiser.grid_size),
            "depth": len(denoiser.blocks) if ARCHITECTURES[denoiser.arch].deep else 1,
            "num_heads": denoiser.num_heads,
            "arch": denoiser.arch,
            "keep_length": denoiser.keep_length,
            "blank_gate": denoiser.blank_gate is not None,
            "flat_gate": denoiser.flat_below is not None,
            "pos_embed_out": denoiser.pos_embed_out is not None and list(denoiser.out_grid_size),
            **({} if list(denoisers) == [model.final_block] else {"layers": list(denoisers)}),
        },
    }
    _write(model, path, saved_architecture(model.backbone_name.split(".")[0]), arguments)


def _arguments(model: Any, more: dict | None = None) -> dict:
    """What a timm model was created with, and what it is now."""
    made_with = getattr(model, "_model_args", {})
    kept = {key: value for key, value in made_with.items() if not key.endswith("drop_rate")} | (more or {})
    takes = inspect.signature(getattr(type(model), "_backbone_class", type(model)).__init__).parameters
    now = {key: getattr(model, key, None) for key in ("in_chans", "num_classes", "global_pool", "dynamic_img_size")}
    now["img_size"] = list(input_size(model))
    known = {key: value for key, value in now.items() if isinstance(value, (int, str, list))}
    return kept | {key: value for key, value in known.items() if key in takes or key in kept}


def _check_kept(arguments: dict) -> None:
    """Raise UserError for an argument that no file can hold, such as a class."""
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(
                f"the model was made with {name}={value!r}, which no file can hold; make it with a name, as "
                "norm_layer='rmsnorm', or pass model_args"
            ) from None


def _write(model: Any, path: Path, architecture: str, arguments: dict) -> None:
    """timm's config.json of a model, under another architecture and for images of the size that it is meant for now."""
    cfg = model.pretrained_cfg
    size = [model.in_chans, *meant_size(model)]
    saved = {**cfg, "architecture": architecture, "input_size": size, "num_classes": model.num_classes}
    try:
        model.pretrained_cfg = saved
        save_config_for_hf(model, path, model_args=arguments)
    finally:
        model.pretrained_cfg = cfg
    _leave_classes_to_pretrained_cfg(path)


def write_tensors(tensors: dict, path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors, such that equal tensors and metadata make equal files.

    The library writes metadata in an order of its own each time; here they are put in order. It could write the file
    itself, but through one of a name of its own, which stays where the process is killed.
    """
    content = memoryview(safetensors.torch.save(tensors, metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8 : 8 + length]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    with open(path, "wb") as file:
        file.write(content[:8])
        file.write(ordered if len(ordered) == length else content[8 : 8 + length])
        file.write(content[8 + length :])


def _leave_classes_to_pretrained_cfg(path: Path) -> None:
    """Take `num_classes`, which a config.json has in two more places, out of its model_args.

    transformers' TimmWrapperModel makes a model without a head: it passes num_classes itself, beside the model_args.
    """
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n")
