"""Registration with timm: names, pretrained configs, entrypoints, and how a variant is put together."""

import functools
import os
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from timm.models import _registry as timm_registry
from timm.models import create_model, get_pretrained_cfg, is_model, split_model_name_tag
from timm.models._builder import build_model_with_cfg, load_pretrained, resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import nn

from timm_dvt.model import add_denoiser, attach_denoiser, check_supported
from timm_dvt.variants import ROWS, Variant, published_variants, variant_name
from timm_dvt.weights import (
    Checkpoint,
    CheckpointError,
    check_state,
    denoiser_for,
    from_state_dict,
    is_fetch_error,
    locate,
    read_checkpoint,
    unavailable,
)

MODULE = "timm_dvt"  # what timm.list_models(module=...) knows our architectures by
GENERIC = "denoised_vit"  # the architecture of a saved model whose backbone has no variant of its own

VARIANTS: dict[str, Variant] = {}  # every registered name ARCH.TAG_dvt...
_entrypoints: dict[str, Callable[..., nn.Module]] = {}  # timm's own entrypoint of each architecture we route


def register(
    backbone: str,
    suffix: str = "dvt",
    *,
    resolution: int | None = None,
    file: str | os.PathLike | None = None,
    hub_id: str | None = None,
    hub_file: str | None = None,
    license: str | None = None,
) -> str:
    """Add a variant `BACKBONE_SUFFIX` at run time, and return its name.

    Args:
        backbone: a full timm name; any VisionTransformer or Eva.
        suffix: what is appended to the name.
        resolution: pixels the denoiser was trained at; default the backbone's own.
        file, hub_id, hub_file: where its denoiser comes from: a path, or a file of a hub repo. None: no weights.

    Raises:
        ValueError: the backbone is not a name timm knows.
        TypeError: it is not a VisionTransformer or Eva.
    """
    cfg = get_pretrained_cfg(backbone) if is_model(backbone) else None
    if cfg is None:
        raise ValueError(f"backbone is {backbone!r}, which timm does not know; see timm.list_models('*vit*').")
    check_supported(create_model(backbone, device="meta"))
    if "." not in backbone and cfg.tag:
        backbone = f"{backbone}.{cfg.tag}"
    variant = Variant(
        name=variant_name(backbone, suffix),
        backbone=backbone,
        resolution=resolution or cfg.input_size[-1],
        hub_id=hub_id,
        hub_file=hub_file,
        file=os.fspath(file) if file else None,
        license=license or cfg.license,
    )
    _register(variant)
    return variant.name


def register_all() -> None:
    """Register the table. Harmless when repeated."""
    for variant in published_variants():
        _register(variant)
    _register_entrypoint(GENERIC, functools.partial(_create_generic))


def _register(variant: Variant) -> None:
    """Enter a variant in timm's registry. Nothing that timm registered under a name of its own is changed."""
    arch, ours = variant.architecture, f"{variant.architecture}_dvt"
    _route(arch)
    cfg = _pretrained_cfg(variant)
    VARIANTS[variant.name] = variant
    timm_registry._model_pretrained_cfgs[variant.name] = cfg
    names = _register_entrypoint(ours, functools.partial(_create_architecture, ours))
    if variant.name not in names:
        names.append(variant.name)
    pretrained = timm_registry._model_has_pretrained
    (pretrained.add if cfg.has_weights else pretrained.discard)(variant.name)
    if names[0] == variant.name:  # without a tag, the architecture stands for its first variant
        timm_registry._model_pretrained_cfgs[ours] = cfg
        timm_registry._model_default_cfgs[ours] = DefaultCfg(deque([""]), {"": cfg}, bool(cfg.has_weights))
        (pretrained.add if cfg.has_weights else pretrained.discard)(ours)


def _register_entrypoint(name: str, function: Callable[..., nn.Module]) -> list[str]:
    """Enter an architecture of ours; returns its list of full names, to be added to."""
    function.__name__, function.__module__ = name, MODULE
    timm_registry._model_entrypoints[name] = function
    timm_registry._model_to_module[name] = MODULE
    timm_registry._module_to_models[MODULE].add(name)
    return timm_registry._model_with_tags[name]


