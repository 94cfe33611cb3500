"""Ours beside the published: verdicts, marks, and tables as the paper prints them."""

import pytest

from timm_dvt.publish.published import DINOV2, REG, VOC
from training.reproduction.published import ROWS, select
from training.reproduction.results import Outcome, cells, grid, outcome, results_page, results_table


def record(**states):
    summaries = {
        state: {"mIoU": {"mean": mean, "std": std, "values": [mean] * count}}
        for state, (mean, std, count) in states.items()
    }
    return {"result": {"states": summaries, "limit": None, "changed": []}}


@pytest.mark.parametrize(
    "mean, std, verdict",
    [
        (83.6, 0.0, "within"),
        (83.604, 0.0, "within"),  # the paper prints 83.60
        (83.61, 0.0, "outside"),
        (83.0, 0.3, "within"),
        (82.9, 0.3, "outside"),
    ],
)
def test_a_difference_is_within_two_standard_deviations_or_the_rounding(mean, std, verdict):
    (row,) = (r for r in select(["2"], [DINOV2]) if r.key[1:] == ("voc", "mIoU") and r.state == "raw")
    one = outcome(row, record(raw=(mean, std, 3)))
    assert row.value == 83.6 and one.difference == pytest.approx(mean - 83.6)
    assert one.verdict == verdict == cells(one)[-1]
    html = results_page([one]).decode()
    assert ('<tr class="green">' in html) == (verdict == "within")
    assert f"| {verdict} |" in results_table([one])


def test_what_has_no_number_says_why_and_a_trial_is_marked():
    row = select(["2"], [DINOV2])[0]
    assert outcome(row, {}).verdict == "not run" and outcome(row, {"error": "no data"}).reason == "no data"
    assert cells(outcome(row, {}), ["no data", "not run yet"])[-1] == "not run (b)"
    assert "it has denoised" in outcome(row, record(denoised=(1.0, 0.0, 1))).reason
    full = record(raw=(1.0, 0.0, 1))
    assert cells(outcome(row, full))[4] == "1.00"
    for change in ({"limit": 4}, {"changed": ["steps=3"]}, {"protocol": "fast"}):
        assert cells(outcome(row, {"result": full["result"] | change}))[4] == "1.00*"
    assert cells(outcome(row, full | {"command": ["linear-seg", "--input-size=98"]}))[4] == "1.00*"
    (missing,) = (r for r in select(["4"], [DINOV2]) if r.key[2] == "CorLoc/voc2007" and r.state == "raw")
    assert outcome(missing, full).reason == "voc has no images for CorLoc/voc2007"


def test_a_table_stands_as_the_paper_prints_it():
    rows = [row for row in ROWS if row.table == "2" and row.backbone in (DINOV2, REG)]
    outcomes = [Outcome(row, "", row.value + 1, 0.1, 3) if row.key == VOC else Outcome(row, "no data") for row in rows]
    headings, lines = grid(outcomes, ["other", "no data"])
    assert headings[:5] == ["model", "state", "VOC12 mIoU", "VOC12 mAcc", "ADE20k mIoU"] and len(headings) == 8
    assert [line[:4] for line in lines if line[0] == DINOV2] == [
        [DINOV2, "raw", "84.60 (83.60)", "- b (90.82)"],
        [DINOV2, "denoised", "85.84 (84.84)", "- b (91.70)"],
    ]
    assert len(lines) == 4 and [line[0] for line in lines] in ([DINOV2] * 2 + [REG] * 2, [REG] * 2 + [DINOV2] * 2)
