"""Backbones by name, for the command lines: timm's, from a folder or the hub, or with random weights."""

from collections.abc import Mapping
from typing import Any

from timm_dvt.attach import Denoised, check_supported, remove_denoiser
from timm_dvt.errors import UserError
from timm_dvt.layouts import input_size
from timm_dvt.loading import load_model, weights_digest
from timm_dvt.reading import fit_to
from timm_dvt.weights.saving import recorded_arguments

DENOISER = "denoiser."  # how the names of a denoiser's weights begin; stage 1 reads a backbone without it


def check_backbone(name: str) -> dict[str, bool]:
    """Make sure, without weights, that there is such a model and that it can have a denoiser.

    Returns:
        The arguments with which it takes images of any size, where its class has such.

    Raises:
        ValueError: no such model. TypeError: it cannot have a denoiser; the message says why.
    """
    any_size = {"dynamic_img_size": True}
    try:
        sketch = load_model(name, pretrained=False, device="meta", **any_size)
    except (ValueError, TypeError):  # its class has no such argument
        any_size = {}
        sketch = load_model(name, pretrained=False, device="meta")
    check_supported(_without_denoiser(sketch))
    return any_size


def load_backbone(name: str, pretrained: bool, seed: int) -> Any:
    """A model ready for a denoiser; one that it has is taken off. Arguments as of `load_model`, raises as above."""
    model: Any = _without_denoiser(load_model(name, pretrained=pretrained, seed=seed, **check_backbone(name)))
    model.recorded_arguments = recorded_arguments(name)
    return model


def load_pairs_model(name: str, pretrained: bool, made_with: Mapping[str, Any], where: str) -> Any:
    """The backbone that pairs were made with, ready for a denoiser.

    Args:
        name, pretrained: as in `load_model`; random weights are drawn from the seed that made the pairs.
        made_with: the pairs' settings. Those of another origin may leave out what they do not know.
        where: the pairs' folder, for the errors.

    Raises:
        ValueError: no such model, or the pairs are of another one or of other weights.
        TypeError: the model cannot have a denoiser.
    """
    model = load_backbone(name, pretrained, made_with.get("seed", 0))
    origin = f"{where}/settings.json: the pairs were made with model {made_with.get('model')!r}"
    if "weights" in made_with:
        if made_with["weights"] != weights_digest(model, without=DENOISER):
            kind = "" if made_with.get("pretrained", True) else " with random weights (--no-pretrained)"
            raise UserError(f"{origin}{kind}, whose weights are not those of --model {name}")
    elif "model" in made_with and made_with["model"] != name:
        raise UserError(f"{origin}, not with --model {name}")
    return model


def make_for(model: Any, size: int | None) -> None:
    """Let a model be for square images of this side, in place; None leaves it as it is.

    Raises:
        ValueError: it takes no images of that size.
    """
    if size is None:
        return
    if not getattr(model, "dynamic_img_size", False):
        if input_size(model) != (size, size):
            model.layout = fit_to(model, size)
        return
    # The position embedding stays on its own grid, to be resampled once, in forward; the config alone says for images
    # of which size the denoiser is.
    meant = {"input_size": (model.in_chans, size, size), "fixed_input_size": False}
    model.pretrained_cfg = {**model.pretrained_cfg, **meant}


def _without_denoiser(model: Any) -> Any:
    """A model as it is without its denoiser, under its backbone's own name."""
    return remove_denoiser(model) if isinstance(model, Denoised) else model
