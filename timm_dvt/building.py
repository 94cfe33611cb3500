"""How a variant is put together: timm's backbone and its weights, the denoiser and its weights."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_pretrained_cfg,
    load_pretrained,
    model_entrypoint,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_dvt.attach import add_denoiser, attach_denoiser, behind_pool, check_supported, new_denoisers, norms_after_pool
from timm_dvt.errors import UserError, WeightsNotFoundError, first_line
from timm_dvt.layouts import Layout, input_size, layout_of
from timm_dvt.variants import Variant, saved_architecture
from timm_dvt.weights.checkpoints import (
    Checkpoint,
    CheckpointError,
    ConfigError,
    check_state,
    from_state_dict,
    read_checkpoint,
)
from timm_dvt.weights.denoisers import denoiser_for
from timm_dvt.weights.fetching import backbone_files, explain, fetch_backbone, hub_file, is_fetch_error, locate
from timm_dvt.weights.limits import check_denoiser, check_sizes, check_total

ADAPTED = ("pos_embed", "relative_position_bias_table")  # what timm brings to another input size itself


@contextmanager
def naming_config(cfg: PretrainedCfg | dict | str | None) -> Iterator[None]:
    """Raise ConfigError for whatever goes wrong with a model that the config.json of a folder or hub repo describes."""
    entries = cfg if isinstance(cfg, dict) else {}
    try:
        yield
    except (CheckpointError, WeightsNotFoundError, MemoryError):
        raise
    except Exception as e:  # entries of any type and size end in any kind of error, ours or timm's or torch's
        where = {"local-dir": entries.get("file"), "hf-hub": entries.get("hf_hub_id")}.get(str(entries.get("source")))
        if where is None:
            raise
        what = str(e) if isinstance(e, (ValueError, TypeError)) else f"{type(e).__name__}: {first_line(e)}"
        raise ConfigError(f"{where}/config.json makes no model: {what[:1000]}") from e


def create(
    variant: Variant,
    pretrained: bool = False,
    pretrained_cfg: PretrainedCfg | dict | str | None = None,
    pretrained_cfg_overlay: dict | None = None,
    cache_dir: str | os.PathLike | None = None,
    pretrained_model_args: dict | None = None,
    denoiser: dict | None = None,
    features_only: bool = False,
    **kwargs,
) -> nn.Module:
    """Build a variant: timm's backbone, its weights, the denoiser, its weights; what timm.create_model ends in.

    Args:
        denoiser: arguments of `add_denoiser`: grid_size, depth, num_heads, pos_embed, arch, layers, keep_length,
            pos_embed_out, blank_gate, flat_gate.
        kwargs: arguments of timm's model, as for the backbone.
    """
    if runtime := sorted({"device", "dtype"} & (pretrained_model_args or {}).keys()):
        raise UserError(f"model_args holds {' and '.join(runtime)}, which no saved model has")
    if pretrained and torch.device(kwargs.get("device") or torch.get_default_device()).type == "meta":
        raise UserError("device is 'meta', where nothing holds weights; leave pretrained=True out for a sketch")
    given: Any = get_pretrained_cfg(variant.name) if isinstance(pretrained_cfg, str | None) else pretrained_cfg
    cfg = resolve_pretrained_cfg(f"{variant.architecture}_dvt", given, pretrained_cfg_overlay).to_dict()
    wrapper = {key: kwargs.pop(key) for key in ("out_indices", "feature_cls") if key in kwargs}
    accepted = accepts(variant.architecture)
    if "in_chans" in accepted:
        kwargs.setdefault("in_chans", cfg["input_size"][0])
    for key in ("num_classes", "global_pool"):
        if cfg.get(key) is not None and key in accepted:
            kwargs.setdefault(key, cfg[key])
    if "dynamic_img_size" in accepted:
        kwargs.setdefault("dynamic_img_size", True)
    check_sizes(kwargs)
    at_its_own = "img_size" in accepted and _choose_img_size(variant, cfg, kwargs)
    check_sizes(kwargs)
    check_denoiser(denoiser, add_denoiser)
    sketch = _sketch(variant, cfg, kwargs)

    checkpoint = _read_source(cfg, variant, cache_dir) if pretrained else None
    cfg.pop("state_dict", None)
    if at_its_own and checkpoint is not None and "pos_embed" in checkpoint.backbone:
        # A whole ViT may bring a position embedding of the denoiser's resolution: then that is its own.
        other = {**kwargs, "img_size": cfg["input_size"][1:]}
        wanted = checkpoint.backbone["pos_embed"].shape
        if _position_shape(sketch) != wanted and _position_shape(_sketch(variant, cfg, other)) == wanted:
            kwargs, sketch = other, _sketch(variant, cfg, other)
    if checkpoint is not None and (checkpoint.backbone or variant.distilled):  # before anything large is allocated
        _check_backbone(sketch, checkpoint, cfg)
    loaded, layout, options = None, None, {}
    if not variant.distilled:
        layout = check_supported(sketch)
        options = _denoiser_options(variant, layout, cfg, kwargs, denoiser)
    if layout is not None and checkpoint is not None:  # a bad file is found out before the backbone is fetched
        grid, heads = tuple(to_2tuple(options["grid_size"])), options.get("num_heads")
        out = options.get("pos_embed_out")
        out = None if out is None or isinstance(out, bool) else tuple(to_2tuple(out))
        loaded = denoiser_for(checkpoint, layout.channels, grid, heads, variant.backbone, layout.maps, out)
    model: Any = _backbone(variant, cfg, checkpoint, cache_dir, kwargs)
    if layout is not None:
        attach_denoiser(model, new_denoisers(model, layout, **options) if loaded is None else loaded, layout)
        model.backbone_name = variant.backbone
        # What embeds patches is a child of any name; it says where a model takes images of one size.
        if model.layout.grid and any(getattr(part, "strict_img_size", False) for part in model.children()):
            model.denoiser.fix_grid(model.layout.grid)
        # What timm.models.save_for_hf writes must name an architecture that builds this model.
        cfg["architecture"] = saved_architecture(variant.architecture)
    # What saving needs to know; newer timm versions record it themselves.
    model._model_args = {key: value for key, value in kwargs.items() if key not in ("device", "dtype")}
    model.created_size = input_size(model)
    # timm's builder, handed the finished model, does for it what it does for its own: config, traits, features_only.
    return build_model_with_cfg(
        lambda **_: model,
        cfg["architecture"],
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        features_only=features_only,
        **wrapper,
        **{key: kwargs[key] for key in ("img_size", "dynamic_img_size", "in_chans", "num_classes") if key in kwargs},
    )


def _sketch(variant: Variant, cfg: dict, kwargs: dict) -> nn.Module:
    """timm's model on the meta device. Raises ValueError for one that nobody means."""
    sketch = _timms(variant)(pretrained=False, pretrained_cfg=cfg, **{**kwargs, "device": "meta"})
    check_total(sketch)
    return sketch


