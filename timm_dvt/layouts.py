"""How the final features of a timm model lie, found out from the model itself, and why some cannot be denoised."""

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.fx
from timm.layers import to_2tuple
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from timm_dvt.errors import UnsupportedModelError, UserError, first_line

KNOWN = (VisionTransformer, Eva)  # tokens all the way; nothing to find out, and a person's own layers are not run


@dataclass(frozen=True)
class Layout:
    """What forward_features of a model gives, and where the patches are in it.

    Attributes:
        form: "tokens", (B, prefix + H*W, C); or a map, "NCHW" (B, C, H, W) or "NHWC" (B, H, W, C).
        prefix: tokens ahead of the patches.
        channels: C.
        maps: how many maps forward_intermediates knows, by blocks or by stages; the last one is the final grid.
        grid: rows and columns at `img_size`, pixels, the model's own.
        plain: prefix and patch tokens go through all blocks together and the norm is all that follows, so a block's
            tokens, normed, are what the features would be behind it.
    """

    form: str
    prefix: int
    channels: int
    maps: int
    grid: tuple[int, int] | None
    img_size: tuple[int, int] | None
    plain: bool

    def patches(self, features: torch.Tensor, prefix: int) -> torch.Tensor:
        """The patch tokens (B, H*W, C) of final features."""
        if self.form == "NCHW":
            return features.flatten(2).transpose(1, 2)
        return features.flatten(1, 2) if self.form == "NHWC" else features[:, prefix:]

    def replaced(self, features: torch.Tensor, patches: torch.Tensor, prefix: int) -> torch.Tensor:
        """The features with other patch tokens (B, H*W, C)."""
        if self.form == "NCHW":
            return patches.transpose(1, 2).reshape(features.shape).contiguous()
        return patches.reshape(features.shape) if self.form == "NHWC" else torch.cat([features[:, :prefix], patches], 1)

    def grid_at(self, height: int, width: int, count: int | None = None) -> tuple[int, int]:
        """Rows and columns that an input of these pixels gives. Raises as `grid_of`."""
        assert self.grid is not None and self.img_size is not None
        return grid_of(height, width, count, self.img_size[0] / self.grid[0], self.img_size[1] / self.grid[1])


@torch.fx.wrap  # it cannot follow decisions on a traced size
def grid_of(height: int, width: int, count: int | None, row: float, column: float) -> tuple[int, int]:
    """Rows and columns of `count` patches of row x column pixels in an image; patches at the edge may be cut or padded.

    Raises:
        ValueError: neither gives that many patches.
    """
    cut = math.floor(height / row), math.floor(width / column)
    padded = math.ceil(height / row), math.ceil(width / column)
    for rows, columns in (cut, padded):
        if count is None or rows * columns == count:
            return rows, columns
    raise UserError(
        f"{count} patch tokens do not fill a grid of {cut[0]} x {cut[1]}; "
        "the denoiser needs every patch (is patch dropout or a mask on?)"
    )


def layout_of(model: nn.Module, size: tuple[int, int] | None = None) -> Layout:
    """How a timm model's final features lie, by running a copy of it without weights (the meta device).

    Args:
        size: rows and columns in pixels of the images to run it on; default the model's own.

    Raises:
        TypeError: it does not give patches of one grid; the message says what it gives.
    """
    known: Any = model
    if isinstance(model, KNOWN):
        embed = known.patch_embed
        grid = tuple(embed.grid_size) if embed.grid_size else None
        # Of whole patches: what a size has beyond them is cut off. Those of a hybrid are patches of a CNN's map.
        img_size = tuple(count * side for count, side in zip(grid, embed.feat_ratio(as_scalar=False))) if grid else None
        return Layout("tokens", known.num_prefix_tokens, known.embed_dim, len(known.blocks), grid, img_size, plain=True)
    # Of its class: torch.compile's, PEFT's and others' wrappers hand on whatever attribute the model inside has.
    lacking = [name for name in ("forward_features", "forward_intermediates") if not hasattr(type(model), name)]
    if lacking or not isinstance(getattr(model, "feature_info", None), list):
        refuse(model, f"it has no {' and no '.join(lacking or ['feature_info'])}")
    steps = ", ".join(str(step) for step in sorted({info["reduction"] for info in known.feature_info}))
    pyramid = f"its maps have several resolutions (a patch of {steps} pixels) and its features are not tokens"
    if "," in steps and getattr(model, "output_fmt", None) == "NHWC":
        refuse(model, pyramid)
    sketch = _without_weights(model)
    errors: list[Exception] = []
    for tried in _sizes(model) if size is None else (size,):
        images = torch.empty(2, getattr(model, "in_chans", 3), *tried, device="meta", dtype=_dtype(model))
        try:
            with torch.no_grad():
                features = sketch.forward_features(images)
                if "," in steps and getattr(features, "ndim", 0) != 3:
                    refuse(model, pyramid)
                maps = sketch.forward_intermediates(images, indices=1, intermediates_only=True)
        except UnsupportedModelError:
            raise
        except Exception as e:  # a size it does not take; anything may be raised by it
            errors.append(e)
            continue
        return _read(model, tried, features, maps)
    reason = f"{type(errors[0]).__name__}: {first_line(errors[0])}"
    refuse(model, f"it does not run on empty images of its own size ({reason})")


