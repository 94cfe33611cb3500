"""Claims about the rooms of `training`: imports flow one way, so that each can be read without those above it."""

import ast
import functools
from pathlib import Path

import pytest

TRAINING = Path(__file__).parents[1] / "training"
# From the ground up. Rooms of one floor do not import each other.
FLOORS = (
    {"common"},
    {"loop", "figures"},
    {"pairs"},
    {"stage1", "stage2", "stage3", "evaluate"},
    {"reproduction"},
    {"commands", "benchmark", "rivals"},
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    """training.stage1.linear.solver -> stage1; a module that lies in no room is a command."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (TRAINING / parts[1]).is_dir() else "commands"


@functools.cache
def imports() -> list[tuple[str, str]]:
    """(importing module, imported module) of all of `training`."""
    found = []
    for path in sorted(TRAINING.rglob("*.py")):
        module = ".".join(path.relative_to(TRAINING.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if _is_module(name) else node.module for name in names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found += [(module, name) for name in names if name.startswith("training.")]
    return found


def _is_module(name: str) -> bool:
    path = TRAINING.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def test_every_folder_of_training_is_a_room_with_a_floor():
    rooms = {path.name for path in TRAINING.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(FLOOR_OF) - {"commands"}


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_a_room_imports_only_itself_and_the_floors_below(room):
    upwards = [
        f"{module} imports {name}"
        for module, name in imports()
        if room_of(module) == room != room_of(name) and FLOOR_OF[room_of(name)] >= FLOOR_OF[room]
    ]
    # A benchmark measures commands as users start them.
    assert [line for line in upwards if room != "benchmark" or room_of(line.split()[-1]) != "commands"] == []


def test_no_command_imports_a_command():
    between = [(a, b) for a, b in imports() if room_of(a) == room_of(b) == "commands" and a != b]
    assert between == []


# Of the plug-in: a flat core, and rooms that stand on it. A module may import those of its own floor and of lower ones.
PLUG_IN = (
    {"errors", "options", "version", "verbs", "interrupts", "bars", "tables", "defaults", "timm_private"},
    {"images", "image_files", "layouts", "variants", "architectures", "flat", "denoiser"},
    {"feature_methods", "denoised", "attach", "reading", "families"},
    {"weights"},
    {"building", "registry", "loading", "shared_folder"},
    {"viewer", "listing"},
    {"extraction"},
    {"calibration"},  # draws its picture with the viewer's panel
    {"publish", "inspection"},
    {"__init__", "__main__"},
)
FLOOR_IN_PLUG_IN = {name: number for number, names in enumerate(PLUG_IN) for name in names}


def test_the_plug_in_imports_downwards_only():
    package = TRAINING.parent / "timm_dvt"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert there == set(FLOOR_IN_PLUG_IN)
    wrong = []
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("timm_dvt"):
                continue
            parts = node.module.split(".")[1:] or [alias.name for alias in node.names]
            for name in parts[:1] if node.module != "timm_dvt" else parts:
                if FLOOR_IN_PLUG_IN.get(name, -1) > FLOOR_IN_PLUG_IN[own]:
                    wrong.append(f"{path.name} imports {name}")
    assert wrong == []


def test_the_plug_in_never_imports_training():
    for path in (TRAINING.parent / "timm_dvt").rglob("*.py"):
        assert "training" not in {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }, path


def test_the_tests_of_a_room_lie_in_a_folder_of_its_name():
    folders = {
        path.name for path in (TRAINING.parent / "tests" / "training").iterdir() if (path / "__init__.py").exists()
    }
    assert folders == set(FLOOR_OF) - {"commands", "figures"}  # figures are looked at through the commands that draw
