"""The results that training.evaluate wrote: read from their folder, and what their numbers are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm_dvt.published import Key

# The paper's columns in its order (Tabs. 2, 3, 4, S3, 5, 1, and Fig. 3 in a number): task, number, heading.
COLUMNS = (
    ("linear-seg", "mIoU", "mIoU"),
    ("linear-seg", "mAcc", "mAcc"),
    ("depth", "delta1", "delta1"),
    ("depth", "AbsRel", "AbsRel"),
    ("depth", "RMSE", "RMSE"),
    ("detection", "mAP_11", "mAP, 11 points"),
    ("discovery", "CorLoc/", "CorLoc"),
    ("attentive-probe", "top1", "top-1"),
    ("propagation", "J&F", "J&F"),
    ("propagation", "J", "J"),
    ("propagation", "F", "F"),
    ("knn-seg", "mIoU", "k-NN mIoU"),
    ("mic", "mic", "MIC"),
    ("mic", "mic_shuffled", "MIC by chance"),
    ("position", "share", "position %"),
    ("position", "zero_correlation", "zero-image corr."),
    ("blank", "ratio", "blank ratio"),
    ("blank", "ratio_noise", "noise ratio"),
    ("blank", "of_photographs", "blank, % of photographs"),
)
NAMES = {
    "voc": "VOC12",
    "ade20k": "ADE20k",
    "nyu": "NYUv2",
    "coco": "COCO",
    "imagefolder": "ImageFolder",
    "camvid": "CamVid",
    "davis": "DAVIS",
}
STATES = ("raw", "denoised", "artifacts", "distilled")
MEANINGS = {  # of a task's numbers, for who has not read the paper
    "linear-seg": "mIoU, mAcc: segmentation by one linear layer on the patches, in percent; more is better.",
    "depth": "delta1 (percent, more is better), AbsRel and RMSE (less is better): depth by one linear layer.",
    "detection": "mAP: detection of objects by a small head on the patches, in percent; more is better.",
    "discovery": "CorLoc: images of which one object is found without any training, in percent; more is better.",
    "attentive-probe": "top-1: images whose class a head with attention over the patches finds, in percent.",
    "knn-seg": "k-NN mIoU: segmentation by the nearest labelled patches, in percent; more is better.",
    "propagation": "J, F, J&F: objects of a video's first frame, found in all others by the nearest patches: regions, "
    "boundaries, mean of both, in percent; more is better.",
    "mic": "MIC: how well single channels tell the position of a patch, from 0 to 1; beside it what chance gives.",
    "position": "position %: share of the variance that the place of a patch explains. zero-image corr.: how alike the "
    "mean map is to that of a blank image, from -1 to 1. Both are near 0 where features do not know their place.",
    "blank": "blank ratio, noise ratio: how far patches of an image of one color, or of noise, still differ by their "
    "place, with the denoiser on over off; 0 is clean. blank, % of photographs: the same over how photographs' differ.",
}


@dataclass
class Row:
    """What is known of one model in one state.

    Attributes:
        model: as it was named.
        state: "raw", "denoised", "artifacts" or "distilled".
        tags: pairs=N and so on.
        parameters: of the whole model.
        cells: {column: (mean, spread or None, whether of the full protocol)}.
    """

    model: str
    state: str
    tags: dict[str, str]
    parameters: int
    cells: dict[Key, tuple[float, float | None, bool]] = field(default_factory=dict)


def read_rows(folder: Path) -> list[Row]:
    """The results of a folder by model, tags and state, in order of their names.

    Raises:
        ValueError: there is no result in the folder.
    """
    rows: dict[tuple, Row] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        result: dict[str, Any] = json.loads(path.read_text())
        if "task" not in result or "states" not in result:
            continue
        whole = not result["limit"] and not result["changed"]
        protocol = result.get("protocol", "fast")  # results before there were several do not say
        tags = result["tags"] | ({} if protocol == "fast" else {"protocol": protocol})
        for state, numbers in result["states"].items():
            key = (result["model"], tuple(sorted(tags.items())), state)
            row = rows.setdefault(key, Row(result["model"], state, tags, result["parameters"]))
            for name, summary in numbers.items():
                spread = summary["std"] if len(summary["values"]) > 1 else None
                row.cells[(result["task"], result["dataset"], name)] = (summary["mean"], spread, whole)
    if not rows:
        raise ValueError(f"no results in {folder}: python -m training.evaluate TASK --out {folder} writes them")
    return sorted(rows.values(), key=lambda row: (row.model, sorted(row.tags.items()), STATES.index(row.state)))


def columns_of(rows: Sequence[Row]) -> list[Key]:
    """The columns that have a measured number, in the paper's order."""
    present = list(dict.fromkeys(key for row in rows for key in row.cells))
    ordered = []
    for task, number, _ in COLUMNS:
        ordered += sorted(
            (key for key in present if key[0] == task and _is_number(key[2], number)),
            key=lambda key: [*NAMES, "stamps", "folder"].index(key[1]),
        )
    return ordered


def heading(key: Key) -> str:
    """A column's name: dataset and number."""
    task, dataset, number = key
    if task == "discovery":
        return f"{number.removeprefix('CorLoc/')} CorLoc"
    if (task, dataset) == ("detection", "voc"):
        return "VOC07 mAP (11 points)"
    title = next(title for t, n, title in COLUMNS if t == task and _is_number(number, n))
    return f"{NAMES.get(dataset, dataset)} {title}"


def _is_number(name: str, wanted: str) -> bool:
    return name.startswith(wanted) if wanted.endswith("/") else name == wanted
