"""A command with bars that are lines at once, however soon it is done: python -m tests.helpers.bars_at_once MODULE."""

import runpy
import sys

from timm_dvt import bars

bars.LINE_EVERY = 0
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
