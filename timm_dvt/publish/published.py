"""The numbers that the authors of DVT published, each with its source: for cards, README and training.report.

None was measured here. Two sources give other numbers for the same thing, because the models were trained again for
the code's release: README is that of the authors' repository, whose "Performance Summary" is about the checkpoints
that can be had; PAPER has Tab. 1 (MIC), 2, 3, 4, 5 (F with G and residual of stage 1, as "voc_denoised") and S3. The
README's "Legacy Results" are Tab. 2's and not repeated. Tab. 3 and Tab. S2 give the same numbers under DeiT-III and
CLIP interchanged; Tab. 3's order is kept.
"""

from dataclasses import dataclass

from timm_dvt.variants import FOCUS, Variant

Key = tuple[str, str, str]  # task, dataset, number, as in the result files of training.evaluate
Numbers = dict[Key, float]

VOC, VOC_ACC = ("linear-seg", "voc", "mIoU"), ("linear-seg", "voc", "mAcc")
ADE, ADE_ACC = ("linear-seg", "ade20k", "mIoU"), ("linear-seg", "ade20k", "mAcc")
RMSE, ABSREL, DELTA = ("depth", "nyu", "RMSE"), ("depth", "nyu", "AbsRel"), ("depth", "nyu", "delta1")
MAP, TOP1 = ("detection", "voc", "mAP_11"), ("attentive-probe", "imagefolder", "top1")
LOST07, LOST12 = ("discovery", "voc", "CorLoc/voc2007"), ("discovery", "voc", "CorLoc/voc2012")
LOST20K = ("discovery", "coco", "CorLoc/coco20k")
KNN, MIC = ("knn-seg", "voc", "mIoU"), ("mic", "imagefolder", "mic")

# The README's columns: percent, but for RMSE (meters) and AbsRel (a ratio); of these two less is better.
SEVEN = (VOC, VOC_ACC, ADE, ADE_ACC, RMSE, ABSREL, DELTA)

DINOV2, REG = "vit_base_patch14_dinov2.lvd142m", "vit_base_patch14_reg4_dinov2.lvd142m"
DEIT3, CLIP = "deit3_base_patch16_224.fb_in1k", "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k"
DINO, EVA02 = "vit_base_patch16_224.dino", "eva02_base_patch16_clip_224.merged2b"


@dataclass(frozen=True)
class Source:
    """Where numbers were published; `short` names it in a table."""

    short: str
    name: str
    url: str


README = Source(
    "authors' README",
    "published by the authors, README of Jiawei-Yang/Denoising-ViT; not measured by timm-dvt",
    "https://github.com/Jiawei-Yang/Denoising-ViT",
)
PAPER = Source(
    "paper",
    "published by the authors, Denoising Vision Transformers; not measured by timm-dvt",
    "https://arxiv.org/abs/2401.02957",
)

# What was measured here of the denoiser that ships with the package: name, off, on. training/RESULTS.md has the
# commands, seeds and spreads.
MEASURED = (
    ("pattern in images of one color, in % of that of raw features", "100", "0.00"),
    ("a wall painted over half of a photograph: pattern left, %", "100", "1"),
    ("photographs (VOC): variance that position explains, %", "6.36", "0.92"),
    ("photographs (VOC): wrong patches, where two groups by color are each labeled on one side, %", "34.5", "30.4"),
    ("photographs (VOC): object discovery, CorLoc", "46.5", "46.0"),
    ("photographs (VOC): detection, trained on 150, mAP", "19.3", "18.7"),
    ("a kitchen (100 frames): depth, delta1, %", "70.5", "71.8"),
    ("a kitchen (100 frames): depth, RMSE, m, lower is better", "0.407", "0.415"),
    ("videos (DAVIS): mask propagation, J&F", "54.0", "54.1"),
    ("clothing (59 classes, 100 photographs): linear segmentation, mIoU", "10.55", "10.80"),
    ("clothing (59 classes, 100 photographs): k-NN segmentation, a bank of 50, mIoU", "5.79", "6.00"),
    ("street scenes (CamVid, 100 frames): linear segmentation, mIoU", "43.53", "43.96"),
    ("street scenes (CamVid, 100 frames): k-NN segmentation, a bank of 37 frames, mIoU", "26.44", "27.29"),
    ("street scenes (CamVid, 100 frames): the same, a bank of 92 frames, mIoU", "29.14", "28.99"),
)

