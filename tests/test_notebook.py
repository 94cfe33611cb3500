"""The notebook runs from top to bottom and draws what it says; nothing that it drew is committed."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_dvt.weights import focus

NOTEBOOK = Path("hub_cards/quickstart.ipynb")
PICTURES = 7  # the toggle, a gray image, similarity, groups, labeled patches, calibrated, several layers


def test_its_pictures_are_committed_and_small():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES and NOTEBOOK.stat().st_size < 600_000
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.slow
@pytest.mark.skipif(bool(focus.missing_packages()), reason=f"needs the extra dinov2: {focus.INSTALL}")
def test_it_runs_and_each_recipe_has_its_picture():
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra test")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra test")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    stray = [output for output in outputs if output.output_type != "display_data"]
    assert all("IProgress not found" in output.text for output in stray)  # tqdm's wish for ipywidgets
    pictures = [base64.b64decode(output.data["image/png"]) for output in outputs if output not in stray]
    assert len(pictures) == PICTURES
    for picture in pictures:
        assert len(np.unique(np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3), axis=0)) > 10
