"""Files and folders that are there whole or not at all, with the usual mode, and with nothing left of killed runs."""

import fcntl
import os
import signal
import stat
import threading
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers.folders import small_files
from tests.helpers.processes import run
from timm_dvt.errors import UserError
from timm_dvt.publish.cards import write_cards
from timm_dvt.publish.convert import convert
from timm_dvt.shared_folder import SharedFolder
from timm_dvt.weights import saving
from timm_dvt.weights.files import write_whole

SMALL = {"depth": 1, "img_size": 32, "embed_dim": 32, "num_heads": 2}


def denoised(seed=0):
    torch.manual_seed(seed)
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **SMALL))
    torch.nn.init.normal_(model.denoiser.pos_embed)
    return model


def save(model, folder):
    return timm_dvt.save_pretrained(model, folder, model_args=SMALL)


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda: save(denoised(), ""),
        lambda: timm_dvt.extract("cat.jpg", "test_vit", ""),
        lambda: timm_dvt.extract("", "test_vit", "out"),
        lambda: convert(None, "vit_small_patch14_dinov2.lvd142m_dvt", ""),
        lambda: write_cards(""),
        lambda: SharedFolder(""),
    ],
)
def test_an_empty_name_is_not_taken_for_the_current_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='got ""'):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("plain", [False, True])
def test_saved_files_have_the_mode_that_the_mask_of_the_user_gives(mask, plain, tmp_path):
    before = os.umask(mask)
    try:
        if plain:
            saving.save_plain(timm.create_model("test_vit"), tmp_path / "m", "test_vit")
        else:
            save(denoised(), tmp_path / "m")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), 0o666 & ~mask)


def test_safetensors_own_files_get_that_mode_too(tmp_path):
    write_whole(tmp_path / "a", lambda path: safetensors.torch.save_file({"x": torch.ones(1)}, path))
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_an_error_of_the_system_that_safetensors_has_in_words_is_one_again(tmp_path):
    with pytest.raises(IsADirectoryError) as error:
        write_whole(tmp_path / "a", lambda path: safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path))
    assert error.value.filename == str(tmp_path / "a")


def killed_at(replacement: int, folder: Path) -> None:
    """Save over a folder in a process that is killed in place of its nth replacement of a file."""
    code = (
        "import os, pathlib, signal, sys\nfrom tests.timm_dvt.test_files import denoised, save\n"
        "replace, left = pathlib.Path.replace, int(sys.argv[2])\n"
        "def one(*args):\n    global left\n    left -= 1\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if left == 0 else replace(*args)\n"
        "pathlib.Path.replace = one\nsave(denoised(1), sys.argv[1])"
    )
    assert run("-c", code, str(folder), str(replacement))[0] == -signal.SIGKILL


@pytest.mark.parametrize("replacement", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_saving_over_a_folder_and_killed_leaves_none_that_mixes_two_models(replacement, tmp_path):
    folder = save(denoised(0), tmp_path / "m")
    killed_at(replacement, folder)
    assert [path for path in folder.iterdir() if path.name.startswith(".")]
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(folder)
    model = denoised(2)
    save(model, folder)  # the next run, which also sweeps
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert torch.equal(load(folder).denoiser.pos_embed, model.denoiser.pos_embed)


def test_a_save_that_fails_leaves_the_model_that_was_there(tmp_path, monkeypatch):
    model = denoised(0)
    folder = save(model, tmp_path / "m")

    def fail(*args, **kwargs):
        raise OSError("no room")

    monkeypatch.setattr(saving, "save_config_for_hf", fail)
    with pytest.raises(OSError):
        save(denoised(1), folder)
    assert torch.equal(load(folder).denoiser.pos_embed, model.denoiser.pos_embed)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_what_another_is_filling_at_the_moment_is_left_alone(tmp_path):
    path, filling, done = tmp_path / "a", threading.Event(), threading.Event()

    def slow(file):
        file.write_text("slow")
        filling.set()
        assert done.wait(60)

    (tmp_path / ".a.0123abcd").write_text("left by a killed run")
    (tmp_path / ".b.0123abcd").write_text("of another file")
    other = threading.Thread(target=write_whole, args=(path, slow))
    other.start()
    assert filling.wait(60)
    write_whole(path, lambda file: file.write_text("quick"))
    assert path.read_text() == "quick"
    done.set()
    other.join()
    assert path.read_text() == "slow" and sorted(os.listdir(tmp_path)) == [".b.0123abcd", "a"]


def test_windows_syncs_what_may_be_written_alone_and_nothing_else_is_synced(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    small_files(tmp_path)
    write_whole(tmp_path / "a", lambda path: path.write_bytes(b"content"))
    assert len(modes) == 3 and os.O_RDONLY not in modes and (tmp_path / "a").read_bytes() == b"content"
