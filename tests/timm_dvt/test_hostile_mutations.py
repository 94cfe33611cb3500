"""Folders with mutations of a valid config.json or file of tensors: an error or a correct model, whatever they are."""

import copy
import json
import os
import random
import resource
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed_nhwc

import timm_dvt
from tests.helpers import authors, reference
from tests.helpers.folders import ERRORS, load, small_files, write
from timm_dvt.weights.checkpoints import read_checkpoint

MANY = 10_000


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return small_files(tmp_path_factory.mktemp("m"))


def mutate_text(text: str, dice: random.Random) -> str:
    """A valid config.json with something wrong in it: values of other types and sizes, keys gone, bytes changed."""
    if dice.random() < 0.4:
        place = dice.randrange(len(text))
        other = dice.choice(['"', "{", "9", "-", "", "\\u0000", "e99", "[", ",", "null"])
        return text[:place] + other + text[place + 1 :]
    config = json.loads(text)
    for _ in range(dice.choice([1, 1, 2, 5])):
        entry = config
        while True:
            key = dice.choice(list(entry))
            if not isinstance(entry[key], dict) or not entry[key] or dice.random() < 0.1:
                break
            entry = entry[key]
        values = [None, True, -1, 0, 3, 10**6, 10**30, 1e308, float("nan"), "", "../../x", "x" * 5000, [], [1] * 99, {}]
        values += [{"a": {}}, [[]], "vit_tiny_patch16_224", copy.deepcopy(entry[key])]
        if dice.random() < 0.2:
            del entry[key]
            if not entry:
                break
        else:
            entry[dice.choice([key, key, key, "depth", "img_size", "denoiser"])] = dice.choice(values)
    return json.dumps(config)


def mutate_bytes(content: bytes, dice: random.Random) -> bytes:
    """A valid file of tensors with bytes of its header changed, put in, taken out, or its end cut off."""
    header = 8 + int.from_bytes(content[:8], "little")
    data = bytearray(content)
    for _ in range(dice.choice([1, 2, 8])):
        place = dice.randrange(header) if dice.random() < 0.9 else dice.randrange(len(data))
        how = dice.choice(["change", "digit", "insert", "delete", "cut"])
        if how == "cut":
            return bytes(data[: dice.randrange(len(data))])
        if how == "insert":
            data[place:place] = bytes([dice.randrange(256)])
        elif how == "delete":
            del data[place]
        else:
            data[place] = ord(dice.choice("0123456789")) if how == "digit" else dice.randrange(256)
    return bytes(data)


def check_model(model: timm_dvt.Denoised, content: bytes, config: bytes) -> None:
    """Assert that a model that was made has the file's weights, but for those that timm resamples, and works."""
    want, got = safetensors.torch.load(content), model.state_dict()
    adapted = ("pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias")
    if model.patch_embed.strict_img_size and want["denoiser.pos_embed"].shape != got["denoiser.pos_embed"].shape:
        maps = want["denoiser.pos_embed"].unflatten(1, (2, 2))  # of a model for images of one size, to the grid of them
        resampled = resample_abs_pos_embed_nhwc(maps, list(model.patch_embed.grid_size))
        want["denoiser.pos_embed"] = resampled.flatten(1, 2)
    for key in want.keys() - set(adapted):
        assert torch.equal(want[key].float().nan_to_num(), got[key].nan_to_num()), (key, config)
    rows, columns = model.patch_embed.img_size
    if rows * columns * model.in_chans < 1 << 20:
        tokens = model.forward_features(torch.randn(1, model.in_chans, rows, columns))
        assert tokens.shape[0] == 1 and tokens.shape[2] == model.embed_dim, config


def check_mutations(valid: dict, tmp_path: Path, count: int) -> None:
    dice, errors = random.Random(0), 0
    for i in range(count):
        files = dict(valid)
        if i % 2:
            files["config.json"] = mutate_text(valid["config.json"].decode(), dice).encode("utf-8", "surrogatepass")
        else:
            files["model.safetensors"] = mutate_bytes(valid["model.safetensors"], dice)
        folder = write(tmp_path / "model", files)
        start = time.monotonic()
        model = None
        try:
            model = load(folder)
        except ERRORS:
            errors += 1
        if isinstance(model, timm_dvt.Denoised):
            check_model(model, files["model.safetensors"], files["config.json"])
        assert time.monotonic() - start < 20, files["config.json"]
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
        assert all((folder / name).read_bytes() == content for name, content in files.items())
    assert errors > count // 4  # the mutations are harmful ones
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20


@torch.no_grad()
def test_a_hundred_mutations_are_errors_or_correct_models(valid, tmp_path, hub):
    check_mutations(valid, tmp_path, 100)


@pytest.mark.sweep
@torch.no_grad()
def test_ten_thousand_mutations_are_errors_or_correct_models(valid, tmp_path, hub):
    check_mutations(valid, tmp_path, MANY)


def check_pickles(tmp_path: Path, form: str, count: int) -> None:
    """Mutations of a training checkpoint: CheckpointError, or what was in it but for values that were changed."""
    dice, errors = random.Random(0), 0
    content = authors.training_checkpoint("denoiser", reference.published_state(64, 2))
    path = authors.save(content, tmp_path / "file.pth", form)
    whole = path.read_bytes()
    records = {"": whole} if form == "legacy" else authors.read(path)
    name = "" if form == "legacy" else "data.pkl"
    length = len(records[name]) if name else whole.index(b"cpu") + 20_000
    for _ in range(count):
        data = bytearray(records[name])
        for _ in range(dice.choice([1, 2, 8])):
            place = dice.randrange(min(length, len(data)))
            how = dice.choice(["change", "change", "insert", "delete", "cut"])
            if how == "cut":
                del data[place:]
                break
            data[place : place + (how != "insert")] = b"" if how == "delete" else bytes([dice.randrange(256)])
        if name:
            authors.write(path, records | {name: bytes(data)})
        else:
            path.write_bytes(data)
        start = time.monotonic()
        try:
            assert isinstance(read_checkpoint(path).denoiser, dict)
        except timm_dvt.CheckpointError:
            errors += 1
        assert time.monotonic() - start < 20
    assert errors > count // 4 and os.listdir(tmp_path) == ["file.pth"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_mutated_pickle_is_an_error_or_harmless(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_pickles(tmp_path, form, 100)


@pytest.mark.sweep
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_many_mutated_pickles_are_errors_or_harmless(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_pickles(tmp_path, form, MANY)
