"""The page of `timm-dvt app`, which tests with a browser and without one ask."""

import pytest

from tests.helpers.app_server import serving, small_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small denoised model, as a folder."""
    return small_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address of its page, the process that serves it, and the folder for what that leaves."""
    with serving(folder, tmp_path_factory.mktemp("temporary")) as found:
        yield found
