"""The table of published variants, and what a registered name stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from timm.models import split_model_name_tag

DVT_REPO = "jjiaweiyang/DVT"  # FOLDER/TIMM_ID.pth, the checkpoints of the paper's authors
DVT_LICENSE = "mit"
GENERIC = "denoised_vit"  # the architecture of a saved model whose backbone is not in the table

# What is appended to a backbone's name for each published folder. The first is what a plain `_dvt` means.
SUFFIXES = {
    "voc_denoised": "dvt",
    "imgnet_denoised": "dvt_in1k",
    "voc_distilled": "dvt_distilled",
    "imgnet_distilled": "dvt_in1k_distilled",
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a backbone's full timm name, its denoiser's resolution in pixels, and what is published."""

    backbone: str
    resolution: int
    folders: tuple[str, ...]
    license: str  # the backbone's, as timm records it; the denoisers' own is MIT


_DENOISED = ("voc_denoised",)
_BOTH = ("voc_denoised", "voc_distilled")
ROWS = (
    Row("vit_small_patch14_dinov2.lvd142m", 518, _DENOISED, "apache-2.0"),
    Row("vit_base_patch14_dinov2.lvd142m", 518, tuple(SUFFIXES), "apache-2.0"),
    Row("vit_large_patch14_dinov2.lvd142m", 518, _DENOISED, "apache-2.0"),
    Row("vit_giant_patch14_dinov2.lvd142m", 518, (), "apache-2.0"),
    Row("vit_small_patch14_reg4_dinov2.lvd142m", 518, _DENOISED, "apache-2.0"),
    Row("vit_base_patch14_reg4_dinov2.lvd142m", 518, _BOTH, "apache-2.0"),
    Row("vit_large_patch14_reg4_dinov2.lvd142m", 518, _DENOISED, "apache-2.0"),
    Row("vit_giant_patch14_reg4_dinov2.lvd142m", 518, (), "apache-2.0"),
    Row("deit3_base_patch16_224.fb_in1k", 512, _BOTH, "apache-2.0"),
    Row("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", 512, _BOTH, "apache-2.0"),
    Row("vit_base_patch16_224.dino", 512, _BOTH, "apache-2.0"),
    Row("vit_base_patch16_224.mae", 512, _BOTH, "cc-by-nc-4.0"),
    Row("eva02_base_patch16_clip_224.merged2b", 512, _BOTH, "mit"),
    Row("vit_base_patch16_384.augreg_in21k_ft_in1k", 512, _BOTH, "apache-2.0"),
)


@dataclass(frozen=True)
class Variant:
    """What a registered name stands for: a backbone, a denoiser's resolution in pixels, and where weights come from."""

    name: str
    backbone: str
    resolution: int
    distilled: bool = False  # a whole fine-tuned ViT, without a denoiser
    hub_id: str | None = None  # with hub_file, or a folder of model.safetensors and config.json
    hub_file: str | None = None
    file: str | None = None  # a path on this machine
    license: str | None = None
    # Arguments of `add_denoiser` by which the file's denoiser is made, so that a model without its weights is the same.
    denoiser: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def architecture(self) -> str:
        """timm's architecture of the backbone."""
        return split_model_name_tag(self.backbone)[0]

    @property
    def source(self) -> str:
        """Where the weights come from, in a few words."""
        if self.file:
            return "in the package" if self.name == FOCUS.name else self.file
        if self.hub_id:
            return f"{self.hub_id}/{self.hub_file}" if self.hub_file else self.hub_id
        return "no weights"


# Its denoiser ships with the package, its backbone comes from the package registry: see timm_dvt/weights/focus.py.
FOCUS = Variant(
    name="vit_small_patch14_dinov2.focus_dvt",
    backbone="vit_small_patch14_dinov2.focus",
    resolution=518,
    file=str(resources.files("timm_dvt") / "assets" / "focus" / "denoiser.safetensors"),
    license="apache-2.0",
    denoiser={"keep_length": True, "pos_embed_out": (19, 19), "blank_gate": True, "flat_gate": True},
)
DEFAULT_MODEL = FOCUS.name  # of the demo and the page


def variant_name(backbone: str, suffix: str) -> str:
    """`ARCH.TAG` and `dvt` make `ARCH.TAG_dvt`; a backbone without a tag gets the suffix as its tag."""
    return f"{backbone}_{suffix}" if "." in backbone else f"{backbone}.{suffix}"


def published_variants() -> list[Variant]:
    """Every variant of the table, in its order; a row with nothing published makes one without weights."""
    variants = []
    for row in ROWS:
        for folder in row.folders or ("voc_denoised",):
            variants.append(
                Variant(
                    name=variant_name(row.backbone, SUFFIXES[folder]),
                    backbone=row.backbone,
                    resolution=row.resolution,
                    distilled=folder.endswith("distilled"),
                    hub_id=DVT_REPO if row.folders else None,
                    hub_file=f"{folder}/{row.backbone}.pth" if row.folders else None,
                    license=row.license,
                )
            )
    return variants


def saved_architecture(arch: str) -> str:
    """The architecture by which a saved config.json names a denoised model of a timm architecture.

    It must be registered wherever timm_dvt is imported, so it is `ARCH_dvt` for the table's and the generic one else.
    """
    known = {split_model_name_tag(row.backbone)[0] for row in ROWS}
    return f"{arch}_dvt" if arch in known else GENERIC
