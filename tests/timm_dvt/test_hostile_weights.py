"""Files of weights made to hang, to fill the memory or to end the process: one error that names the file."""

import io
import json
import tarfile
import warnings

import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers import authors, reference
from tests.helpers.processes import run
from timm_dvt.weights.checkpoints import from_state_dict, read_checkpoint
from timm_dvt.weights.limits import MAX_HEADER, MAX_TENSORS

FORMS = pytest.mark.parametrize("form", ["zip", "legacy"])
DEEP = b")" + b"\x85" * 300_000  # a tuple in a tuple, in a tuple: the hash of it ends the process
DOUBLING = b")" + b"".join(b"q\x01h\x01\x86" for _ in range(80))  # its hash takes as long as the universe lasts


@pytest.fixture(scope="module")
def model():
    return timm_dvt.add_denoiser(timm.create_model("test_vit"), grid_size=3)


def good(path, form="zip", **more):
    return authors.save({"denoiser": reference.published_state(64, 3), **more}, path, form)


def refused(path, why=""):
    with pytest.raises(timm_dvt.CheckpointError, match=f"{path.name}: refused.*It holds.*{why}"):
        read_checkpoint(path)


@FORMS
@pytest.mark.parametrize(
    "key", [DEEP, DOUBLING, b")", b"N", b"G" + b"\0" * 8], ids=["deep", "doubling", "tuple", "none", "float"]
)
def test_a_key_that_is_neither_text_nor_a_number_is_refused_before_it_is_hashed(key, form, tmp_path):
    path = good(tmp_path / "file.pth", form, more="PLACE")
    authors.change(path, authors.string("PLACE"), b"}" + key + b"N" + b"s")
    refused(path, "a key that is neither text nor a whole number")


@FORMS
def test_a_bad_sparse_tensor_is_refused_and_leaves_the_next_load_alone(form, tmp_path):
    sparse = torch.sparse_coo_tensor([[9], [0]], [1.0], (2, 2), check_invariants=False)
    refused(good(tmp_path / "bad.pth", form, more=sparse), "sparse")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.load(good(tmp_path / "good.pth", form), weights_only=True)
    assert not torch._utils._sparse_tensors_to_validate


@FORMS
def test_a_tensor_that_repeats_its_numbers_is_refused(form, tmp_path):
    path = tmp_path / "file.pth"
    authors.save(
        {**reference.published_state(64, 3), "pos_embed_out": torch.ones(1, 1, 64).expand(1, 1 << 20, 64)}, path, form
    )
    refused(path, "a tensor that is larger than its storage")


@FORMS
def test_a_file_that_uses_its_bytes_more_often_than_models_share_layers_is_refused(form, tmp_path):
    shared = torch.ones(1 << 16)
    path = authors.save({f"denoiser.{i}.x": shared.view(1 << 8, -1)[:] for i in range(20)}, tmp_path / "file.pth", form)
    refused(path, "far larger ones than the file")
    authors.save({f"denoiser.{i}.x": shared.view(1 << 8, -1)[:] for i in range(12)}, path, form)
    assert len(read_checkpoint(path).denoiser) == 12


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_not_unpacked_to_see_what_it_is(mode, tmp_path):
    path = tmp_path / "file.pth"
    with tarfile.open(path, mode) as archive:
        (entry := tarfile.TarInfo("a")).size = 1 << 24
        archive.addfile(entry, io.BytesIO(bytes(1 << 24)))
    with pytest.raises(timm_dvt.CheckpointError, match="file.pth: damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["file.safetensors", "file.pth"])
def test_more_tensors_than_any_model_has_are_refused(name, tmp_path):
    if name == "file.pth":
        path = good(tmp_path / name, "zip", more="PLACE")
        entries = b"".join(authors.string(f"k{i}") + b"N" for i in range(MAX_TENSORS + 1))
        authors.change(path, authors.string("PLACE"), b"}(" + entries + b"u")
    else:
        path = tmp_path / name
        header = {f"k{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(MAX_TENSORS + 1)}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(timm_dvt.CheckpointError, match=name):
        read_checkpoint(path)


def test_names_without_number_are_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
    monkeypatch.setattr("timm_dvt.weights.checkpoints.json", None)
    with pytest.raises(timm_dvt.CheckpointError, match=f"{MAX_HEADER + 1} bytes of names of tensors"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_a_file_that_is_cut_after_it_was_read_does_not_end_the_process(tmp_path):
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({"x": torch.ones(1 << 20)}, path)
    code = (
        "import os, sys; from timm_dvt.weights.checkpoints import read_checkpoint\n"
        "state = read_checkpoint(sys.argv[1]).backbone; os.truncate(sys.argv[1], 0); print(float(state['x'].sum()))"
    )
    code, printed, _ = run("-c", code, str(path))
    assert code == 0 and float(printed) == 1 << 20


# ---- tensors and keys


ODD = {
    "0-dim": torch.ones(()),
    "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": torch.quantize_per_tensor(torch.ones(1, 9, 64), 0.1, 0, torch.qint8),
    "eight bits": torch.ones(1, 9, 64).to(torch.float8_e4m3fn),
    "complex": torch.ones(1, 9, 64, dtype=torch.complex64),
    "meta": torch.ones(1, 9, 64, device="meta"),
    "csr": torch.ones(9, 64).to_sparse_csr(),
}


@pytest.mark.parametrize("key", ["pos_embed", "pos_embed_out", "blocks.0.weight", "blocks.0.norm1.weight"])
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_tensor_in_memory_is_our_error(kind, key, model, tmp_path):
    state = {f"denoiser.{name}": tensor for name, tensor in model.denoiser.state_dict().items()}
    from timm_dvt.weights.denoisers import denoiser_for

    with pytest.raises(timm_dvt.CheckpointError, match=f"state_dict: .*{key}"):
        denoiser_for(from_state_dict(state | {f"denoiser.{key}": ODD[kind]}), 64, (3, 3))


def test_four_bits_a_number_are_our_error(tmp_path):
    path = tmp_path / "file.safetensors"
    text = json.dumps({"denoiser.pos_embed": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(timm_dvt.CheckpointError, match="file.safetensors"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "one, other",
    [("module.x", "x"), ("denoiser.norm1.weight", "denoiser.0.norm1.weight"), ("module.model.x", "model.x")],
)
def test_two_names_of_one_tensor_are_refused(one, other):
    with pytest.raises(timm_dvt.CheckpointError, match="twice"):
        from_state_dict({one: torch.ones(1), other: torch.zeros(1)})


@pytest.mark.parametrize("name", ["file.safetensors", "file.pth"])
def test_what_a_terminal_would_act_on_is_written_out_and_long_names_are_cut(name, model, tmp_path):
    state = {f"denoiser.\x1b[2J\nerror: {'x' * 5000}{i}": torch.ones(1) for i in range(9)}
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    with pytest.raises(timm_dvt.CheckpointError) as caught:
        timm_dvt.load_denoiser(model, tmp_path / name)
    assert str(caught.value).isprintable() and r"\x1b[2J\nerror" in str(caught.value)
    assert len(str(caught.value)) < 4000
