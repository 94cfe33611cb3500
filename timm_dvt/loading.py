"""Models by their names, for the command lines: timm.create_model with its files checked, and help with a typo."""

import difflib
from pathlib import Path
from typing import Any

import timm

from timm_dvt.building import checked_file
from timm_dvt.fetching import WEIGHTS_NAME, dead_network, fetch, fetch_backbone
from timm_dvt.registry import VARIANTS
from timm_dvt.timm_private import hf_split

SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")


def create_model(name: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm.create_model, its weights checked by their hashes; on a dead network by the cache alone, at once.

    Raises:
        WeightsNotFoundError: they cannot be had. Whatever timm raises.
    """
    if name.startswith(SCHEMES[:2]) and dead_network():  # timm's client would try for long
        repo, revision = hf_split(name.partition(":")[2])
        for filename in ("config.json", *([WEIGHTS_NAME] if pretrained else [])):
            name = f"local-dir:{Path(fetch(repo, filename, revision)).parent}"
    elif pretrained and timm.is_model(name) and name not in VARIANTS and (file := fetch_backbone(name)):
        kwargs["pretrained_cfg_overlay"] = checked_file(file)
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def did_you_mean(name: str, names: list[str] | None = None) -> str:
    """The end of a message about a name that is not known: those that are most alike; nothing for one that is.

    Args:
        names: those that there are; default timm's.
    """
    names = names or [*timm.list_models(), *timm.list_pretrained()]
    near = [] if name in names or name.startswith(SCHEMES) else difflib.get_close_matches(name, names)
    return f"; did you mean {' or '.join(near)}?" if near else ""
