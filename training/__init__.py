"""The method behind timm_dvt: how denoisers are made and judged. Run from a checkout: python -m training.NAME."""

import sys
from importlib.util import find_spec

try:
    import fcntl  # noqa: F401
except ImportError:  # Windows
    print(
        "error: training needs the file locks of Linux or macOS (on Windows: of WSL); timm_dvt itself runs everywhere",
        file=sys.stderr,
    )
    sys.exit(2)

import timm_dvt  # first: from here on Ctrl-C ends a command in one line, while it imports too

_NEEDED = ("torchvision", "sklearn", "scipy", "threadpoolctl", "matplotlib", "imageio", "torchmetrics")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    print(
        f'error: training needs packages that are not here ({", ".join(_missing)}): pip install -e ".[train]"',
        file=sys.stderr,
    )
    sys.exit(2)
