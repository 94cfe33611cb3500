"""All that this package takes from timm's private modules, and why; everything else is public in timm 1.0.26.

Each is looked up when the package is imported, so that a timm which has moved one is told by its name.
"""

from importlib import import_module
from typing import Any

WHY = {
    "timm.models._features.feature_take_indices": "which blocks `indices` of forward_intermediates means",
    "timm.models._hub.save_config_for_hf": "config.json alone, beside weights that are written whole or not at all",
    "timm.models._hub._get_safe_alternatives": "the safetensors that timm would fetch in place of a backbone's pickle",
    "timm.models._hub.hf_hub_download": "one place through which both timm's and our fetches of the Hub go",
    "timm.models._hub.download_cached_file": "files at a URL, in timm's cache",
    "timm.models._hub.hf_split": "repo and revision in timm's `hf-hub:` names",
    "timm.models._registry._model_entrypoints": "a tag of ours, ARCH.TAG_dvt, is built by ARCH's own entrypoint",
    "timm.models._registry._model_to_module": "list_models(module=...) of architectures entered at run time",
    "timm.models._registry._module_to_models": "the same, the other way round",
    "timm.models._registry._model_with_tags": "list_models(include_tags=True)",
    "timm.models._registry._model_pretrained_cfgs": "get_pretrained_cfg of a variant beside timm's own",
    "timm.models._registry._model_default_cfgs": "the config of an architecture named without a tag",
    "timm.models._registry._model_has_pretrained": "list_pretrained()",
}


def look_up(name: str) -> Any:
    """What timm has by this full name. Raises ImportError with the name and what it is needed for."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ImportError(f"This timm has no {name}, which timm_dvt needs for: {WHY[name]}.") from e


_privates = {name.rpartition(".")[2]: look_up(name) for name in WHY}

feature_take_indices = _privates["feature_take_indices"]
save_config_for_hf = _privates["save_config_for_hf"]
get_safe_alternatives = _privates["_get_safe_alternatives"]
hf_hub_download = _privates["hf_hub_download"]
download_cached_file = _privates["download_cached_file"]
hf_split = _privates["hf_split"]
model_entrypoints: dict = _privates["_model_entrypoints"]
model_to_module: dict = _privates["_model_to_module"]
module_to_models: dict = _privates["_module_to_models"]
model_with_tags: dict = _privates["_model_with_tags"]
model_pretrained_cfgs: dict = _privates["_model_pretrained_cfgs"]
model_default_cfgs: dict = _privates["_model_default_cfgs"]
model_has_pretrained: set = _privates["_model_has_pretrained"]