def _position_shape(model: Any) -> tuple | None:
    position = getattr(model, "pos_embed", None)
    return None if position is None else position.shape


def _choose_img_size(variant: Variant, cfg: dict, kwargs: dict) -> bool:
    """Set `img_size` where the caller does not, and `input_size` of the config, by which images are prepared.

    Returns whether the model is made at its backbone's own size without having been told to.

    The authors make a backbone at its own size and have its position embedding resampled in forward, once, from its
    own grid to the image's. Made at the denoiser's resolution it would be resampled on loading and, for images of
    another size, in forward again. So a model that takes any size is made at its backbone's own, though it is meant
    for images of the denoiser's resolution.
    """
    backbone_cfg = get_pretrained_cfg(variant.backbone)
    resolution = (variant.resolution, variant.resolution)
    native = tuple(backbone_cfg.input_size[1:]) if backbone_cfg else resolution
    if kwargs.get("img_size") is None:
        meant = tuple(cfg["input_size"][1:])
        at_its_own = bool(kwargs.get("dynamic_img_size")) and meant == resolution
        kwargs["img_size"] = native if at_its_own else meant
        return at_its_own
    if to_2tuple(kwargs["img_size"]) != native:
        cfg["input_size"] = (kwargs.get("in_chans", 3), *to_2tuple(kwargs["img_size"]))
    return False


def _read_source(cfg: dict, variant: Variant, cache_dir: str | os.PathLike | None) -> Checkpoint:
    """The checkpoint a pretrained_cfg names: a state dict, a file, a folder, or a file of the Hub."""
    if cfg.get("state_dict"):
        return from_state_dict(cfg["state_dict"])
    whole = variant.distilled or not cfg.get("hf_hub_filename")
    return read_checkpoint(locate(cfg, variant.backbone, whole, cache_dir))


