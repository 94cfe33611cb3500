"""The numbers that the DVT paper and its authors' repository publish, by backbone and state; not measured here.

From the paper: Tab. 1 (MIC of raw features and of F and G of stage 1), Tab. 2, Tab. 3, Tab. 4, Tab. 5 (stage 1's F
with G and residual as "denoised") and Tab. S3. From the README of github.com/Jiawei-Yang/Denoising-ViT: backbones
that the paper's Tab. 2 does not list, and all distilled ones. Tab. 3 and Tab. S2 give the same numbers under
DeiT-III and CLIP interchanged; Tab. 3's order is kept; its mAP is VOC07's mean of 11 points, as mmdetection has it.
Keys are (task, dataset, number), as in result files.
"""

from __future__ import annotations

Key = tuple[str, str, str]

VOC, VOC_ACC = ("linear-seg", "voc", "mIoU"), ("linear-seg", "voc", "mAcc")
ADE, ADE_ACC = ("linear-seg", "ade20k", "mIoU"), ("linear-seg", "ade20k", "mAcc")
DELTA, ABSREL = ("depth", "nyu", "delta1"), ("depth", "nyu", "AbsRel")
MAP, TOP1 = ("detection", "voc", "mAP_11"), ("attentive-probe", "imagefolder", "top1")
LOST07, LOST12 = ("discovery", "voc", "CorLoc/voc2007"), ("discovery", "voc", "CorLoc/voc2012")
LOST20K = ("discovery", "coco", "CorLoc/coco20k")
KNN, MIC = ("knn-seg", "voc", "mIoU"), ("mic", "imagefolder", "mic")

DINOV2, REG = "vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m"
DEIT3, CLIP = "deit3_base_patch16_224.fb_in1k", "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k"
DINO, EVA02 = "vit_base_patch16_224.dino", "eva02_base_patch16_clip_224.merged2b"

_TAB2 = (VOC, VOC_ACC, ADE, ADE_ACC, DELTA, ABSREL)
_REPOSITORY = (VOC, ADE)

