"""Files of the authors' training scripts: read in every format of torch and numpy, and torch's own list left alone."""

import threading

import pytest
import torch

import timm_dvt
from tests.helpers import authors, reference
from tests.helpers.processes import Python
from timm_dvt.weights import pickles
from timm_dvt.weights.checkpoints import read_checkpoint


@pytest.fixture
def content():
    return authors.training_checkpoint("denoiser", reference.published_state(64, 3))


@pytest.mark.parametrize("numpy", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("form", ["zip", "first zip", "legacy"])
def test_a_training_checkpoint_is_read_whatever_wrote_it(form, numpy, content, tmp_path):
    path = authors.save(content, tmp_path / "file.pth", form, numpy)
    assert f"{numpy}.multiarray\nscalar\n".encode() in path.read_bytes()
    read = pickles.read_pickle(str(path))
    (group,) = read["optimizer"]["param_groups"]
    assert (group["lr"], group["weight_decay"], read["step"]) == (authors.LR, 1e-5, authors.STEP)
    assert type(group["lr"]) is float and read["optimizer"]["state"][0]["step"] == 1
    assert all(torch.equal(read["denoiser"][key], tensor) for key, tensor in content["denoiser"].items())
    assert set(read_checkpoint(path).denoiser) == {
        key if key == "pos_embed" else key.replace("denoiser.", "blocks.0.") for key in content["denoiser"]
    }


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-320, 1e308, float("inf"), 0.1])
def test_a_numpy_number_is_read_bit_for_bit(value, content, tmp_path):
    content["optimizer"]["param_groups"][0]["lr"] = type(authors.np.float64(0))(value)
    path = authors.save(content, tmp_path / "file.pth", "zip")
    assert pickles.read_pickle(str(path))["optimizer"]["param_groups"][0]["lr"].hex() == value.hex()


def test_numpy_numbers_are_refused_to_everybody_else_also_meanwhile(content, tmp_path, monkeypatch):
    path = authors.save(content, tmp_path / "file.pth", "zip")
    authors.write(tmp_path / "bad.pth", authors.read(path) | {"data.pkl": b"\x80\x02cos\nsystem\n."})
    before, seen = list(torch.serialization.get_safe_globals()), []
    assert "numpy" not in str(before)

    def elsewhere(*args):
        def look():
            with pytest.raises(Exception, match="scalar"):
                torch.load(path, weights_only=True)
            seen.append(list(torch.serialization.get_safe_globals()))  # not reached, if it was not refused

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return make(*args)

    make = pickles.OURS["numpy._core.multiarray.scalar"]
    with monkeypatch.context() as patched:
        patched.setitem(pickles.OURS, "numpy._core.multiarray.scalar", elsewhere)
        read_checkpoint(path)
    with pytest.raises(timm_dvt.CheckpointError):
        read_checkpoint(tmp_path / "bad.pth")
    assert seen == [before] * 2 and torch.serialization.get_safe_globals() == before


def test_what_a_program_allows_torch_to_load_stays_allowed_and_is_not_allowed_here(content, tmp_path):
    torch.serialization.add_safe_globals([Allowed])
    try:
        path = authors.save(content | {"more": Allowed()}, tmp_path / "file.pth", "zip")
        with pytest.raises(timm_dvt.CheckpointError, match="It holds tests.timm_dvt.test_pickles.Allowed"):
            read_checkpoint(path)
        assert Allowed in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


class Allowed:
    """Somebody else's class."""


@pytest.mark.slow
def test_torchs_switch_for_weights_only_changes_nothing(content, tmp_path):
    path = authors.save(content, tmp_path / "file.pth", "zip")
    code = f"from timm_dvt.weights.checkpoints import read_checkpoint; read_checkpoint({str(path)!r})"
    for switch in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        process = Python("-c", code, **{switch: "1"})
        said = process.communicate()
        assert process.wait() == 0, said
