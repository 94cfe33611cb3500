"""Every command line says how it is used: a stray % or a broken option would only show when a user asks."""

import configparser
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import timm_dvt
import training
from timm_dvt import __main__ as commands
from timm_dvt.images import PHOTOGRAPHS
from timm_dvt.verbs import VERBS, parser_for


def command_lines():
    """Names of the modules of both packages that read a command line."""
    for package in (training, timm_dvt):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = Path(importlib.util.find_spec(module.name).origin).read_text()
            if re.search(r"(ArgumentParser|parser_for|command_parser)\(", source) and "def main(" in source:
                yield module.name


def test_the_command_lines_are_found():
    assert {"training.denoise_images", "training.benchmark.stage1", "timm_dvt.__main__"} <= set(command_lines())


@pytest.mark.parametrize("name", list(command_lines()))
def test_help_exits_with_0_and_names_its_options(name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(name).main(["--help"])
    assert leaving.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_of_the_command_need_no_torch(option):
    code = (
        f"import sys; sys.argv = ['timm-dvt', {option!r}]; sys.modules.update(torch=None, timm=None); import timm_dvt"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "") and "timm-dvt" in answer.stdout


IN = ["--images", "photos", "--out", "OUT", "--model", "nobody_s_model"]
NUMBERS = {  # a command line with a number that is too small, and the smallest that is not
    "training.denoise_images": (IN, {"--views": 3, "--crops": 0, "--field-steps": 2, "--batch-size": 1, "--limit": 1}),
    "training.make_denoiser": (IN, {"--views": 3, "--limit": 4, "--steps": 1, "--input-size": 1}),
    "training.distill": (IN, {"--input-size": 1, "--batch-size": 1, "--seed": 0}),
    "training.train_denoiser": (["--pairs", "pairs", *IN[2:]], {"--blocks": 1, "--steps": 1, "--workers": 0}),
    "training.visualize": (["cat.jpg", *IN[4:]], {"--views": 3, "--stride": 1, "--limit": 1}),
    "training.evaluate.__main__": (["mic", "--dataset", "voc", "--data", "D", *IN[4:]], {"--repeats": 1, "--limit": 1}),
    "training.stamps": (IN[2:4], {"--size": 32, "--train": 0}),
    "training.benchmark.denoiser": ([], {"--seconds": 0, "--pairs": 1, "--unseen": 1, "--grid": 2, "--seed": 0}),
    "training.benchmark.field_step": ([], {"--channels": 1, "--grid": 1, "--rounds": 1, "--threads": 1}),
    "training.benchmark.inference": ([], {"--batch-sizes": 1, "--size": 1, "--rounds": 1, "--threads": 1}),
    "training.benchmark.stage1": ([], {"--views": 3, "--field-steps": 2, "--counts": 3, "--input-size": 1}),
    "training.benchmark.train_denoiser": ([], {"--grid": 2, "--steps": 1, "--rounds": 1, "--batch-size": 1}),
    "training.benchmark.upsampling": (["--data", "D"], {"--images": 1, "--views": 3, "--input-size": 1, "--scale": 1}),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_too_small_is_refused_before_anything_is_done_as_the_help_says(
    name, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    command, (arguments, numbers) = importlib.import_module(name), NUMBERS[name]
    for option, least in numbers.items():
        with pytest.raises(SystemExit) as leaving:
            command.main([*arguments, option, str(least - 1)])
        error = capsys.readouterr().err
        assert leaving.value.code == 2 and f"{option}: must be {least} or more, got {least - 1}\n" in error
        if least > 1:
            with pytest.raises(SystemExit):
                command.main(["--help"])
            (line,) = re.findall(rf"^ +{option} .*$", capsys.readouterr().out, re.MULTILINE)
            assert line.endswith(f"; {least} or more")
    assert not list(tmp_path.iterdir())


PLUG_IN = {  # command lines of the verbs, each with one empty word
    "demo": (["--out", ""], ["--model", ""], [""]),
    "app": (["--model", ""],),
    "inspect": (["--model", ""], ["--model", "M", "--images", ""], ["--model", "M", "--out", ""]),
    "calibrate": (["--model", "M", "--out", ""],),
    "extract": (["", "--model", "M", "--out", "O"], ["S", "--model", "M", "--out", ""]),
    "convert": (["--model", "M", "--out", ""], ["", "--model", "M", "--out", "O"]),
    "cards": (["--out", ""],),
    "push": (["D", "--repo", ""],),
}
EMPTY = [("timm_dvt.__main__", [verb, *words]) for verb, lines in PLUG_IN.items() for words in lines]
EMPTY += [
    ("training.denoise_images", ["--images", "", "--out", "O", "--model", "M"]),
    ("training.train_denoiser", ["--pairs", "P", "--out", "O", "--model", "M", "--init", ""]),
    ("training.distill", ["--images", "I", "--out", "", "--model", "M"]),
    ("training.visualize", ["--model", "M", "I", ""]),
    ("training.visualize", ["I", "--model", "M", "--video", ""]),
    ("training.evaluate.__main__", ["mic", "--dataset", "voc", "--data", "D", "--model", "M", "--out", ""]),
    ("training.benchmark.extract", ["--model", ""]),
]


@pytest.mark.parametrize(("name", "words"), EMPTY)
def test_an_empty_word_as_of_a_variable_that_is_unset_is_refused_by_the_name_of_its_option(
    name, words, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        importlib.import_module(name).main(words)
    before = words[words.index("") - 1] if words.index("") else ""
    option = before if before.startswith("--") else ""
    assert leaving.value.code == 2 and not list(tmp_path.iterdir())
    assert re.search(rf"error: argument {option}.*: must not be empty\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("training.denoise_images", "given_images", IN),
        ("training.visualize", "pick_device", ["cat.jpg", *IN[4:]]),
        ("training.make_denoiser", "run", IN),
        ("training.evaluate.__main__", "run", ["mic", "--dataset", "voc", "--data", "D", *IN[4:]]),
        ("training.reproduce", "run", ["--data", "D", "--out", "OUT"]),
        ("training.report", "read_rows", ["D"]),
    ],
)
@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_a_bug_shows_its_traceback_and_is_no_line_for_the_person_at_the_keyboard(name, part, words, kind, monkeypatch):
    def fail(*args, **options):
        raise kind("a bug")

    command = importlib.import_module(name)
    monkeypatch.setattr(command, part, fail)
    with pytest.raises(kind, match="a bug"):
        command.main(words)


RANDOM = ["--model", "test_vit", "--no-pretrained"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm_dvt.__main__", ["inspect", *RANDOM, "--views", str(10**15)]),
        ("timm_dvt.__main__", ["extract", str(PHOTOGRAPHS[0]), *RANDOM, "--out", "O", "--size", str(10**12)]),
        ("training.denoise_images", ["--images", str(PHOTOGRAPHS[0]), *RANDOM, "--out", "O", "--views", str(10**15)]),
        ("training.visualize", [str(PHOTOGRAPHS[0]), *RANDOM, "--out", "o.png", "--views", str(10**15)]),
        ("training.benchmark.__main__", ["denoiser", "--grid", str(10**8), "--pairs", "1"]),
    ],
)
def test_what_memory_does_not_suffice_for_is_one_line(name, words, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(name).main(words) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: too little memory; smaller numbers take less (")


def test_calibrate_says_how_many_views_it_needs_before_anything_is_done(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        commands.main(["calibrate", "--help"])
    assert "at the most, 32 or more" in capsys.readouterr().out
    assert commands.main(["calibrate", "--model", "x", "--out", str(tmp_path / "out"), "--views", "31"]) == 2
    assert "views is 31" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_training_needs_is_what_its_extra_installs():
    declared = configparser.ConfigParser()
    declared.read("setup.cfg")
    packages = re.findall(r"^[\w-]+", declared["options.extras_require"]["train"], re.MULTILINE)
    assert list(training._NEEDED) == [{"scikit-learn": "sklearn"}.get(name, name) for name in packages]


@pytest.mark.parametrize("name", ["training.stamps", "training.make_denoiser", "training.benchmark"])
def test_without_posix_locks_training_says_in_one_line_what_it_needs(name):
    code = f"import sys, runpy; sys.modules['fcntl'] = None; runpy.run_module({name!r}, run_name='__main__')"
    windows = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert windows.returncode == 2 and windows.stderr.count("\n") == 1
    assert windows.stderr.startswith("error: training needs the file locks of Linux or macOS")


@pytest.mark.slow
def test_the_plug_in_needs_nothing_that_windows_lacks_and_imports_nothing_that_only_one_verb_needs():
    code = (
        "import sys; sys.modules.update(fcntl=None, resource=None, pwd=None); import timm_dvt.__main__\n"
        "print([m for m in ('gradio', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example_that_the_command_line_takes(verb, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/timm-dvt"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        commands.main([verb, "--help"])
    assert leaving.value.code == 0
    (example,) = re.findall(r"^Example: timm-dvt (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert parser_for(example.split()).parse_args(example.split()).command == verb


def test_the_installed_command_and_the_module_are_the_same():
    declared = configparser.ConfigParser()
    declared.read("setup.cfg")
    (script,) = declared["options.entry_points"]["console_scripts"].split("\n")[1:]
    name, _, function = script.partition(" = ")
    module, _, attribute = function.partition(":")
    assert name == "timm-dvt" and getattr(importlib.import_module(module), attribute) is commands.main


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "timm_dvt.viewer.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert commands.main(["app"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install "gradio>=' in error
