"""The recipes of timm_dvt/extraction/README.md run as they stand, on a smaller size, and find what is there."""

import re
import shlex
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_dvt.__main__ import main
from timm_dvt.weights import focus

PAGE = (Path(__file__).parents[2] / "timm_dvt" / "extraction" / "README.md").read_text()


@pytest.mark.sweep
@pytest.mark.skipif(bool(focus.missing_packages()), reason=f"needs the extra dinov2: {focus.INSTALL}")
def test_the_recipes_cluster_track_and_learn(tmp_path, monkeypatch):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for kind in ("cat", "mountain"):
        photograph = Image.open(resources.files("timm_dvt") / "assets" / f"{kind}.jpg").convert("RGB")
        Path("photos", kind).mkdir(parents=True)
        for i in range(15):  # parts of it
            left, top = (int(draw.integers(side - 240)) for side in photograph.size)
            photograph.crop((left, top, left + 240, top + 240)).save(Path("photos", kind, f"{i:02d}.png"))
    with imageio.get_writer("clip.mp4", fps=10, macro_block_size=2, quality=9) as clip:
        for i in range(8):  # a window that moves to the right by a patch a frame
            clip.append_data(np.asarray(photograph.crop((14 * i + 100, 100, 14 * i + 324, 212))))
    names: dict = {}
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL):
        if language == "sh":
            small = ["--size", "224" if "clip" in block else "98"]
            assert main([*shlex.split(block)[1:], *small]) == 0
        else:
            exec(compile(block, "README.md", "exec"), names)
    assert len(names["track"]) == 8
    assert sum(abs(row - 3) <= 1 and abs(column - 9 + i) <= 1 for i, (row, column) in enumerate(names["track"])) >= 6
    of_cats = names["groups"][names["labels"] == "cat"]
    assert max(np.mean(of_cats == 0), np.mean(of_cats == 1)) > 0.8
    assert names["head"].score(names["means"][names["others"]], names["labels"][names["others"]]) > 0.8
