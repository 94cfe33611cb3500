"""The table of what is reproduced: a row a number that the authors published.

Values are those of timm_dvt.publish.published, and for Tabs. 5, 6 and S2 those that only stand here.
Tab. S2 gives DeiT-III and
CLIP interchanged against Tab. 3, whose order is kept. Of Fig. 7 the authors publish curves, no numbers: its panel (a)
is the README's small, base and large DINOv2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from timm_dvt.publish import published
from timm_dvt.publish.published import (
    CLIP,
    DEIT3,
    DINO,
    DINOV2,
    EVA02,
    KNN,
    MAP,
    PAPER,
    PUBLISHED,
    README,
    REG,
    VOC,
    Key,
)
from timm_dvt.registry import VARIANTS
from timm_dvt.variants import SUFFIXES, variant_name

TABLES = ("1", "2", "3", "4", "5", "6", "7", "S2", "S3", "README")
_TABLE_OF = {  # which of the paper's has a number; VOC's k-NN is Tab. 5's, below
    **dict.fromkeys(published.SEVEN, "2"),
    MAP: "3",
    **dict.fromkeys((published.LOST07, published.LOST12, published.LOST20K), "4"),
    published.TOP1: "S3",
    published.MIC: "1",
}


@dataclass(frozen=True)
class Row:
    """A number.

    Attributes:
        table: of `TABLES`.
        key: task, dataset and number, as in the results of training.evaluate.
        backbone: its full timm name.
        state: of its features, as in the results of training.evaluate.
        value: as published; None of a model that the authors say nothing of.
        source: where.
        suffix: of the published variant that is evaluated.
        settings: NAME=VALUE, where they are not the task's.
        made: what has to be made first: "" nothing but the denoiser; "pairs", maps of stage 1; or a denoiser's --arch.
    """

    table: str
    key: Key
    backbone: str
    state: str
    value: float | None
    source: str
    suffix: str = SUFFIXES["voc_denoised"]
    settings: tuple[str, ...] = ()
    made: str = ""


def _from_tables() -> Iterator[Row]:
    """The numbers of timm_dvt.publish.published."""
    for source, models in PUBLISHED.items():
        for (backbone, kind), numbers in models.items():
            state = kind.split("_")[-1]  # voc_denoised -> denoised; raw and artifacts are what they are
            suffix = SUFFIXES.get(kind, SUFFIXES["voc_denoised"])
            for key, value in numbers.items():
                if key == KNN:
                    continue
                table = "README" if source is README else _TABLE_OF[key]
                row = Row(table, key, backbone, state, value, source.short, suffix)
                yield row
                if key == MAP:
                    yield replace(row, table="S2")


# Tab. S2, "+fixed PE" on raw features. Tab. 5: k-NN on stage 1's maps. Tab. 6: the denoiser's architecture.
_FIXED_PE = {DINOV2: 81.5, REG: 81.2, CLIP: 80.9, DEIT3: 75.7, DINO: 75.8, EVA02: 78.7}
_TAB_5 = {"raw": 65.35, "view-average": 67.81, "F": 70.82, "F+residual": 70.94}
_TAB_6 = {"conv1x1": 82.15, "conv3x3": 83.27, "block": 84.84, "block-no-pe": 84.81}

ROWS: tuple[Row, ...] = (
    *_from_tables(),
    *(Row("S2", MAP, name, "raw", x, PAPER.short, settings=("fixed_pe=both",)) for name, x in _FIXED_PE.items()),
    *(Row("5", KNN, DINOV2, state, x, PAPER.short, made="pairs") for state, x in _TAB_5.items()),
    Row("6", VOC, DINOV2, "raw", 83.60, PAPER.short),
    *(Row("6", VOC, DINOV2, "denoised", x, PAPER.short, made=arch) for arch, x in _TAB_6.items()),
)
BACKBONES = tuple(dict.fromkeys(row.backbone for row in ROWS))


def select(tables: Sequence[str], models: Sequence[str]) -> list[Row]:
    """The rows of these tables for these backbones, by backbone.

    A model that the authors say nothing of has DINOv2-B's rows of the paper, without values.
    """
    sevens = [row for row in ROWS if row.table == "README" and "dinov2" in row.backbone and row.suffix == "dvt"]
    rows = [row for row in ROWS if row.table in tables]
    rows += [replace(row, table="7") for row in sevens if "7" in tables]
    blank = [
        replace(row, value=None, source="")
        for row in rows
        if row.backbone == DINOV2 and row.source == PAPER.short and row.suffix == "dvt"
    ]
    found = []
    for model in models:
        own = [row for row in rows if row.backbone == model]
        found += own if model in BACKBONES else [replace(row, backbone=model) for row in blank]
    return found


def evaluated(row: Row) -> str:
    """The published variant that gives a row's number, or the backbone itself, which may be a folder's."""
    name = variant_name(row.backbone, row.suffix)
    return name if name in VARIANTS else row.backbone
