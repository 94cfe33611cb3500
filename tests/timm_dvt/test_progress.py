"""What takes more than ten seconds shows a bar on stderr, with a rate and the time that is left; stdout stays clean."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from timm_dvt import bars, families
from timm_dvt.__main__ import main
from timm_dvt.bars import tqdm
from timm_dvt.publish import cards
from timm_dvt.registry import VARIANTS
from timm_dvt.viewer.demo import DEFAULT_MODEL
from timm_dvt.viewer.examples import gray
from timm_dvt.viewer.studio import Studio


def has_bar(err: str, unit: str, total: int) -> bool:
    return bool(re.search(rf"\b0/{total} \[00:00<\?, \?{unit}/s", err))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(bars, "LINE_EVERY", 0)


@pytest.fixture
def one_variant(monkeypatch):
    monkeypatch.setattr(cards, "publishable", lambda: [VARIANTS[DEFAULT_MODEL]])


@pytest.mark.usefixtures("at_once")
def test_families(capsys, monkeypatch):
    monkeypatch.setattr(families, "list_modules", lambda: ["mlp_mixer", "vision_transformer_relpos"])
    assert main(["families"]) == 0
    printed = capsys.readouterr()
    assert has_bar(printed.err, "module", 2)
    assert printed.out.splitlines() == ["MlpMixer: yes", "VisionTransformerRelPos: yes"]


@pytest.mark.usefixtures("at_once", "one_variant")
def test_cards_and_their_check(tmp_path, capsys):
    for more in ([], ["--check"]):
        assert main(["cards", "--out", str(tmp_path), *more]) == 0
        assert has_bar(capsys.readouterr().err, "card", 1)


@pytest.mark.usefixtures("at_once")
def test_calibrate_as_json(tmp_path, capsys):
    command = ["calibrate", "--model", "test_vit", "--no-pretrained", "--views", "32", "--json"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert has_bar(printed.err, "image", 32) and json.loads(printed.out)["folder"] == str(tmp_path)


@pytest.mark.usefixtures("at_once")
def test_the_pages_first_example_and_no_visitors_look(tmp_path, capsys):
    from tests.helpers.app_server import small_folder

    studio = Studio(f"local-dir:{small_folder(tmp_path)}")
    assert has_bar(capsys.readouterr().err, "state", 2)
    studio.compare(gray(), studio.first)
    assert "state" not in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_bar_is_lines_in_a_file_and_drawn_over_on_a_terminal_alone(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream())
    for _ in tqdm(range(3), "outer"):
        for _ in tqdm(range(2), "inner", leave=False):
            pass
    text = sys.stderr.getvalue()
    assert ("\r" in text) == ("\x1b" in text) == (stream is Terminal)
    if stream is not Terminal:
        lines = text.splitlines()
        assert lines[0].startswith("outer:   0%") and lines[-1].startswith("outer: 100%") and all(lines)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_is_soon_done_leaves_no_line_in_a_file(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream())
    assert list(tqdm(range(3), "short")) == [0, 1, 2]
    assert ("short" in sys.stderr.getvalue()) == (stream is Terminal)


def test_all_bars_are_those_that_a_file_can_be_of_too():
    root = Path(bars.__file__).parents[1]
    modules = [path for room in ("timm_dvt", "training") for path in (root / room).rglob("*.py")]
    assert [path.name for path in modules if "from tqdm import" in path.read_text()] == ["bars.py"]
