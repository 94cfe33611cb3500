"""Every command line says how it is used: a stray % or a broken option would only show when a user asks."""

import importlib.util
import pkgutil
from pathlib import Path

import pytest

import timm_dvt
import training


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
