"""The method behind timm_dvt: how denoisers are made and judged. Run from a checkout: python -m training.NAME."""

import timm_dvt  # first: from here on Ctrl-C ends a command in one line, while it imports too