def _pretrained_cfg(variant: Variant) -> PretrainedCfg:
    """The backbone's config with the variant's resolution and source of weights."""
    base = get_pretrained_cfg(variant.backbone) or PretrainedCfg()
    channels = base.input_size[0]
    return replace(
        base,
        tag=split_model_name_tag(variant.name)[1],
        architecture=variant.architecture,
        url="",
        file=variant.file,
        hf_hub_id=variant.hub_id,
        hf_hub_filename=variant.hub_file,
        custom_load=False,
        input_size=(channels, variant.resolution, variant.resolution),
        test_input_size=None,
        fixed_input_size=False,
        pool_size=None,
        num_classes=0 if variant.distilled else base.num_classes,  # the published distilled ViTs have no head
        license=variant.license,
        paper_name="Denoising Vision Transformers",
        paper_ids="arXiv:2401.02957",
    )


def _route(arch: str) -> None:
    """Let timm's entrypoint of an architecture make our variants too; for any other tag it is timm's untouched."""
    timms = timm_registry._model_entrypoints[arch]
    if getattr(timms, "routes_dvt", False):
        return
    _entrypoints[arch] = timms

    @functools.wraps(timms)
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        variant = VARIANTS.get(f"{arch}.{_tag(kwargs.get('pretrained_cfg'))}")
        if variant is None:
            return timms(pretrained=pretrained, **kwargs)
        return create(variant, pretrained=pretrained, **kwargs)

    entrypoint.routes_dvt = True
    timm_registry._model_entrypoints[arch] = entrypoint


def _create_architecture(name: str, pretrained: bool = False, backbone: str | None = None, **kwargs) -> nn.Module:
    """ARCH_dvt, as a saved config.json names it: the variant its tag names, or else the architecture's first."""
    names = timm_registry._model_with_tags[name]
    variant = VARIANTS.get(f"{name.removesuffix('_dvt')}.{_tag(kwargs.get('pretrained_cfg'))}") or VARIANTS[names[0]]
    if backbone:
        variant = replace(variant, backbone=_registered(backbone))
    return create(variant, pretrained=pretrained, **kwargs)


def _create_generic(
    pretrained: bool = False, backbone: str = "vit_base_patch14_dinov2.lvd142m", **kwargs
) -> nn.Module:
    """Any timm ViT with a denoiser, as config.json names it where the backbone has no variant."""
    cfg = get_pretrained_cfg(_registered(backbone))
    variant = Variant(variant_name(backbone, "dvt"), backbone, cfg.input_size[-1] if cfg else 224)
    kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or _pretrained_cfg(variant)
    return create(variant, pretrained=pretrained, **kwargs)


