"""Every command line says how it is used: a stray % or a broken option would only show when a user asks."""

import argparse
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

(_VERBS,) = (a for a in commands._parser()._actions if isinstance(a, argparse._SubParsersAction))
VERBS = list(_VERBS.choices)


def command_lines():
    """Names of the modules of both packages that read a command line."""
    for package in (training, timm_dvt):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = Path(importlib.util.find_spec(module.name).origin).read_text()
            if "ArgumentParser(" in source and "def main(" in source:
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


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example_that_the_command_line_takes(verb, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/timm-dvt"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        commands.main([verb, "--help"])
    assert leaving.value.code == 0
    (example,) = re.findall(r"^Example: timm-dvt (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert commands._parser().parse_args(example.split()).command == verb


def test_the_installed_command_and_the_module_are_the_same():
    declared = configparser.ConfigParser()
    declared.read("setup.cfg")
    (script,) = declared["options.entry_points"]["console_scripts"].split("\n")[1:]
    name, _, function = script.partition(" = ")
    module, _, attribute = function.partition(":")
    assert name == "timm-dvt" and getattr(importlib.import_module(module), attribute) is commands.main


@pytest.mark.parametrize("statement", ["import timm_dvt", "import timm_dvt.__main__"])
def test_what_only_one_verb_needs_is_not_imported_before_it(statement):
    code = f"import sys; {statement}; print([m for m in ('gradio', 'onnx', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "timm_dvt.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert commands.main(["app"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install "gradio>=' in error