# What a table below gives for whom: raw features, a folder of published checkpoints, or stage 1's artifact field.
# VOC mIoU, mAcc; ADE20k mIoU, mAcc; NYUd RMSE, AbsRel, delta1
_README = """
raw
    vit_small_patch14_dinov2.lvd142m                  81.78  88.44  44.05  55.53 0.4340 0.1331  84.49
    vit_base_patch14_dinov2.lvd142m                   83.52  90.60  47.02  58.45 0.3965 0.1197  87.59
    vit_large_patch14_dinov2.lvd142m                  83.43  90.38  47.53  59.64 0.3831 0.1145  88.89
    vit_small_patch14_reg4_dinov2.lvd142m             80.88  88.69  44.36  55.90 0.4328 0.1303  85.00
    vit_base_patch14_reg4_dinov2.lvd142m              83.48  90.95  47.73  60.17 0.3967 0.1177  87.92
    vit_large_patch14_reg4_dinov2.lvd142m             83.21  90.67  48.44  61.28 0.3852 0.1139  88.53
    deit3_base_patch16_224.fb_in1k                    71.03  80.67  32.84  42.79 0.5837 0.1772  73.03
    vit_base_patch16_clip_384.laion2b_ft_in12k_in1k   77.75  86.68  40.50  52.81 0.5585 0.1678  74.30
    vit_base_patch16_224.dino                         62.92  75.98  31.03  40.62 0.5742 0.1694  74.55
    vit_base_patch16_224.mae                          50.29  63.10  23.84  32.06 0.6629 0.2275  66.24
    eva02_base_patch16_clip_224.merged2b              71.49  82.69  37.89  50.31      -      -      -
    vit_base_patch16_384.augreg_in21k_ft_in1k         73.51  83.60  36.46  48.65 0.6360 0.1898  69.10
voc_denoised
    vit_small_patch14_dinov2.lvd142m                  82.78  90.69  45.14  56.35 0.4368 0.1337  84.34
    vit_base_patch14_dinov2.lvd142m                   84.92  91.74  48.54  60.21 0.3811 0.1166  88.42
    vit_large_patch14_dinov2.lvd142m                  85.25  91.69  49.80  61.98 0.3826 0.1118  89.32
    vit_small_patch14_reg4_dinov2.lvd142m             81.93  89.54  45.55  57.52 0.4251 0.1292  85.01
    vit_base_patch14_reg4_dinov2.lvd142m              84.58  91.17  49.24  61.66 0.3898 0.1146  88.60
    vit_large_patch14_reg4_dinov2.lvd142m             84.37  91.42  49.19  62.21 0.3852 0.1141  88.45
    deit3_base_patch16_224.fb_in1k                    73.52  83.65  33.57  43.56 0.5817 0.1774  73.05
    vit_base_patch16_clip_384.laion2b_ft_in12k_in1k   79.50  88.43  41.33  53.54 0.5512 0.1639  75.30
    vit_base_patch16_224.dino                         66.41  77.75  32.45  42.42 0.5784 0.1738  73.75
    vit_base_patch16_224.mae                          50.65  62.90  23.25  31.03 0.6651 0.2271  65.44
    eva02_base_patch16_clip_224.merged2b              73.76  84.50  37.99  50.40 0.6196 0.1904  69.86
    vit_base_patch16_384.augreg_in21k_ft_in1k         74.82  84.40  36.75  48.82 0.6316 0.1921  69.37
voc_distilled
    vit_base_patch14_dinov2.lvd142m                   85.10  91.41  48.57  60.35 0.3850 0.1207  88.25
    vit_base_patch14_reg4_dinov2.lvd142m              84.36  90.80  49.20  61.56 0.3838 0.1143  88.97
    deit3_base_patch16_224.fb_in1k                    73.63  82.74  34.43  44.96 0.5712 0.1747  74.00
    vit_base_patch16_clip_384.laion2b_ft_in12k_in1k   79.86  88.33  42.28  54.26 0.5253 0.1571  77.23
    vit_base_patch16_224.dino                         66.80  78.47  32.68  42.58 0.5750 0.1696  73.86
    vit_base_patch16_224.mae                          51.91  64.67  23.73  31.88 0.6733 0.2282  65.33
    eva02_base_patch16_clip_224.merged2b              75.93  85.44  40.15  52.04      -      -      -
    vit_base_patch16_384.augreg_in21k_ft_in1k         76.26  85.14  38.62  50.61 0.5825 0.1768  73.14
imgnet_denoised
    vit_base_patch14_dinov2.lvd142m                   85.17  91.55  48.68  60.60 0.3832 0.1152  88.50
imgnet_distilled
    vit_base_patch14_dinov2.lvd142m                   85.33  91.48  48.85  60.47 0.3704 0.1115  89.74
"""

