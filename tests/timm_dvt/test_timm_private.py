"""What is private in timm is taken in one place, and a timm that lacks some of it is told by name."""

import ast
from importlib import import_module
from pathlib import Path

import pytest
import timm

from timm_dvt import timm_private
from timm_dvt.timm_private import WHY

PACKAGE = Path(__file__).parents[2] / "timm_dvt"


def imported(path: Path) -> list[str]:
    """The full names that a module imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_no_module_imports_what_is_private_in_timm(path):
    private = [name for name in imported(path) if name.startswith("timm.") and "._" in name]
    assert not private, f"take it from timm_dvt/timm_private.py: {private}"


@pytest.mark.parametrize("name", WHY)
def test_a_timm_without_a_private_name_is_told_by_that_name(name, monkeypatch):
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute), f"timm {timm.__version__} has no {name}: {WHY[name]}"
    monkeypatch.delattr(f"{module}.{attribute}")
    with pytest.raises(ImportError, match=f"This timm has no {name}, which timm_dvt needs for: "):
        timm_private.look_up(name)