# backbone, state, columns, values
_ROWS: tuple[tuple[str, str, tuple[Key, ...], tuple[float, ...]], ...] = (
    (DINO, "raw", _TAB2, (63.00, 76.35, 31.03, 40.33, 73.19, 0.1701)),
    (DINO, "denoised", _TAB2, (66.22, 78.14, 32.40, 42.01, 73.53, 0.1731)),
    (DEIT3, "raw", _TAB2, (70.62, 81.23, 32.73, 42.81, 72.16, 0.1788)),
    (DEIT3, "denoised", _TAB2, (73.36, 83.74, 36.57, 49.01, 71.36, 0.1802)),
    (EVA02, "raw", _TAB2, (71.52, 82.95, 37.45, 49.74, 63.68, 0.1989)),
    (EVA02, "denoised", _TAB2, (73.15, 83.55, 37.87, 49.81, 68.52, 0.1964)),
    (CLIP, "raw", _TAB2, (77.78, 86.57, 40.51, 52.47, 73.95, 0.1679)),
    (CLIP, "denoised", _TAB2, (79.01, 87.48, 41.10, 53.07, 74.61, 0.1667)),
    (REG, "raw", _TAB2, (83.64, 90.67, 48.22, 60.52, 87.88, 0.1190)),
    (REG, "denoised", _TAB2, (84.50, 91.45, 49.34, 61.70, 88.26, 0.1157)),
    (DINOV2, "raw", _TAB2, (83.60, 90.82, 47.29, 59.18, 86.88, 0.1238)),
    (DINOV2, "denoised", _TAB2, (84.84, 91.70, 48.66, 60.24, 87.58, 0.1200)),
    (DINOV2, "raw", (MAP, TOP1, KNN, MIC), (81.4, 81.2, 65.35, 0.44)),
    (DINOV2, "denoised", (MAP, TOP1, KNN, MIC), (81.9, 81.8, 70.94, 0.22)),
    (DINOV2, "artifacts", (MIC,), (0.54,)),
    (REG, "raw", (MAP, TOP1), (80.9, 81.6)),
    (REG, "denoised", (MAP, TOP1), (81.4, 81.8)),
    (CLIP, "raw", (MAP, TOP1, MIC), (80.9, 83.4, 0.11)),
    (CLIP, "denoised", (MAP, TOP1, MIC), (81.7, 83.5, 0.08)),
    (CLIP, "artifacts", (MIC,), (0.14,)),
    (DEIT3, "raw", (MAP, TOP1, MIC), (75.8, 81.6, 0.34)),
    (DEIT3, "denoised", (MAP, TOP1, MIC), (77.0, 82.1, 0.06)),
    (DEIT3, "artifacts", (MIC,), (0.32,)),
    (DINO, "raw", (MAP, TOP1), (76.4, 77.0)),
    (DINO, "denoised", (MAP, TOP1), (77.1, 77.0)),
    (EVA02, "raw", (MAP, TOP1), (79.4, 80.3)),
    (EVA02, "denoised", (MAP, TOP1), (80.2, 80.5)),
    (REG, "raw", (LOST07, LOST12, LOST20K), (38.0, 41.5, 26.9)),
    (REG, "denoised", (LOST07, LOST12, LOST20K), (56.1, 59.3, 45.5)),
    (DINOV2, "raw", (LOST07, LOST12, LOST20K), (30.8, 35.9, 23.4)),
    (DINOV2, "denoised", (LOST07, LOST12, LOST20K), (58.0, 60.3, 46.7)),
    ("vit_small_patch14_dinov2.lvd142m", "raw", _REPOSITORY, (81.78, 44.05)),
    ("vit_small_patch14_dinov2.lvd142m", "denoised", _REPOSITORY, (82.78, 45.14)),
    ("vit_large_patch14_dinov2.lvd142m", "raw", _REPOSITORY, (83.43, 47.53)),
    ("vit_large_patch14_dinov2.lvd142m", "denoised", _REPOSITORY, (85.25, 49.80)),
    ("vit_small_patch14_reg4_dinov2.lvd142m", "raw", _REPOSITORY, (80.88, 44.36)),
    ("vit_small_patch14_reg4_dinov2.lvd142m", "denoised", _REPOSITORY, (81.93, 45.55)),
    ("vit_large_patch14_reg4_dinov2.lvd142m", "raw", _REPOSITORY, (83.21, 48.44)),
    ("vit_large_patch14_reg4_dinov2.lvd142m", "denoised", _REPOSITORY, (84.37, 49.19)),
    ("vit_base_patch16_224.mae", "raw", _REPOSITORY, (50.29, 23.84)),
    ("vit_base_patch16_224.mae", "denoised", _REPOSITORY, (50.65, 23.25)),
    ("vit_base_patch16_384.augreg_in21k_ft_in1k", "raw", _REPOSITORY, (73.51, 36.46)),
    ("vit_base_patch16_384.augreg_in21k_ft_in1k", "denoised", _REPOSITORY, (74.82, 36.75)),
    (DINOV2, "distilled", (VOC,), (85.10,)),
    (REG, "distilled", (VOC,), (84.36,)),
    (DEIT3, "distilled", (VOC,), (73.63,)),
    (CLIP, "distilled", (VOC,), (79.86,)),
    (DINO, "distilled", (VOC,), (66.80,)),
    ("vit_base_patch16_224.mae", "distilled", (VOC,), (51.91,)),
    (EVA02, "distilled", (VOC,), (75.93,)),
    ("vit_base_patch16_384.augreg_in21k_ft_in1k", "distilled", (VOC,), (76.26,)),
)

PUBLISHED: dict[tuple[str, str], dict[Key, float]] = {}
for _backbone, _state, _columns, _values in _ROWS:
    PUBLISHED.setdefault((_backbone, _state), {}).update(zip(_columns, _values))