def layout_or_refusal(model: nn.Module, cannot: str, error: type[UserError] = UserError) -> Layout:
    """The layout that a denoised model has, or `layout_of` it.

    Raises:
        UserError: of the kind `error`, for a model that does not give patches of one grid: it says what that `cannot`.
    """
    try:
        return getattr(model, "layout", None) or layout_of(model)
    except UnsupportedModelError as e:
        raise error(
            f"A {type(model).__name__} {cannot}: {e.reason}. That takes a model whose final features are the patches "
            f"of one grid; timm-dvt families lists the classes.{unwrapping(model)}"
        ) from e


def _read(model: Any, size: tuple[int, int], features: Any, maps: Any) -> Layout:
    """The layout that outputs for two images tell."""
    last = maps[-1] if isinstance(maps, (list, tuple)) and maps else maps
    if not isinstance(last, torch.Tensor) or last.ndim != 4:
        refuse(model, f"the last of its forward_intermediates is no map (B, C, H, W) but {_shown(last)}")
    grid = (int(last.shape[2]), int(last.shape[3]))
    count = grid[0] * grid[1]
    form, prefix = None, 0
    if isinstance(features, torch.Tensor) and features.ndim == 3:
        prefix = features.shape[1] - count
        form = "tokens" if 0 <= prefix < count and prefix == getattr(model, "num_prefix_tokens", prefix) else None
    elif isinstance(features, torch.Tensor) and features.ndim == 4:
        form = "NCHW" if tuple(features.shape[2:]) == grid else "NHWC" if tuple(features.shape[1:3]) == grid else None
    if form is None:
        refuse(model, f"forward_features gives {_shown(features)}, not one token for each of {grid[0]} x {grid[1]}")
    channels = int(features.shape[1] if form == "NCHW" else features.shape[-1])
    return Layout(form, prefix, channels, len(model.feature_info), grid, size, _is_plain(model, form))


def _is_plain(model: Any, form: str) -> bool:
    """Whether the class token, if any, is there from the first block on, as timm's own prefix tokens option says."""
    takes = inspect.signature(type(model).forward_intermediates).parameters
    has_grid = hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
    same_width = getattr(model, "embed_dim", None) == model.num_features and hasattr(model, "norm")
    blocks = len(getattr(model, "blocks", ())) == len(model.feature_info)
    return form == "tokens" and "return_prefix_tokens" in takes and has_grid and same_width and blocks


def _without_weights(model: nn.Module) -> Any:
    """A copy on the meta device, in eval mode and without a person's hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    empty: dict[int, torch.Tensor] = {
        id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) for t in model.parameters()
    }
    empty |= {id(t): t.detach().to("meta") for t in tensors if id(t) not in empty}
    sketch = copy.deepcopy(model, empty).eval()
    for module in sketch.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return sketch


def input_size(model: nn.Module) -> tuple[int, int]:
    """Rows and columns in pixels of the images that a model is for now."""
    return next(_sizes(model))


def meant_size(model: Any) -> tuple[int, int]:
    """Rows and columns of the images that a model is meant for.

    A variant that takes any size is made at its backbone's own, which is not what its denoiser was trained at; its
    config says that. Any other model, and one whose size was changed, is meant for what it is made for.
    """
    size, cfg = input_size(model), getattr(model, "pretrained_cfg", None) or {}
    # timm's set_input_size changes what it keeps of the arguments too.
    made_at = getattr(model, "created_size", None) or getattr(model, "_model_args", {}).get("img_size", size)
    any_size = getattr(model, "dynamic_img_size", False) and not cfg.get("fixed_input_size", True)
    if any_size and tuple(to_2tuple(made_at)) == size:
        size = tuple(cfg["input_size"][1:])
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "strict_img_size", True) or getattr(embed, "dynamic_img_pad", True):
        return size
    rows, columns = embed.feat_ratio(as_scalar=False)  # such a model takes whole patches alone: of 384 pixels 378
    return size[0] // rows * rows, size[1] // columns * columns


def _sizes(model: Any) -> Iterator[tuple[int, int]]:
    """Input sizes, rows and columns, that the model says are its own."""
    named = [getattr(part, "img_size", None) for part in (model, *model.children())]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    named += [getattr(model, "_model_args", {}).get("img_size"), cfg.get("input_size", ())[1:], (224, 224)]
    for size in named:
        if size:
            yield (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def check_rgb(model: Any) -> None:
    """Raise ValueError for a model that takes images of other than three channels."""
    channels = getattr(model, "in_chans", 3)
    if channels != 3:
        raise UserError(f"the model takes images of {channels} channels, and these are RGB images, of 3")


def _shown(output: Any) -> str:
    return f"{tuple(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"


def unwrapping(model: nn.Module) -> str:
    """What to do with a model that wraps another (torch.compile, PEFT, DataParallel), as a sentence; else nothing."""
    if type(model).__name__ == "FeatureGetterNet":  # of timm's features_only=True
        return " It hands out maps of a model: what is done to that, its .model, is done to its maps."
    inner = {"_orig_mod": "._orig_mod", "get_base_model": ".get_base_model()", "module": ".module"}
    path = next((path for name, path in inner.items() if hasattr(model, name)), None)
    return f" It wraps a model: give the one inside, its {path}, and wrap afterwards." if path else ""


def refuse(model: nn.Module, reason: str) -> NoReturn:
    """Raise UnsupportedModelError for a model that cannot have a denoiser; its `reason` is the why alone."""
    raise UnsupportedModelError(
        "A denoiser can be added to timm's VisionTransformer (ViT, DeiT, CLIP, DINO, DINOv2, SigLIP, ...) and Eva "
        "(EVA-02, DINOv3, ...), and to every timm model whose final features are the patches of one grid (for "
        f"all: timm-dvt families), not to {type(model).__name__}: {reason}.{unwrapping(model)}",
        reason,
    )