def _backbone(variant: Variant, cfg: dict, checkpoint: Checkpoint | None, cache_dir, kwargs: dict) -> nn.Module:
    """timm's model: with random weights, with those of the checkpoint, or with the backbone's own from its hub repo."""
    build = _timms(variant)
    if checkpoint is None:
        return build(pretrained=False, pretrained_cfg=cfg, **kwargs)
    if checkpoint.backbone or variant.distilled:
        model = build(pretrained=False, pretrained_cfg=cfg, **kwargs)
        _load_backbone(model, checkpoint, cfg)
        return model
    own = {key: value for key, value in kwargs.items() if key != "global_pool"}
    if own != kwargs and [norms_after_pool(_sketch(variant, cfg, given)) for given in (kwargs, own)] == [True, False]:
        # timm would leave out what the final norm has learned.
        model = build(pretrained=False, pretrained_cfg=cfg, **kwargs)
        model.load_state_dict(behind_pool(_backbone(variant, cfg, checkpoint, cache_dir, own).state_dict()))
        return model
    tag = split_model_name_tag(variant.backbone)[1]
    build = model_entrypoint(variant.architecture)  # routed: the tag may be a backbone's of ours
    weights_file = hub_file(cfg)
    needed = [*([weights_file] if weights_file else []), *backbone_files(variant.backbone)[:1]]
    file = fetch_backbone(variant.backbone, cache_dir, needed)
    overlay = {"pretrained_cfg_overlay": checked_file(file)} if file else {}
    try:
        return build(pretrained=True, pretrained_cfg=tag or None, cache_dir=cache_dir, **overlay, **kwargs)
    except WeightsNotFoundError:
        raise
    except Exception as e:  # the network's, of a file that is not on the Hub; or of one that is damaged
        if is_fetch_error(e):
            reason = explain(e, variant.backbone)
            raise WeightsNotFoundError(f"Could not fetch the weights of {variant.backbone}: {reason}") from e
        what = f"The weights of {variant.backbone}" + (f" ({file})" if file else "")
        raise CheckpointError(f"{what} could not be loaded: {first_line(e)}") from e


def checked_file(file: str) -> dict[str, Any]:
    """A pretrained_cfg_overlay by which timm reads this file, one of its own format, and fetches nothing."""
    return {"file": file, "custom_load": False}


def _check_backbone(model: nn.Module, checkpoint: Checkpoint, cfg: dict) -> dict:
    """The state dict of a whole ViT that fits the model, but for what timm adapts. Raises CheckpointError."""
    state = dict(checkpoint.backbone)
    if norms_after_pool(model) and "fc_norm.weight" not in state:
        state = behind_pool(state)
    head = [f"{name}.{part}" for name in _names(cfg, "classifier") or ["head"] for part in ("weight", "bias")]
    adapts_head = model.num_classes != cfg.get("num_classes")
    if model.num_classes == 0:
        for key in head:
            state.pop(key, None)
    check_state(
        model,
        state,
        checkpoint.path,
        optional=head if adapts_head else (),
        adapts=[key for key in model.state_dict() if key.endswith(ADAPTED) or key == _first_conv(cfg)],
    )
    return state


def _names(cfg: dict, key: str) -> list[str]:
    """Names of modules that a pretrained_cfg has, one or several."""
    names = cfg.get(key) or ()
    return [name for name in ((names,) if isinstance(names, str) else names) if isinstance(name, str)]


def _first_conv(cfg: dict) -> str:
    return f"{(_names(cfg, 'first_conv') or ['patch_embed.proj'])[0]}.weight"


def _load_backbone(model: Any, checkpoint: Checkpoint, cfg: dict) -> None:
    """Load a whole ViT's weights through timm, which adapts them to another size, channel or class count."""
    state = _check_backbone(model, checkpoint, cfg)
    sources = ("source", "file", "url", "hf_hub_id", "hf_hub_filename")
    source = {key: value for key, value in cfg.items() if key not in sources} | {"state_dict": state}
    wanted = model.state_dict()
    first = _first_conv(cfg)
    if first in state and state[first].shape == wanted[first].shape:
        source["first_conv"] = None  # nothing to adapt, though older timm versions would
    same = all(tensor.shape == wanted[key].shape for key, tensor in state.items() if key in wanted)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        load_pretrained(
            model,
            pretrained_cfg=source,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            filter_fn=None if same else filter_fn,  # for another size; it also renames the keys of other people's files
        )
    except Exception as e:  # shapes that timm cannot adapt
        raise CheckpointError(f"{checkpoint.path}: timm cannot adapt these weights to this model. {e}") from e


def _timms(variant: Variant) -> Callable[..., nn.Module]:
    """timm's own entrypoint of the backbone's architecture."""
    build = model_entrypoint(variant.architecture)
    return getattr(build, "timms_entrypoint", build)


def _denoiser_options(variant: Variant, layout: Layout, cfg: dict, kwargs: dict, given: dict | None) -> dict:
    """Arguments of `add_denoiser`: what the caller says, the variant's own, and the grid of its resolution."""
    options = {**variant.denoiser, **(given or {})}
    if options.get("grid_size") is None:
        if kwargs.get("patch_size"):  # the denoiser was trained with patches of the backbone's own size
            original = {key: value for key, value in kwargs.items() if key != "patch_size"}
            layout = layout_of(_sketch(variant, cfg, original))
        options["grid_size"] = layout.grid_at(variant.resolution, variant.resolution)
    return options


@functools.lru_cache(maxsize=None)
def accepts(architecture: str) -> frozenset[str]:
    """The arguments that the class of a timm architecture takes by name."""
    build = model_entrypoint(architecture)
    model = getattr(build, "timms_entrypoint", build)(pretrained=False, device="meta")
    parameters = inspect.signature(type(model).__init__).parameters
    more = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())  # NaFlexVit's settings
    return frozenset(parameters) | ({"global_pool"} if more else set())
