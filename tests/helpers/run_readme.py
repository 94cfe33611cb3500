"""Runs the Python of the README top to bottom, in one process and one folder, and says what came of each block.

For an environment in which only what the README says was installed: `.ci/run` starts it in a fresh clone.
"""

import re
import sys
from pathlib import Path

names: dict = {}
for number, block in enumerate(re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL), 1):
    exec(compile(block, f"{sys.argv[1]}, block {number}", "exec"), names)
    print(f"block {number} runs")
