"""Claims about `python -m training.benchmark`: it tells what there is, and runs what it tells."""

import importlib
import re

import pytest
import timm

from timm_dvt import bars
from training.benchmark import field_step, inference
from training.benchmark.__main__ import main

VARIANT = "vit_small_patch14_dinov2.lvd142m_dvt"


def told(capsys) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_help_names_each_benchmark_and_each_can_be_run(capsys):
    names = re.findall(r"^  (\w+) +\S", told(capsys).split("help message and exit")[1], re.MULTILINE)
    assert {"stage1", "inference", "field_step"} <= set(names)
    for name in names:
        assert callable(importlib.import_module(f"training.benchmark.{name}").main)


def test_what_a_model_cannot_do_is_one_line(capsys):
    words = ["--model", "test_vit", "--images", "2", "--rounds", "1", "--size", "50"]
    assert main(["extract", *words]) == 2
    assert "--size must be a multiple of 16" in capsys.readouterr().err
    assert main(["inference", "--models", VARIANT, "--size", "15", "--skip-import"]) == 2
    assert "--size must be a multiple of the patch size 14 of" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["scenes"], ["_scenes"], ["nonsense"]])
def test_what_is_no_benchmark_is_one_clear_line(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error:" in last and ("'stage1'" in last if arguments else "NAME" in last)


def test_field_step_tells_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(field_step, "fit_field", lambda *_, progress, **__: [progress(50) for _ in range(4)])
    for setting in ("set_num_threads", "set_flush_denormal"):  # which would outlast this test
        monkeypatch.setattr(field_step.torch, setting, lambda _: None)
    monkeypatch.setattr(field_step, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bars, "LINE_EVERY", 0)  # however fast the machine is
    assert main(["field_step", "--rounds", "2", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    assert "0/400 [00:00<?, ?step/s]" in printed.err and re.search(r"\b[1-9]\d*/400 ", printed.err)
    assert "phase 2" in printed.out


def test_the_published_arrangement_stands_beside_denoisers_of_its_kind_alone():
    """Which is a block and nothing behind it."""
    for more, same in (({}, True), ({"keep_length": True}, False), ({"pos_embed_out": True}, False)):
        model = timm.create_model(VARIANT, img_size=28, denoiser={"grid_size": 2, **more}).eval()
        assert ("published (map)" in inference.arrangements(VARIANT, model)) == same
