"""Every test talks to a stand-in for the Hub on loopback, with an empty cache of its own; none reaches the network."""

import os
import shutil
import tempfile
from pathlib import Path

from tests.helpers.hub import Hub

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of one would wait for those of another. What tests start does the same. NumPy's
    # and torch's libraries read this when they are loaded.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

# huggingface_hub reads these when it is imported, so they are set before anything imports it.
_FOLDER = Path(tempfile.mkdtemp(prefix="timm_dvt_tests_"))
_HUB = Hub(_FOLDER / "hub")
TOKEN = "hf_writer"  # of the account on it
os.environ.update(
    HF_ENDPOINT=_HUB.url,
    HF_HOME=str(_FOLDER / "home"),
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",  # by the command line, at PyPI
    HF_HUB_DISABLE_XET="1",  # where hf_xet is there, uploads go to a store of its own; the Hub takes plain HTTP too
)
for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.helpers import drawing  # noqa: E402

drawing.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_unconfigure():
    shutil.rmtree(_FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def hub():
    """The stand-in hub, empty before and after: put files under `hub.folder / ORG / REPO`."""
    yield _HUB
    _HUB.reset()


@pytest.fixture
def account(hub, monkeypatch):
    """An account on the hub, logged in."""
    hub.tokens[TOKEN] = {"me"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="module")
def one_thread():
    """Bits are compared between processes, so all of them must add up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
