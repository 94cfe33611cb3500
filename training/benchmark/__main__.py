"""Run one benchmark: python -m training.benchmark NAME [options]; NAME is a module of this folder with a main(argv)."""

import argparse
import ast
import importlib
import pkgutil
import sys
from pathlib import Path

import training.benchmark as package
from training.common.command import exit_code_of


def main(argv: list[str]) -> int:
    benchmarks = {m.name: _says(m.name) for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmark",
        usage="%(prog)s NAME [options]",
        description="Run one benchmark; NAME --help tells its options.",
        epilog="\n".join(f"  {name:16} {says}" for name, says in sorted(benchmarks.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=sorted(benchmarks), help="one of those below")
    name = parser.parse_args(argv[:1]).name
    return exit_code_of(
        lambda: importlib.import_module(f"{package.__name__}.{name}").main(argv[1:]), then="nothing is kept."
    )


def _says(name: str) -> str:
    """The first line of a module's docstring, read without running it."""
    (folder,) = package.__path__
    docstring = ast.get_docstring(ast.parse(Path(folder, f"{name}.py").read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0].split(": python -m")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