def _registered(backbone: str) -> str:
    # A config.json comes from anywhere: only names of timm's registry are built, never hf-hub: or local-dir: ones.
    if not isinstance(backbone, str) or ":" in backbone or "/" in backbone or not is_model(backbone):
        raise ValueError(f"backbone is {backbone!r}, which is not a model of timm's registry.")
    return backbone


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
        denoiser: arguments of `add_denoiser`: grid_size, depth, num_heads, pos_embed.
        kwargs: arguments of timm's model, as for the backbone.
    """
    if kwargs.get("patch_drop_rate"):
        raise ValueError(
            f"patch_drop_rate={kwargs['patch_drop_rate']} leaves holes in the patch grid, and the denoiser needs the "
            f"whole grid. Leave it at 0."
        )
    if pretrained_cfg is None or isinstance(pretrained_cfg, str):
        pretrained_cfg = get_pretrained_cfg(variant.name)
    cfg = resolve_pretrained_cfg(f"{variant.architecture}_dvt", pretrained_cfg, pretrained_cfg_overlay).to_dict()
    wrapper = {key: kwargs.pop(key) for key in ("out_indices", "feature_cls") if key in kwargs}
    for key, value in (("img_size", cfg["input_size"][1:]), ("in_chans", cfg["input_size"][0])):
        kwargs.setdefault(key, value)
    for key in ("num_classes", "global_pool"):
        if cfg.get(key) is not None:
            kwargs.setdefault(key, cfg[key])
    kwargs.setdefault("dynamic_img_size", True)

    checkpoint = _read_source(cfg, variant, cache_dir) if pretrained else None
    cfg.pop("state_dict", None)
    model = _backbone(variant, cfg, checkpoint, cache_dir, kwargs)
    if not variant.distilled:
        options = {"grid_size": _denoiser_grid(variant, model)} | (denoiser or {})
        if checkpoint is None:
            add_denoiser(model, **options)
        else:
            grid, heads = tuple(options["grid_size"]), options.get("num_heads")
            attach_denoiser(model, denoiser_for(checkpoint, model.embed_dim, grid, heads, variant.backbone))
        model.backbone_name = variant.backbone
        # What timm.models.save_for_hf writes must name an architecture that builds this model.
        cfg["architecture"] = saved_architecture(variant.architecture)
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


def saved_architecture(arch: str) -> str:
    """The architecture by which a saved config.json names a denoised model of a timm architecture."""
    return f"{arch}_dvt" if arch in {row.backbone.split(".")[0] for row in ROWS} else GENERIC


def _read_source(cfg: dict, variant: Variant, cache_dir: str | os.PathLike | None) -> Checkpoint:
    """The checkpoint a pretrained_cfg names: a state dict, a file, a folder, or a file of the Hub."""
    if cfg.get("state_dict"):
        return from_state_dict(cfg["state_dict"])
    whole = variant.distilled or not cfg.get("hf_hub_filename")
    return read_checkpoint(locate(cfg, variant.backbone, whole, cache_dir))


def _backbone(variant: Variant, cfg: dict, checkpoint: Checkpoint | None, cache_dir, kwargs: dict) -> nn.Module:
    """timm's model: with random weights, with those of the checkpoint, or with the backbone's own from its hub repo."""
    build = _entrypoints.get(variant.architecture) or timm_registry._model_entrypoints[variant.architecture]
    if checkpoint is None:
        return build(pretrained=False, pretrained_cfg=cfg, **kwargs)
    if checkpoint.backbone or variant.distilled:
        model = build(pretrained=False, pretrained_cfg=cfg, **kwargs)
        _load_backbone(model, checkpoint, cfg)
        return model
    tag = split_model_name_tag(variant.backbone)[1]
    try:
        return build(pretrained=True, pretrained_cfg=tag or None, cache_dir=cache_dir, **kwargs)
    except Exception as e:  # the client raises its own, the network library's and the system's errors
        if is_fetch_error(e):
            raise unavailable(cfg, variant.backbone, False, e) from e
        raise CheckpointError(f"The weights of {variant.backbone} could not be loaded: {e}") from e


def _load_backbone(model: nn.Module, checkpoint: Checkpoint, cfg: dict) -> None:
    """Load a whole ViT's weights through timm, which adapts them to another size, channel or class count."""
    state, head = dict(checkpoint.backbone), ("head.weight", "head.bias")
    adapts_head = model.num_classes != cfg.get("num_classes")
    if model.num_classes == 0:
        for key in head:
            state.pop(key, None)
    check_state(
        model,
        state,
        checkpoint.path,
        optional=head if adapts_head else (),
        adapts=("pos_embed", "patch_embed.proj.weight"),
    )
    sources = ("source", "file", "url", "hf_hub_id", "hf_hub_filename")
    source = {key: value for key, value in cfg.items() if key not in sources} | {"state_dict": state}
    try:
        load_pretrained(
            model,
            pretrained_cfg=source,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            filter_fn=eva_filter if isinstance(model, Eva) else vit_filter,
        )
    except Exception as e:  # shapes that timm cannot adapt
        raise CheckpointError(f"{checkpoint.path}: timm cannot adapt these weights to this model. {e}") from e


def _denoiser_grid(variant: Variant, model: nn.Module) -> tuple[int, int]:
    rows, columns = model.patch_embed.patch_size
    return variant.resolution // rows, variant.resolution // columns


def _tag(cfg: PretrainedCfg | dict | str | None) -> str | None:
    """The tag of a pretrained_cfg in any of the forms that timm.create_model takes."""
    if isinstance(cfg, str):
        return cfg
    return cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", None)
