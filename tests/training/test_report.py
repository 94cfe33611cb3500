"""The report: measured beside published, and Fig. 7 where results differ along its axis."""

import json
import os
import shlex
import subprocess
import sys
from html import escape

import pytest
from PIL import Image

from timm_dvt.publish.published import DINOV2, REG
from training.evaluate.data.datasets import DATASETS
from training.evaluate.results import meaning, numbers_of, read_rows
from training.evaluate.tasks import TASKS
from training.figures import plots
from training.report import draw, main


def result(folder, name, model, states, task="linear-seg", dataset="voc", parameters=86_000_000, **more):
    summaries = {
        state: {k: {"mean": v[0], "std": v[1], "values": [v[0]] * (2 if v[1] else 1)} for k, v in numbers.items()}
        for state, numbers in states.items()
    }
    record = {
        "task": task,
        "model": model,
        "dataset": dataset,
        "states": summaries,
        "difference": {},
        "limit": None,
        "changed": [],
        "tags": {},
        "parameters": parameters,
        **more,
    }
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
    name, readme, paper = f"`{DINOV2}_dvt`", "published, authors' README", "published, paper"
    assert rows[2] == [name, "raw", "measured", "83.40 ± 0.10", "90.50", "31.00"]
    assert rows[3] == ["", "raw", readme, "83.52", "90.6", ""]
    assert rows[4] == ["", "raw", paper, "83.6", "90.82", "30.8"]
    assert rows[5] == [name, "denoised", "measured", "84.70 ± 0.20", "91.50", "57.00"]
    assert rows[6] == ["", "denoised", readme, "84.92", "91.74", ""]
    assert rows[7] == ["", "denoised", paper, "84.84", "91.7", "58"]
    html = (tmp_path / "report.html").read_text()
    assert all(f"<td>{escape(row[2])}</td>" in html for row in rows[2:8])
    assert all(f'<td class="number">{escape(cell)}</td>' in html for row in rows[2:8] for cell in row[3:])
    assert "segmentation by one linear layer" in html and "found without any training" in html and "MIC:" not in html
    assert "published linear probes" in html.lower() and "http" not in html and "`" not in html


def test_two_folders_of_one_dataset_are_two_columns(tmp_path):
    for place, value in (("a/voc", 1.0), ("b/voc", 2.0), ("b/kitchen", 3.0)):
        states = {"raw": {"share": (value, 0)}}
        result(tmp_path, place.replace("/", "-"), "m", states, task="position", dataset="folder", data=f"/{place}")
    result(tmp_path, "camvid", "m", {"raw": {"share": (4.0, 0)}}, task="position", dataset="camvid", data="/c")
    assert main([str(tmp_path)]) == 0
    headings, _, row = table((tmp_path / "report.md").read_text())
    found = dict(zip(headings[3:], row[3:]))
    assert found == {
        "CamVid position %": "4.00",
        "/a/voc position %": "1.0000",
        "/b/voc position %": "2.00",
        "kitchen position %": "3.00",
    }


def test_depth_and_the_other_folders_of_checkpoints(tmp_path):
    depth = {"RMSE": (0.38, 0), "AbsRel": (0.12, 0), "delta1": (88.0, 0)}
    states = {"dvt_in1k": "denoised", "dvt_in1k_distilled": "distilled", "dvt_distilled": "distilled"}
    for suffix, state in states.items():
        result(tmp_path, suffix, f"{DINOV2}_{suffix}", {state: depth}, task="depth", dataset="nyu")
    assert main([str(tmp_path)]) == 0
    rows = table((tmp_path / "report.md").read_text())
    assert rows[0][3:] == ["NYUv2 delta1", "NYUv2 AbsRel", "NYUv2 RMSE"]
    published = [row[3:] for row in rows[:8] if row[2] == "published, authors' README"]
    assert published == [["88.25", "0.1207", "0.385"], ["88.5", "0.1152", "0.3832"], ["89.74", "0.1115", "0.3704"]]


