"""The report: measured beside published, and Fig. 7 where results differ along its axis."""

import json

import pytest
from PIL import Image

from training.evaluate.published import DINOV2, LOST07, PUBLISHED, VOC
from training.report import main, read_rows


def result(folder, name, model, states, task="linear-seg", dataset="voc", parameters=86_000_000, **more):
    summaries = {
        state: {k: {"mean": v[0], "std": v[1], "values": [v[0]] * (2 if v[1] else 1)} for k, v in numbers.items()}
        for state, numbers in states.items()
    }
    record = {
        "task": task, "model": model, "dataset": dataset, "states": summaries, "difference": {}, "limit": None,
        "changed": [], "tags": {}, "parameters": parameters, **more,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record))


def table(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_measured_stands_above_what_is_published(tmp_path, capsys):
    states = {"raw": {"mIoU": (83.4, 0.1), "mAcc": (90.5, 0)}, "denoised": {"mIoU": (84.7, 0.2), "mAcc": (91.5, 0)}}
    result(tmp_path, "a", f"{DINOV2}_dvt", states)
    lost = {"raw": {"CorLoc/voc2007": (31.0, 0)}, "denoised": {"CorLoc/voc2007": (57.0, 0)}}
    result(tmp_path, "b", f"{DINOV2}_dvt", lost, task="discovery")
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
    rows = table((tmp_path / "report.md").read_text())
    assert rows[0] == ["model", "state", "source", "VOC12 mIoU", "VOC12 mAcc", "voc2007 CorLoc"]
    name = f"`{DINOV2}_dvt`"
    assert rows[2] == [name, "raw", "measured", "83.40 ± 0.10", "90.50", "31.00"]
    assert rows[3] == ["", "raw", "published", "83.6", "90.82", "30.8"]
    assert rows[4] == [name, "denoised", "measured", "84.70 ± 0.20", "91.50", "57.00"]
    assert rows[5] == ["", "denoised", "published", "84.84", "91.7", "58"]


def test_numbers_off_the_protocol_are_marked(tmp_path):
    result(tmp_path, "a", "m", {"raw": {"mIoU": (10.0, 0)}}, limit=5)
    result(tmp_path, "b", "n", {"raw": {"mIoU": (20.0, 0)}})
    main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "10.00\\* |" in text and "| 20.00 |" in text and "not the full protocol" in text


def test_published_numbers_are_the_papers():
    assert PUBLISHED[(DINOV2, "denoised")][VOC] == 84.84
    assert PUBLISHED[(DINOV2, "raw")][LOST07] == 30.8
    assert all(0 < value < 100 for numbers in PUBLISHED.values() for value in numbers.values())
    assert len(PUBLISHED) == 12 * 2 + 3 + 8  # raw and denoised, G of three, distilled ones


def test_figure_7_is_drawn_along_each_axis_that_has_two_places(tmp_path, capsys):
    for size, parameters, miou in (("small", 22e6, 81.0), ("base", 86e6, 83.5), ("large", 304e6, 83.4)):
        states = {"raw": {"mIoU": (miou, 0.2)}, "denoised": {"mIoU": (miou + 1.2, 0.1)}}
        result(tmp_path, size, f"vit_{size}_patch14_dinov2.lvd142m_dvt", states, parameters=int(parameters))
    for pairs, gain in ((100, 0.4), (1000, 0.9), (10000, 1.2)):
        states = {"raw": {"mIoU": (83.5, 0)}, "denoised": {"mIoU": (83.5 + gain, 0.1)}}
        result(tmp_path, f"p{pairs}", f"local-dir:denoiser_{pairs}", states, tags={"pairs": str(pairs)})
    assert main([str(tmp_path)]) == 0
    assert Image.open(tmp_path / "fig7a.png").size > (300, 200)
    assert (tmp_path / "fig7b.png").exists() and not (tmp_path / "fig7c.png").exists()
    assert "fig7c.png left out: fewer than two results differ in views" in capsys.readouterr().out
    assert [row.tags for row in read_rows(tmp_path) if row.tags][0] == {"pairs": "100"}


def test_a_folder_without_results_is_an_error(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err


def test_help_works():
    with pytest.raises(SystemExit):
        main(["--help"])
