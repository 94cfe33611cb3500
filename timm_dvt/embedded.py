"""The small model inside the package: a ViT-Ti trained on stamps, and its denoiser, for use without a network."""

from importlib import resources

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import _registry as timm_registry
from timm.models._pretrained import PretrainedCfg

from timm_dvt.variants import EMBEDDED

FOLDER = resources.files("timm_dvt") / "assets" / "stamps"  # README.md there says how it was made


def register_backbone() -> None:
    """Make `vit_tiny_patch16_224.stamps` a name of timm's: a plain ViT at 192 px without a head."""
    timm_registry._model_pretrained_cfgs[EMBEDDED.backbone] = PretrainedCfg(
        file=str(FOLDER / "backbone.safetensors"),
        source="file",
        tag="stamps",
        architecture=EMBEDDED.architecture,
        input_size=(3, EMBEDDED.resolution, EMBEDDED.resolution),
        fixed_input_size=True,  # so that timm creates it at this size
        crop_pct=1.0,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_classes=0,
        first_conv="patch_embed.proj",
        classifier="head",
        license=EMBEDDED.license,
    )
    timm_registry._model_has_pretrained.add(EMBEDDED.backbone)