def test_all_that_is_published_of_a_backbone_stands_below(tmp_path):
    result(tmp_path, "a", f"{DINOV2}_dvt", {"raw": {"mIoU": (83.4, 0.1)}})
    result(tmp_path, "b", REG, {"raw": {"mIoU": (83.4, 0.1)}})
    main([str(tmp_path)])
    rows = table((tmp_path / "report.md").read_text().split("Published linear probes:")[1])
    assert len(rows[0]) == 3 + 7 and rows[0][3:5] == ["VOC12 mIoU", "VOC12 mAcc"] and rows[0][7] == "NYUv2 RMSE"
    kinds = ("raw", "denoised, of VOC", "denoised, of ImageNet", "distilled, of VOC", "distilled, of ImageNet")
    assert [row[:2] for row in rows[2:] if "README" in row[2]] == [
        *([f"`{DINOV2}`", kind] for kind in kinds),
        *([f"`{REG}`", kind] for kind in kinds if "ImageNet" not in kind),
    ]
    assert rows[2][3:] == ["83.52", "90.6", "47.02", "58.45", "0.3965", "0.1197", "87.59"]
    assert rows[3][2:] == ["published, paper", "83.6", "90.82", "47.29", "59.18", "", "0.1238", "86.88"]


def test_numbers_off_the_protocol_are_marked(tmp_path):
    result(tmp_path, "a", "m", {"raw": {"mIoU": (10.0, 0)}}, limit=5)
    result(tmp_path, "b", "n", {"raw": {"mIoU": (20.0, 0)}})
    main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "10.00\\* |" in text and "| 20.00 |" in text and "not the full protocol" in text
    html = (tmp_path / "report.html").read_text()
    assert ">10.00*<" in html and ">20.00<" in html


def test_figure_7_is_drawn_along_each_axis_that_has_two_places(tmp_path, capsys, monkeypatch):
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
    rows = read_rows(tmp_path)
    assert [row.tags for row in rows if row.tags][0] == {"pairs": "100"}
    monkeypatch.setattr("training.report.draw_lines", lambda plots, axis: plots)
    # Of one size a line has one point, however many runs of it differ in pairs.
    for pairs, miou in ((50, 70.0), (60, 71.0)):
        name = "vit_base_patch14_dinov2.lvd142m_dvt"
        result(tmp_path, f"q{pairs}", name, {"raw": {"mIoU": (miou, 0)}}, tags={"pairs": str(pairs)})
    (raw,) = [line for line in draw(read_rows(tmp_path), "parameters")["VOC12 mIoU"] if line.state == "raw"]
    assert sorted(raw.points) == [(22.0, 81.0, 0.2), (86.0, 83.5, 0.2), (304.0, 83.4, 0.2)]


def test_the_page_says_in_words_what_a_figure_shows_and_what_each_number_is(tmp_path):
    for views in (8, 32):
        result(
            tmp_path, f"v{views}", "local-dir:a", {"raw": {"mIoU": (80 + views / 100, 0)}}, tags={"views": str(views)}
        )
    main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text()
    assert html.count("By the number of views from which each training target was made. Solid: denoiser on") == 2
    assert [task for task in TASKS if not numbers_of(task) or not meaning(task)] == []