# VOC mIoU, mAcc; ADE20k mIoU, mAcc; NYUd delta1, AbsRel
_TAB_2 = f"""
raw
    {DINO}   63.00 76.35 31.03 40.33 73.19 0.1701
    {DEIT3}  70.62 81.23 32.73 42.81 72.16 0.1788
    {EVA02}  71.52 82.95 37.45 49.74 63.68 0.1989
    {CLIP}   77.78 86.57 40.51 52.47 73.95 0.1679
    {REG}    83.64 90.67 48.22 60.52 87.88 0.1190
    {DINOV2} 83.60 90.82 47.29 59.18 86.88 0.1238
voc_denoised
    {DINO}   66.22 78.14 32.40 42.01 73.53 0.1731
    {DEIT3}  73.36 83.74 36.57 49.01 71.36 0.1802
    {EVA02}  73.15 83.55 37.87 49.81 68.52 0.1964
    {CLIP}   79.01 87.48 41.10 53.07 74.61 0.1667
    {REG}    84.50 91.45 49.34 61.70 88.26 0.1157
    {DINOV2} 84.84 91.70 48.66 60.24 87.58 0.1200
"""

# Tab. 3: mAP; Tab. S3: top-1
_TABS_3_S3 = f"""
raw
    {DINO}   76.4 77.0
    {DEIT3}  75.8 81.6
    {EVA02}  79.4 80.3
    {CLIP}   80.9 83.4
    {REG}    80.9 81.6
    {DINOV2} 81.4 81.2
voc_denoised
    {DINO}   77.1 77.0
    {DEIT3}  77.0 82.1
    {EVA02}  80.2 80.5
    {CLIP}   81.7 83.5
    {REG}    81.4 81.8
    {DINOV2} 81.9 81.8
"""

# CorLoc on VOC07, VOC12, COCO20k
_TAB_4 = f"""
raw
    {REG}    38.0 41.5 26.9
    {DINOV2} 30.8 35.9 23.4
voc_denoised
    {REG}    56.1 59.3 45.5
    {DINOV2} 58.0 60.3 46.7
"""

# Tab. 5: k-NN mIoU; Tab. 1: MIC
_TABS_5_1 = f"""
raw
    {DINOV2} 65.35 0.44
    {CLIP}   -     0.11
    {DEIT3}  -     0.34
voc_denoised
    {DINOV2} 70.94 0.22
    {CLIP}   -     0.08
    {DEIT3}  -     0.06
artifacts
    {DINOV2} -     0.54
    {CLIP}   -     0.14
    {DEIT3}  -     0.32
"""


def _read(*tables: tuple[str, tuple[Key, ...]]) -> dict[tuple[str, str], Numbers]:
    """Numbers by backbone and kind: a line without indent says the kind of those below it, "-" that there is none."""
    numbers: dict[tuple[str, str], Numbers] = {}
    for table, columns in tables:
        kind = ""
        for line in filter(None, table.splitlines()):
            if not line.startswith(" "):
                kind = line
                continue
            backbone, *cells = line.split()
            row = {key: float(cell) for key, cell in zip(columns, cells, strict=True) if cell != "-"}
            numbers.setdefault((backbone, kind), {}).update(row)
    return numbers


PUBLISHED: dict[Source, dict[tuple[str, str], Numbers]] = {
    README: _read((_README, SEVEN)),
    PAPER: _read(
        (_TAB_2, (VOC, VOC_ACC, ADE, ADE_ACC, DELTA, ABSREL)),
        (_TABS_3_S3, (MAP, TOP1)),
        (_TAB_4, (LOST07, LOST12, LOST20K)),
        (_TABS_5_1, (KNN, MIC)),
    ),
}


def numbers_for(backbone: str, kind: str) -> dict[Source, Numbers]:
    """What each source says of a backbone's features: raw, of a folder of checkpoints, or "artifacts"; may be empty."""
    return {source: table[backbone, kind] for source, table in PUBLISHED.items() if (backbone, kind) in table}


def results(variant: Variant) -> list[tuple[str, Source, Numbers]]:
    """(features, source, numbers of the seven columns) of a published variant and its backbone; else nothing."""
    folder = _folder(variant)
    features = {"raw": "raw", folder: "distilled" if variant.distilled else "denoised"}
    kinds = {kind: numbers_for(variant.backbone, kind) for kind in features}
    return [
        (features[kind], source, {key: numbers[source][key] for key in SEVEN if key in numbers[source]})
        for source in PUBLISHED
        if source in kinds.get(folder, {})
        for kind, numbers in kinds.items()
        if source in numbers
    ]


def trained_on(variant: Variant) -> str | None:
    """The images the weights were trained on; those of voc_distilled as the authors' README says."""
    if variant.name == FOCUS.name:
        return (
            "freely licensed photographs and images composed of such, and tuned on PASCAL VOC and Clothing Co-Parsing"
        )
    return {
        "voc_denoised": "PASCAL VOC",
        "voc_distilled": "ImageNet-1k, with a denoiser of PASCAL VOC as its teacher",
        "imgnet_denoised": "ImageNet-1k",
        "imgnet_distilled": "ImageNet-1k",
    }.get(_folder(variant))


def _folder(variant: Variant) -> str:
    return (variant.hub_file or "").split("/")[0]
