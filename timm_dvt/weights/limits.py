"""What sizes a model may ask for: a config.json comes from anywhere, and must not make us allocate without end."""

import inspect
import math
from collections.abc import Callable, Mapping

from torch import nn

from timm_dvt.errors import UserError

MAX_PARAMETERS = 1 << 33  # seven times the largest ViT that timm knows
MAX_TOKENS = 1 << 18  # a patch grid of 512 x 512
MAX_TENSORS = 1 << 15  # of a file of weights: ten times a training checkpoint of timm's largest ViT

MAX_HEADER = MAX_TENSORS << 9  # bytes in which a safetensors file says what it holds: three times what so many take

# The least and the most of an argument of timm's ViTs, and of a denoiser's. What is not here makes nothing larger.
SIZES = {
    "img_size": (1, 1 << 14),
    "patch_size": (1, 1 << 10),
    "in_chans": (1, 1 << 12),
    "num_classes": (0, 1 << 20),
    "embed_dim": (1, 1 << 14),
    "depth": (1, 1 << 8),
    "num_heads": (1, 1 << 10),
    "mlp_ratio": (0.0, 64.0),
    "reg_tokens": (0, 1 << 10),
    "num_reg_tokens": (0, 1 << 10),
}
DENOISER_SIZES = {"grid_size": (1, 1 << 10), "depth": (1, 64), "num_heads": (1, 1 << 10)}
PAIRS = ("img_size", "patch_size", "grid_size")  # rows and columns, or one number for both


def check_sizes(arguments: Mapping[str, object], limits: Mapping[str, tuple] = SIZES) -> None:
    """Raise ValueError for an argument that is no number, or beyond its limits; None stands for a default."""
    for name, (least, most) in limits.items():
        value = arguments.get(name)
        if value is None:
            continue
        kinds = (int, float) if isinstance(least, float) else (int,)
        values = list(value) if name in PAIRS and isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        for number in values:
            if isinstance(number, bool) or not isinstance(number, kinds) or not least <= number <= most:
                what = "a whole number" if kinds == (int,) else "a number"
                pair = ", or two" if name in PAIRS else ""
                raise UserError(f"{name} is {str(value)[:100]!r}; it has to be {what} from {least} to {most}{pair}.")


def check_denoiser(options: object, accepted_by: Callable) -> None:
    """Raise ValueError for the `denoiser` of a config.json, or a caller, that `accepted_by` cannot take."""
    if options is None:
        return
    accepted = [name for name in inspect.signature(accepted_by).parameters if name != "model"]
    if not isinstance(options, dict) or not set(options) <= set(accepted):
        raise UserError(f"denoiser is {str(options)[:200]!r}; it has to be a dict with keys of {', '.join(accepted)}.")
    check_sizes(options, DENOISER_SIZES)
    out = options.get("pos_embed_out", False)
    if not isinstance(out, bool):
        check_sizes({"grid_size": list(out) if isinstance(out, (list, tuple)) else out}, DENOISER_SIZES)
    for name in ("pos_embed", "keep_length", "blank_gate", "flat_gate"):
        if not isinstance(options.get(name, True), bool):
            raise UserError(f"{name} is {str(options[name])[:100]!r}; it has to be True or False.")
    layers = options.get("layers")
    whole = isinstance(layers, (list, tuple)) and all(type(block) is int for block in layers)
    if layers is not None and not (whole and 0 < len(layers) <= SIZES["depth"][1]):
        raise UserError(f"layers is {str(layers)[:100]!r}; it has to be a list of one or more block numbers.")


def check_total(sketch: nn.Module) -> None:
    """Raise ValueError for a model, on the meta device, that nobody means."""
    count = sum(parameter.numel() for parameter in sketch.parameters())
    grid = getattr(getattr(sketch, "patch_embed", None), "grid_size", None) or (0, 0)
    tokens = math.prod(grid)
    if count > MAX_PARAMETERS or tokens > MAX_TOKENS:
        raise UserError(
            f"A model of {count:,} parameters for {tokens:,} patches is beyond reason (at most {MAX_PARAMETERS:,} and "
            f"{MAX_TOKENS:,}); its sizes are not meant, or its config.json is damaged."
        )
