"""The table of published numbers: each is of an evaluation that there is, and sums of the paper's hold."""

from functools import lru_cache
from pathlib import Path
from statistics import fmean

import pytest

from timm_dvt.publish.published import DINOV2, KNN, MAP, PAPER, PUBLISHED, README
from training.evaluate.__main__ import make_parser
from training.evaluate.data.datasets import DATASETS
from training.evaluate.features import pairs as pair_features
from training.evaluate.tasks import load_task, task_settings
from training.reproduction.jobs import Job, Options, job_of
from training.reproduction.published import BACKBONES, ROWS, TABLES, select


@pytest.mark.parametrize("protocol", ["fast", pytest.param("repository", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", [None, "paper"])
def test_each_number_is_one_that_an_evaluation_of_that_state_gives(protocol, recipe):
    options = Options(Path("data"), Path("out"), protocol, recipe)
    parse = lru_cache(make_parser().parse_args)
    for row in ROWS:
        job = job_of(row, options)
        if isinstance(job, str):
            assert row.made and recipe is None
            continue
        args = parse(job.command[1:])
        task = load_task(args.task, args.protocol)
        assert task.KIND in DATASETS[args.dataset].kinds
        task_settings(args.task, args.dataset, args.set, args.protocol)
        numbers = load_task(args.task).NUMBERS
        assert row.key[2] in numbers or row.key[2].split("/")[0] + "/" in numbers
        states = pair_features.STATES if args.pairs else ("distilled",) if "distilled" in args.model else task.STATES
        assert row.state in states
        assert args.model.startswith("local-dir:") == (
            recipe is not None and row.made != "pairs" and row.suffix == "dvt"
        )


def test_every_published_number_has_a_row_and_every_table_has_some():
    assert {row.table for row in ROWS} | {"7"} == set(TABLES)
    for source, models in PUBLISHED.items():
        for (backbone, _), numbers in models.items():
            for key, value in numbers.items():
                assert [
                    r for r in ROWS if (r.backbone, r.key, r.value, r.source) == (backbone, key, value, source.short)
                ]
    assert len({(r.table, r.key, r.backbone, r.state, r.suffix, r.settings, r.made) for r in ROWS}) == len(ROWS)


def test_averages_of_table_s2_are_the_papers():
    rows = [row for row in ROWS if row.table == "S2"]
    fixed = fmean(row.value for row in rows if row.settings)
    denoised = fmean(row.value for row in rows if row.state == "denoised")
    assert (round(fixed, 1), round(denoised, 1)) == (79.0, 79.9)  # its last column
    assert len(rows) == 3 * 6 and {row.key for row in rows} == {MAP}


def test_tables_5_and_6_agree_with_what_is_published_elsewhere():
    fifth = {row.state: row.value for row in ROWS if row.table == "5"}
    known = PUBLISHED[PAPER]
    assert fifth["raw"] == known[DINOV2, "raw"][KNN] and fifth["F+residual"] == known[DINOV2, "voc_denoised"][KNN]
    sixth = {row.made: row.value for row in ROWS if row.table == "6"}
    second = {row.state: row.value for row in select(["2"], [DINOV2]) if row.key == ("linear-seg", "voc", "mIoU")}
    assert (sixth[""], sixth["block"]) == (second["raw"], second["denoised"])


def test_a_model_that_nobody_published_has_the_papers_rows_without_values():
    own, known = select(TABLES, ["local-dir:mine"]), select(TABLES, [DINOV2])
    assert {row.value for row in own} == {None}
    paper = [row for row in known if row.source == PAPER.short and row.suffix == "dvt"]
    assert [(r.table, r.key, r.state) for r in own] == [(r.table, r.key, r.state) for r in paper]
    assert {row.source for row in select(["7"], BACKBONES)} == {README.short}


def test_rows_of_one_evaluation_share_its_job_wherever_the_folders_lie():
    first, second = (
        {job.name for row in ROWS if isinstance(job := job_of(row, Options(Path(data), Path(out))), Job)}
        for data, out in (("a", "b"), ("/c/d", "/e"))
    )
    assert first == second
    # 12 backbones' three tasks, four times distilled and so on: far fewer evaluations than numbers
    assert len(first) < len(ROWS) / 3
