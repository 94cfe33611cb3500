"""Registration with timm: names, pretrained configs and entrypoints."""

import functools
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    create_model,
    get_pretrained_cfg,
    is_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_dvt import timm_private
from timm_dvt.attach import check_supported
from timm_dvt.building import create, naming_config
from timm_dvt.errors import UserError
from timm_dvt.variants import FOCUS, GENERIC, Variant, published_variants, variant_name
from timm_dvt.weights import focus

MODULE = "timm_dvt"  # what timm.list_models(module=...) knows our architectures by

VARIANTS: dict[str, Variant] = {}  # every registered name, ARCH.TAG_dvt and so on


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
        backbone: a full timm name, of any model that `add_denoiser` takes.
        suffix: what is appended to the name.
        resolution: pixels the denoiser was trained at; default the backbone's own.
        file, hub_id, hub_file: where its denoiser comes from: a path, or a file of a hub repo. None: no weights.

    Raises:
        ValueError: the backbone is not a name timm knows, or the name is a published variant's.
        TypeError: it cannot have a denoiser; see `timm_dvt.add_denoiser`.
    """
    cfg = get_pretrained_cfg(backbone) if isinstance(backbone, str) and is_model(backbone) else None
    if cfg is None:
        raise UserError(f"backbone is {backbone!r}, which timm does not know; see timm.list_models('*vit*').")
    check_supported(create_model(backbone, device="meta"))
    if not (isinstance(suffix, str) and re.fullmatch("[A-Za-z0-9_]+", suffix)):
        raise UserError(f"suffix is {suffix!r}; it must be letters, digits and underscores, as in names of timm's")
    if resolution is not None and (type(resolution) is not int or resolution < 1):
        raise UserError(f"resolution is {resolution!r}; it must be a number of pixels")
    if "." not in backbone and cfg.tag:
        backbone = f"{backbone}.{cfg.tag}"
    if variant_name(backbone, suffix) in {variant.name for variant in (*published_variants(), FOCUS)}:
        raise UserError(f"{variant_name(backbone, suffix)} is a published variant; pass another suffix for your own.")
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
    focus.register_backbone()
    for variant in (*published_variants(), FOCUS):
        _register(variant)
    _register_entrypoint(GENERIC, functools.partial(_create_generic))


def _register(variant: Variant) -> None:
    """Enter a variant in timm's registry. Nothing that timm registered under a name of its own is changed."""
    arch, ours = variant.architecture, f"{variant.architecture}_dvt"
    _route(arch)
    cfg = _pretrained_cfg(variant)
    VARIANTS[variant.name] = variant
    timm_private.model_pretrained_cfgs[variant.name] = cfg
    names = _register_entrypoint(ours, functools.partial(_create_architecture, ours))
    if variant.name not in names:
        names.append(variant.name)
    pretrained = timm_private.model_has_pretrained
    (pretrained.add if cfg.has_weights else pretrained.discard)(variant.name)
    if names[0] == variant.name:  # without a tag, the architecture stands for its first variant
        timm_private.model_pretrained_cfgs[ours] = cfg
        timm_private.model_default_cfgs[ours] = DefaultCfg(deque([""]), {"": cfg}, bool(cfg.has_weights))
        (pretrained.add if cfg.has_weights else pretrained.discard)(ours)


def _register_entrypoint(name: str, function: Callable[..., nn.Module]) -> list[str]:
    """Enter an architecture of ours; returns its list of full names, to be added to."""
    function.__name__, function.__module__ = name, MODULE
    timm_private.model_entrypoints[name] = function
    timm_private.model_to_module[name] = MODULE
    timm_private.module_to_models[MODULE].add(name)
    return timm_private.model_with_tags[name]


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
    timms = timm_private.model_entrypoints[arch]
    if hasattr(timms, "timms_entrypoint"):
        return

    @functools.wraps(timms)
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        name = f"{arch}.{_tag(kwargs.get('pretrained_cfg'))}"
        variant = VARIANTS.get(name)
        if variant is not None:
            return create(variant, pretrained=pretrained, **kwargs)
        if name == FOCUS.backbone and pretrained and not _has_source(arch, **kwargs):
            return focus.build_pretrained(timms, **kwargs)
        return timms(pretrained=pretrained, **kwargs)

    entrypoint.timms_entrypoint = timms  # type: ignore[attr-defined]
    timm_private.model_entrypoints[arch] = entrypoint


def _has_source(arch: str, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> bool:
    """Whether a pretrained_cfg says where weights come from, as that of a saved folder does."""
    cfg = resolve_pretrained_cfg(arch, pretrained_cfg, pretrained_cfg_overlay)
    return any((cfg.url, cfg.file, cfg.hf_hub_id, cfg.state_dict))


def _create_architecture(name: str, pretrained: bool = False, backbone: str | None = None, **kwargs) -> nn.Module:
    """ARCH_dvt, as a saved config.json names it: the variant its tag names, or else the architecture's first."""
    names = timm_private.model_with_tags[name]
    with naming_config(kwargs.get("pretrained_cfg")):
        tag = _tag(kwargs.get("pretrained_cfg"))
        variant = VARIANTS.get(f"{name.removesuffix('_dvt')}.{tag}") or VARIANTS[names[0]]
        if backbone:
            variant = replace(variant, backbone=_registered(backbone))
        return create(variant, pretrained=pretrained, **kwargs)


def _create_generic(pretrained: bool = False, backbone: str = "vit_base_patch14_dinov2.lvd142m", **kwargs) -> nn.Module:
    """Any timm ViT with a denoiser, as config.json names it where the backbone has no variant."""
    with naming_config(kwargs.get("pretrained_cfg")):
        cfg = get_pretrained_cfg(_registered(backbone))
        variant = Variant(variant_name(backbone, "dvt"), backbone, cfg.input_size[-1] if cfg else 224)
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or _pretrained_cfg(variant)
        return create(variant, pretrained=pretrained, **kwargs)


def _registered(backbone: str) -> str:
    # A config.json comes from anywhere: only names of timm's registry are built, never hf-hub: or local-dir: ones.
    if not isinstance(backbone, str) or ":" in backbone or "/" in backbone or not is_model(backbone):
        raise UserError(f"backbone is {backbone!r}, which is not a model of timm's registry.")
    return backbone


def _tag(cfg: PretrainedCfg | dict | str | None) -> str | None:
    """The tag of a pretrained_cfg in any of the forms that timm.create_model takes."""
    if isinstance(cfg, str):
        return cfg
    return cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", None)
