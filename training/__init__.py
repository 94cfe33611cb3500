"""The method behind timm_dvt: how denoisers are made and judged. Run from a checkout: python -m training.NAME."""

import sys

try:
    import fcntl  # noqa: F401
except ImportError:  # Windows
    print(
        "error: training needs the file locks of Linux or macOS (on Windows: of WSL); timm_dvt itself runs everywhere",
        file=sys.stderr,
    )
    sys.exit(2)

import timm_dvt  # first: from here on Ctrl-C ends a command in one line, while it imports too
