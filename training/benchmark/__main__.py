"""Run one benchmark: python -m training.benchmark NAME [options]; NAME is a module of this folder with a main(argv)."""

import importlib
import pkgutil
import sys

import training.benchmark as package


def main(argv: list[str]) -> int:
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    if not argv or argv[0] not in names:
        print(f"usage: python -m training.benchmark {{{','.join(names)}}} [--help]", file=sys.stderr)
        return 2
    return importlib.import_module(f"{package.__name__}.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
