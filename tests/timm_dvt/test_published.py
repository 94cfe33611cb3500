"""The published numbers: against sums over the authors' own tables, taken from them by another way."""

import pytest

from timm_dvt.publish import published
from timm_dvt.publish.published import ABSREL, ADE, ADE_ACC, DELTA, PAPER, PUBLISHED, README, RMSE, SEVEN, VOC, VOC_ACC
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import published_variants

# Columns added up by cutting the lines of the authors' README at its bars; of the paper's Tab. 2 with awk.
SUMS = {
    "raw": (12, 903.29, 1012.45, 481.69, 618.21, 5.4436, 1.6609, 879.64),
    "voc_denoised": (12, 922.49, 1027.88, 492.80, 629.70, 6.0282, 1.8447, 950.91),
    "voc_distilled": (8, 593.85, 667.00, 309.66, 398.24, 3.6961, 1.1414, 540.78),
    "imgnet": (2, 170.50, 183.03, 97.53, 121.07, 0.7536, 0.2267, 178.24),
}
TAB_2 = {
    "raw": (450.16, 508.59, 237.23, 305.05, 457.74, 0.9585),
    "voc_denoised": (461.08, 516.06, 245.94, 315.84, 463.86, 0.9521),
}


@pytest.mark.parametrize("kind", SUMS)
def test_the_columns_of_the_readme_add_up(kind):
    rows = [numbers for (_, folder), numbers in PUBLISHED[README].items() if folder.startswith(kind)]
    count, *sums = SUMS[kind]
    assert len(rows) == count
    assert [sum(row.get(key, 0) for row in rows) for key in SEVEN] == pytest.approx(sums, abs=1e-6)


@pytest.mark.parametrize("kind", TAB_2)
def test_the_columns_of_the_papers_table_2_add_up(kind):
    rows = [numbers for (_, row), numbers in PUBLISHED[PAPER].items() if row == kind and VOC in numbers]
    keys = (VOC, VOC_ACC, ADE, ADE_ACC, DELTA, ABSREL)
    assert [sum(row[key] for row in rows) for key in keys] == pytest.approx(TAB_2[kind], abs=1e-6)


def test_some_numbers_one_by_one():
    """As printed, so that no two columns, rows or tables are exchanged."""
    readme, paper = PUBLISHED[README], PUBLISHED[PAPER]
    base, dino = published.DINOV2, published.DINO
    assert list(readme[base, "imgnet_distilled"].values()) == [85.33, 91.48, 48.85, 60.47, 0.3704, 0.1115, 89.74]
    assert list(readme[dino, "voc_distilled"].values()) == [66.80, 78.47, 32.68, 42.58, 0.5750, 0.1696, 73.86]
    assert readme["vit_large_patch14_reg4_dinov2.lvd142m", "raw"][RMSE] == 0.3852
    assert (readme[published.EVA02, "voc_denoised"][RMSE], RMSE in readme[published.EVA02, "raw"]) == (0.6196, False)
    assert (paper[base, "voc_denoised"][VOC], paper[base, "raw"][published.LOST07]) == (84.84, 30.8)
    assert (paper[base, "voc_denoised"][published.KNN], paper[base, "artifacts"][published.MIC]) == (70.94, 0.54)
    assert (paper[published.CLIP, "raw"][published.TOP1], paper[dino, "raw"][published.MAP]) == (83.4, 76.4)


def test_every_published_checkpoint_has_its_numbers_and_nothing_else_has():
    folders = {(v.backbone, v.hub_file.split("/")[0]) for v in published_variants() if v.hub_file}
    assert {key for key in PUBLISHED[README] if key[1] != "raw"} == folders
    assert published.results(VARIANTS["vit_small_patch14_dinov2.focus_dvt"]) == []
    assert published.results(VARIANTS["vit_giant_patch14_dinov2.lvd142m_dvt"]) == []
