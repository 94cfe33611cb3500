"""Linear-probe results as the authors of DVT published them. None was measured here."""

from timm_dvt.variants import FOCUS, Variant

SOURCE_NAME = "published by the authors, README of Jiawei-Yang/Denoising-ViT; not measured by timm-dvt"
SOURCE_URL = "https://github.com/Jiawei-Yang/Denoising-ViT"

# mIoU in percent: raw features, then this variant's. A distilled ViT's was published for VOC12 alone.
# backbone: VOC12 raw, denoised; ADE20k raw, denoised; VOC12 distilled
_VOC_DENOISERS: dict[str, tuple[float, float, float, float, float | None]] = {
    "vit_small_patch14_dinov2.lvd142m": (81.78, 82.78, 44.05, 45.14, None),
    "vit_base_patch14_dinov2.lvd142m": (83.52, 84.92, 47.02, 48.54, 85.10),
    "vit_large_patch14_dinov2.lvd142m": (83.43, 85.25, 47.53, 49.80, None),
    "vit_small_patch14_reg4_dinov2.lvd142m": (80.88, 81.93, 44.36, 45.55, None),
    "vit_base_patch14_reg4_dinov2.lvd142m": (83.48, 84.58, 47.73, 49.24, 84.36),
    "vit_large_patch14_reg4_dinov2.lvd142m": (83.21, 84.37, 48.44, 49.19, None),
    "deit3_base_patch16_224.fb_in1k": (71.03, 73.52, 32.84, 33.57, 73.63),
    "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k": (77.75, 79.50, 40.50, 41.33, 79.86),
    "vit_base_patch16_224.dino": (62.92, 66.41, 31.03, 32.45, 66.80),
    "vit_base_patch16_224.mae": (50.29, 50.65, 23.84, 23.25, 51.91),
    "eva02_base_patch16_clip_224.merged2b": (71.49, 73.76, 37.89, 37.99, 75.93),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": (73.51, 74.82, 36.46, 36.75, 76.26),
}
_IMAGENET_DENOISERS: dict[str, tuple[float, float, float, float, float | None]] = {
    "vit_base_patch14_dinov2.lvd142m": (83.52, 85.17, 47.02, 48.68, 85.33),
}


def results(variant: Variant) -> dict[str, tuple[float, float]]:
    """mIoU of raw and of the variant's features, by dataset; empty where nothing was published."""
    folder = (variant.hub_file or "").split("/")[0]
    row = (_IMAGENET_DENOISERS if folder.startswith("imgnet") else _VOC_DENOISERS).get(variant.backbone)
    if row is None or not folder:
        return {}
    voc_raw, voc, ade_raw, ade, voc_distilled = row
    if variant.distilled:
        return {} if voc_distilled is None else {"VOC12": (voc_raw, voc_distilled)}
    return {"VOC12": (voc_raw, voc), "ADE20k": (ade_raw, ade)}


def trained_on(variant: Variant) -> str | None:
    """The images the denoiser was trained on."""
    if variant.name == FOCUS.name:
        return "freely licensed photographs and images composed of such"
    folder = (variant.hub_file or "").split("/")[0]
    return {"voc": "PASCAL VOC", "imgnet": "ImageNet-1k"}.get(folder.split("_")[0])