def test_the_legend_of_a_figure_lies_below_its_axes(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    lines = [plots.Line(f"family {i}", "denoised", "-", False, [(1, 2, 0.1), (3, 4, 0)]) for i in range(3)]
    plots.draw_lines({"VOC12 mIoU": lines, "ADE20k mIoU": lines[:2]}, "views")
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    below = legend.get_window_extent().y1
    assert all(axes.get_tightbbox().y0 >= below and axes.get_legend() is None for axes in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == [f"family {i}, denoised" for i in range(3)]


def test_a_folder_without_results_is_an_error(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err


def test_files_are_written_whatever_reads_what_is_printed(tmp_path):
    result(tmp_path, "a", "m", {"raw": {"mIoU": (10.0, None)}})
    command = (
        f"{shlex.quote(sys.executable)} -m training.report {shlex.quote(str(tmp_path))} | true; echo ${{PIPESTATUS[0]}}"
    )
    ended = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert (tmp_path / "report.md").is_file() and (tmp_path / "report.html").is_file()
    assert ended.stdout.strip() in ("0", "141") and "Traceback" not in ended.stderr and "Exception" not in ended.stderr


def test_help_works():
    with pytest.raises(SystemExit):
        main(["--help"])


def test_results_of_two_protocols_stand_in_rows_of_their_own(tmp_path):
    result(tmp_path, "a", f"{DINOV2}_dvt", {"raw": {"mIoU": (80.0, 0)}})
    result(tmp_path, "b", f"{DINOV2}_dvt", {"raw": {"mIoU": (83.5, 0)}}, protocol="repository")
    rows = read_rows(tmp_path)
    cells = {row.tags.get("protocol", "fast"): row.cells["linear-seg", "voc", "mIoU"][0] for row in rows}
    assert cells == {"fast": 80.0, "repository": 83.5}


def test_every_number_of_every_task_and_dataset_is_shown_also_of_those_that_are_not_known(tmp_path):
    wanted = []
    for task in [*TASKS, "new-task"]:
        for dataset in [*DATASETS, "new-set"]:
            names = [f"{name}{dataset}" if name.endswith("/") else name for name in numbers_of(task)] or ["some/number"]
            values = {name: (len(wanted) + i + 1, 0) for i, name in enumerate(names)}
            wanted += [f"{value:.{2 if value >= 2 else 4}f}" for value, _ in values.values()]
            result(tmp_path, f"{task}-{dataset}", "m", {"raw": values, "new-state": values}, task=task, dataset=dataset)
    assert main([str(tmp_path)]) == 0
    head, _, *rows = table((tmp_path / "report.md").read_text())
    assert [row[1] for row in rows] == ["raw", "new-state"] and len(head) == 3 + len(wanted)
    assert all(sorted(row[3:], key=float) == wanted for row in rows)
    assert len(set(head)) == len(head) and "new-set new-task some/number" in head


def test_a_broken_result_is_named(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.json").write_text('{"task": ')
    assert main([str(tmp_path)]) == 2
    assert f"{tmp_path / 'torn.json'} is no result" in capsys.readouterr().err
    (tmp_path / "torn.json").unlink()
    for other in ({"states": 4}, {"states": {"raw": {"x": 3}}}, {"states": {"raw": {"x": {"mean": None}}}}):
        record = {"task": "t", "dataset": "d", "model": "m", "parameters": 1, **other}
        (tmp_path / "other.json").write_text(json.dumps(record))
        assert main([str(tmp_path)]) == 2
        assert f"{tmp_path / 'other.json'} is no result" in capsys.readouterr().err


def draw_points(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.report.draw_lines", lambda plots, axis: plots)
        (lines,) = draw(read_rows(folder), "parameters").values()
    return lines


def test_maps_of_pairs_stand_in_rows_of_their_own_and_in_no_figure(tmp_path):
    for size, parameters in (("small", 22_000_000), ("base", 86_000_000)):
        name = f"vit_{size}_patch14_dinov2.lvd142m"
        result(tmp_path, size, name, {"raw": {"mIoU": (81.0, 0)}}, parameters=parameters)
        maps = {state: {"mIoU": (55.0, 0)} for state in ("raw", "F", "F+residual", "raw-G", "mean")}
        for folder in ("a/pairs", "b/pairs"):
            more = {"pairs": ["12ab"], "pair_folders": [folder], "parameters": parameters}
            result(tmp_path, f"{size}-{folder[0]}", name, maps, **more)
    assert main([str(tmp_path)]) == 0
    rows = [row for row in table((tmp_path / "report.md").read_text())[2:] if row[2] == "measured"]
    assert [row[1] for row in rows] == ["raw", *2 * list(maps)] * 2
    assert [row[3] for row in rows if row[1] == "raw"] == ["81.00", "55.00", "55.00"] * 2
    points = {line.state: sorted(line.points) for line in draw_points(tmp_path)}
    assert points["raw"] == [(22.0, 81.0, 0.0), (86.0, 81.0, 0.0)]
