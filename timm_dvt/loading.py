"""Models by their names: timm.create_model with its files checked, one error for all that fails, help with a typo."""

import difflib
import hashlib
import os
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from timm_dvt.building import checked_file, naming_config
from timm_dvt.errors import UserError, WeightsNotFoundError, first_line
from timm_dvt.registry import VARIANTS
from timm_dvt.timm_private import hf_split
from timm_dvt.weights.fetching import TIMMS_WEIGHTS_NAME, WEIGHTS_NAME, dead_network, fetch, fetch_backbone

SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")


def load_model(name: str, pretrained: bool = True, seed: int = 0, **options: Any) -> Any:
    """A model in eval mode, on the CPU.

    Args:
        name: whatever timm.create_model takes, and the `*_dvt` names of this package.
        pretrained: with its weights, from the cache, the Hub or the folder named; else random ones.
        seed: of random weights: same seed, same weights.
        options: further arguments of timm.create_model.

    Raises:
        UserError: no such model, or it cannot be made, or no weights can be had; the message says what to do.
        TypeError: its class does not take one of `options`.
    """
    check_name(name)
    try:
        scheme, _, folder = name.partition(":")
        has_config = scheme == "local-dir" and os.path.exists(os.path.join(folder, "config.json"))
        config = naming_config({"source": scheme, "file": folder} if has_config else None)
        with config, torch.random.fork_rng(devices=[]):  # a caller's own draws go on as if nothing had been loaded
            torch.default_generator.manual_seed(seed)  # the CPU's alone
            return create_model(name, pretrained, **options).eval()
    except UserError as error:
        if isinstance(error, WeightsNotFoundError) and (nearest := did_you_mean(name)):
            raise WeightsNotFoundError(f"{str(error).rstrip('.')}{nearest}") from error
        raise
    except Exception as error:  # timm, its client of the Hub, json and torch each raise their own kinds
        if options and isinstance(error, TypeError):
            raise
        ways = "a folder that holds it (local-dir:FOLDER), or take random weights (pretrained=False, --no-pretrained)"
        remedy = f"; without a network name {ways}" if pretrained else ""
        raise UserError(
            f"cannot create {name!r}: {type(error).__name__}: {first_line(error)}{remedy}{did_you_mean(name)}"
        ) from error


def load_any_size(name: str, pretrained: bool = True) -> Any:
    """`load_model`, for images of any size where its class has them."""
    try:
        return load_model(name, pretrained, dynamic_img_size=True)
    except TypeError:  # a class without that argument
        return load_model(name, pretrained)


def check_name(name: str) -> None:
    """Raise UserError for a name that `load_model` knows no model by: to be asked before anything is written."""
    if not name.startswith(SCHEMES) and not timm.is_model(name):
        raise UserError(f"{name!r} is not a model of timm's, nor one of `timm-dvt list`{did_you_mean(name)}")


def create_model(name: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm.create_model, its weights checked by their hashes; on a dead network by the cache alone, at once.

    Raises:
        WeightsNotFoundError: they cannot be had. Whatever timm raises.
    """
    on_hub, missing = name.startswith(SCHEMES[:2]), None
    if on_hub and dead_network():  # timm's client would try for long
        repo, revision = hf_split(name.partition(":")[2])
        folder = Path(fetch(repo, "config.json", revision)).parent
        try:
            folder = Path(fetch(repo, WEIGHTS_NAME, revision)).parent if pretrained else folder
        except WeightsNotFoundError:
            if not (folder / TIMMS_WEIGHTS_NAME).exists():
                raise
        name = f"local-dir:{folder}"
    elif on_hub and pretrained:
        try:
            fetch_backbone(name)  # timm, which compares no hashes, then reads what is here
        except WeightsNotFoundError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):  # its config.json may name another file
                raise
            missing = error
    elif pretrained and timm.is_model(name) and name not in VARIANTS and (file := fetch_backbone(name)):
        kwargs["pretrained_cfg_overlay"] = checked_file(file)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except EntryNotFoundError as error:
        raise missing or error from error


def did_you_mean(name: str, names: list[str] | None = None) -> str:
    """The end of a message about a name that is not known: those that are most alike; nothing for one that is.

    Args:
        names: those that there are; default timm's and the backbones of variants.
    """
    backbones = [variant.backbone for variant in VARIANTS.values()]
    names = names or [*timm.list_models(), *timm.list_pretrained(), *backbones]
    near = [] if name in names or name.startswith(SCHEMES) else difflib.get_close_matches(name, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""


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


def pick_device(name: str | None) -> torch.device:
    """A device by name; None or "auto" is this process's GPU (torchrun's LOCAL_RANK) if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("cpu")
    says = f"device must be one that torch has here, got {name!r}; cpu always works"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:  # the first sentence, of up to dozens
        raise UserError(f"{says} ({first_line(error).partition('. ')[0]})") from error
    if device.type == "meta":
        raise UserError(f"{says} (meta holds no values)")
    return device
