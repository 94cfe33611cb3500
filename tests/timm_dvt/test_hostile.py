"""Folders and repos made to do harm: an error or a correct model, never code, a stray file, a hang, a full memory."""

import inspect
import json
import os
import resource
import time
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers.folders import ERRORS, SMALL, load, small_files, write
from tests.helpers.processes import run
from timm_dvt.errors import UserError
from timm_dvt.loading import load_model
from timm_dvt.publish.convert import convert


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return small_files(tmp_path_factory.mktemp("m"))


@pytest.fixture
def folder(valid, tmp_path):
    return write(tmp_path / "model", valid)


def changed(folder: Path, **changes) -> Path:
    """The folder with entries of its config.json changed: by dotted name; None removes."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *path, last = name.split("__")
        entry = config
        for key in path:
            entry = entry[key]
        entry[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_valid_folder_is_valid(folder):
    model = load(folder)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 5, 32)


# ---- sizes and types


SIZES = {
    "model_args__img_size": [-16, 0, 10**9, [32], [32, 32, 32], [32, -32], "32", True, 32.5, {}, float("inf")],
    "model_args__depth": [-1, 0, 10**9, "1", 1.5, [1], True],
    "model_args__embed_dim": [-32, 0, 10**9, 1 << 40, "32", [32]],
    "model_args__num_heads": [-1, 0, 10**9, "2", 3],
    "model_args__in_chans": [-3, 0, 10**9, "3"],
    "model_args__mlp_ratio": [-1, 10**9, "4", float("nan"), float("inf")],
    "model_args__reg_tokens": [-1, 10**9, "4"],
    "model_args__patch_size": [0, -16, 10**9, "16", [0, 0]],
    "model_args__num_classes": [-1, 10**12, "many"],
    "model_args__denoiser": ["x", [], 3, {"grid_size": [2, 2], "code": "x"}],
    "model_args__denoiser__grid_size": [[-2, 2], [10**9, 10**9], "22", [2], [2, 2, 2], None, 10**9, [2.5, 2]],
    "model_args__denoiser__depth": [-1, 10**9, "1", 0],
    "model_args__denoiser__num_heads": [-1, 10**9, "2", 7],
    "num_classes": [-1, 10**12, "many"],
    "model_args": ["x", 3, [1]],
    "pretrained_cfg": ["x", 3, [1]],
    "pretrained_cfg__input_size": ["abc", 3, [], [3], [3, 10**9, 10**9], [10**9, 32, 32]],
    "architecture": ["os.system", "../x", 3, None, "hf-hub:evil/repo", "resnet18"],
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_beyond_reason_or_of_a_wrong_type_is_an_error_or_changes_nothing(name, valid, tmp_path):
    images = torch.randn(1, 3, 32, 32)
    tokens = load(write(tmp_path / "good", valid)).forward_features(images)
    start = time.monotonic()
    for value in SIZES[name]:
        folder = changed(write(tmp_path / "bad", valid), **{name: value})
        for pretrained in (True, False):
            try:
                model = timm.create_model(f"local-dir:{folder}", pretrained=pretrained).eval()
            except ERRORS:
                continue
            if pretrained:
                assert torch.equal(model.forward_features(images), tokens), value
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20  # KB


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"model_args__img_size": 10**9}, "img_size is '1000000000'; it has to be a whole number from 1 to 16384"),
        ({"model_args__embed_dim": 1 << 14, "model_args__depth": 256}, "is beyond reason"),
        ({"model_args__denoiser__grid_size": [10**9, 1]}, "grid_size is '.1000000000, 1.'; it has to be"),
        ({"model_args__denoiser": {"code": "x"}}, "it has to be a dict with keys of grid_size, depth"),
    ],
)
def test_the_error_names_the_argument_and_what_is_accepted(entry, message, folder):
    with pytest.raises(ValueError, match=message):
        load(changed(folder, **entry))


@pytest.mark.parametrize("name", [name for name in SIZES if "__" in name])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_wrong_entry_is_one_error_of_ours_that_names_the_file(name, pretrained, valid, tmp_path):
    for value in SIZES[name]:
        folder = changed(write(tmp_path / "bad", valid), **{name: value})
        try:
            timm.create_model(f"local-dir:{folder}", pretrained=pretrained)
        except timm_dvt.CheckpointError as e:
            assert str(folder) in str(e) and str(e).isprintable()
        except (AttributeError, KeyError, TypeError) as e:  # timm's, before it knows that the model is one of ours
            assert "_parse_model_cfg" in [frame.name for frame in traceback.extract_tb(e.__traceback__)]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"architecture": 1}', '{"architecture": "no"}', "[" * 100000])
def test_commands_name_a_config_that_timm_itself_cannot_read(text, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(timm_dvt.CheckpointError, match="/config.json makes no model"):
        load_model(f"local-dir:{folder}")


@pytest.mark.skipif(
    "pretrained_model_args" not in inspect.getsource(timm.create_model),
    reason="this timm does not tell a config's arguments from the caller's",
)
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("entry", [{"device": "meta"}, {"dtype": "float16"}, {"device": "cpu"}])
def test_a_config_cannot_say_where_a_model_is_or_of_what_numbers(entry, pretrained, folder):
    changed(folder, **{f"model_args__{key}": value for key, value in entry.items()})
    with pytest.raises(timm_dvt.CheckpointError, match="config.json makes no model: model_args holds d.*type|device"):
        timm.create_model(f"local-dir:{folder}", pretrained=pretrained)


def test_pretrained_weights_are_never_left_out_for_a_device_that_holds_none(folder):
    with pytest.raises(ValueError, match="nothing holds weights"):
        load(folder, device="meta")
    with pytest.raises(ValueError, match="nothing holds weights"), torch.device("meta"):
        load(folder)
    assert timm.create_model(f"local-dir:{folder}", device="meta").pos_embed.is_meta


@pytest.mark.slow
def test_shapes_that_differ_from_the_file_are_found_out_before_memory_is_taken(folder):
    code = (
        "import sys, resource, torch, timm, timm_dvt\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    timm.create_model('local-dir:' + sys.argv[1], pretrained=True)\n"
        "except timm_dvt.CheckpointError as e:\n"
        "    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, e)\n"
    )
    changed(folder, model_args__embed_dim=4096, model_args__depth=32)  # 26 GB
    megabytes, message = run("-c", code, str(folder))[1].split(" ", 1)
    assert int(megabytes) < 300 and "wrong shapes" in message


# ---- names, links, code


@pytest.mark.parametrize(
    "key", ["file", "url", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load", "architecture"]
)
@pytest.mark.parametrize("value", ["../../secret.pth", "/etc/passwd", "http://127.0.0.1:9/x.pth", "evil/repo", True])
def test_a_config_cannot_say_where_weights_come_from(key, value, hub, valid, folder, tmp_path):
    torch.save({"denoiser": {}}, tmp_path / "secret.pth")
    changed(folder, **{f"pretrained_cfg__{key}": value})
    repo = write(hub.folder / "someone/model", {path.name: path.read_bytes() for path in folder.iterdir()})
    want = safetensors.torch.load(valid["model.safetensors"])["denoiser.pos_embed"]
    for source in (f"local-dir:{folder}", "hf-hub:someone/model"):
        hub.requests.clear()
        try:
            model = timm.create_model(source, pretrained=True, cache_dir=tmp_path / "cache")
        except ERRORS:
            pass
        else:
            assert torch.equal(model.denoiser.pos_embed, want)
        assert all("someone/model" in request or "/cdn/" in request for request in hub.requests)
    assert repo.is_dir() and not (tmp_path / "cache" / "secret.pth").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"cache_dir": "/tmp/elsewhere"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"pretrained_cfg_overlay": {"file": "/etc/passwd"}},
        {"block_fn": "os.system"},
        {"norm_layer": "os.system"},
        {"act_layer": "__import__"},
        {"embed_layer": "eval"},
        {"weight_init": "exec"},
        {"device": "cuda:99"},
        {"dtype": "os.system"},
        {"__class__": "x"},
        {"backbone": "hf-hub:evil/repo"},
        {"backbone": "../../x"},
        {"backbone": ["vit_tiny_patch16_224"]},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_a_config_cannot_pass_what_is_not_a_size(arguments, folder, hub):
    with pytest.raises(ERRORS):
        load(changed(folder, **{f"model_args__{key}": value for key, value in arguments.items()}))
    assert not hub.requests and not os.path.exists("/tmp/elsewhere")


def test_a_duplicate_key_is_an_error_or_the_last_one(valid, tmp_path):
    folder = write(tmp_path / "a", valid)
    text = (folder / "config.json").read_text().replace('"depth"', '"depth": 1000000, "depth"')
    (folder / "config.json").write_text(text)
    want = load(write(tmp_path / "good", valid)).state_dict()
    assert all(torch.equal(tensor, want[key]) for key, tensor in load(folder).state_dict().items())
    header, data = split(valid["model.safetensors"])
    first = header.index(b'"cls_token"')
    twice = header[:first] + b'"cls_token":{"dtype":"F32","shape":[9],"data_offsets":[0,36]},' + header[first:]
    (folder / "model.safetensors").write_bytes(len(twice).to_bytes(8, "little") + twice + data)
    try:
        again = load(folder).state_dict()
    except ERRORS:
        return
    assert all(torch.equal(tensor, want[key]) for key, tensor in again.items())


def split(content: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


@pytest.mark.parametrize("kind", ["integers", "complex", "bool", "meta", "sparse", "expanded"])
def test_tensors_that_are_no_plain_numbers_are_refused(kind, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model = timm_dvt.add_denoiser(model)
    state = {f"denoiser.{key}": value for key, value in model.denoiser.state_dict().items()}
    shape = state["denoiser.pos_embed"].shape
    state["denoiser.pos_embed"] = {
        "integers": torch.ones(shape, dtype=torch.int64),
        "complex": torch.ones(shape, dtype=torch.complex64),
        "bool": torch.ones(shape, dtype=torch.bool),
        "meta": torch.ones(shape, device="meta"),
        "sparse": torch.ones(shape).to_sparse(),
        "expanded": torch.ones(1).expand(1, 1 << 40, 192),
    }[kind]
    torch.save(state, tmp_path / "a.pth")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(timm_dvt.CheckpointError, match="a.pth"):
        timm_dvt.load_denoiser(model, tmp_path / "a.pth")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing link", "link to itself"])
def test_what_is_no_regular_file_is_an_error_and_no_wait(kind, name, folder):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        os.symlink({"device": "/dev/zero", "missing link": "/no/where", "link to itself": name}[kind], folder / name)
    with pytest.raises(ERRORS):
        load(folder)


def test_saving_replaces_a_link_and_leaves_what_it_points_to(folder, tmp_path):
    (tmp_path / "victim").write_text("precious")
    target = tmp_path / "target"
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(tmp_path / "victim", target / name)
    timm_dvt.save_pretrained(load(folder), target)
    assert (tmp_path / "victim").read_text() == "precious" and not (target / "config.json").is_symlink()


@pytest.mark.parametrize(
    "source",
    [
        "hf-hub:a/../../x",
        "hf-hub:../x/y",
        "hf-hub:a/b/../../../etc/passwd",
        "a/b/../c",
        "hf-hub:a//b",
        "hf-hub:a@b@c/d",
        "hf-hub:a",
        "hf-hub:",
    ],
)
def test_a_source_that_leaves_its_repo_is_refused(source, hub, tmp_path):
    with pytest.raises(UserError, match="a file of the Hub is named"):
        convert(source, "vit_base_patch16_224.mae_dvt", tmp_path / "out")
    assert not hub.requests and not (tmp_path / "out").exists()
