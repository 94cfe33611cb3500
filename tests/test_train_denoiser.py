"""Claims about stage 2: what is optimised, that a killed run loses nothing, that processes agree, what is refused."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.pairs import MODEL, change_pair, make_maps, pair_path, write_pairs
from training import train_denoiser
from training.optimisation import distance, learning_rate, make_adamw
from training.pair_loader import PairReader, open_pairs, positions, read_ahead

TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Bits are compared between processes, so all of them must add up in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


def run(pairs: Path, out: Path, *options: str) -> int:
    """The command in this process; returns its exit code."""
    return train_denoiser.main([*MODEL, "--pairs", str(pairs), "--out", str(out), "--batch-size", "4", *options])


def start(pairs: Path, out: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "training.train_denoiser", *MODEL, "--pairs", str(pairs)]
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, "--out", str(out), *options], env=environment, **pipes)


def finish(process: subprocess.Popen) -> int:
    process.communicate()
    return process.returncode


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def denoiser_weights(out: Path) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights(out).items() if key.startswith("denoiser.")}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- the recipe


def test_the_loss_is_eq_11_of_each_token_in_a_float64_loop():
    predicted, target = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    got = distance(predicted, target)
    for i in range(2):
        for j in range(3):
            p, t = (x[i, j].double().numpy() for x in (predicted, target))
            want = 1 - p @ t / math.sqrt((p @ p) * (t @ t)) + math.sqrt(((p - t) ** 2).sum())
            assert abs(got[i, j].item() - want) < 1e-5


def test_the_loss_of_a_perfect_prediction_is_zero_and_its_gradient_finite():
    tokens = torch.randn(4, 8, requires_grad=True)
    loss = distance(tokens, tokens.detach().clone()).sum()
    loss.backward()
    assert loss.abs() < 1e-5 and tokens.grad.isfinite().all()


def test_the_learning_rate_is_a_cosine_to_zero_behind_a_straight_rise():
    assert learning_rate(0, 100, 2e-4) == 2e-4
    assert learning_rate(50, 100, 2e-4) == pytest.approx(1e-4)
    assert learning_rate(99, 100, 2e-4) == pytest.approx(2e-4 * (1 + math.cos(math.pi * 0.99)) / 2)
    assert [learning_rate(step, 14, 1.0, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_position_embedding_norms_and_biases_are_not_decayed():
    model = timm.create_model("test_vit")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)]: g["weight_decay"] for g in make_adamw(model, 1e-3, 0.1).param_groups for p in g["params"]}
    assert set(decayed) == set(names.values())
    assert decayed["blocks.0.mlp.fc1.weight"] == 0.1
    assert {decayed[name] for name in ("pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias")} == {0.0}


def test_every_epoch_visits_every_pair_once_in_another_order_that_step_and_seed_decide():
    whole = positions(10, 0, 30, seed=3)
    epochs = [whole[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and positions(10, 0, 30, seed=4) != whole
    assert sum((positions(10, first, first + 3, 3) for first in range(0, 30, 3)), []) == whole


def test_one_step_is_plain_adamw_on_plain_eq_11(pairs, tmp_path):
    """The first update, recomputed with torch's own optimiser from the start that --start random gives."""
    assert run(pairs, tmp_path / "out", "--steps", "1", "--start", "random", "--val-fraction", "0", "--seed", "5") == 0
    torch.manual_seed(5)
    from timm_dvt.denoiser import Denoiser

    denoiser = Denoiser(64, (4, 4))
    order = positions(12, 0, 4, 5)
    files = sorted(pair_path(pairs, image).relative_to(pairs) for image in range(12))
    images = [next(i for i in range(12) if pair_path(pairs, i) == pairs / files[place]) for place in order]
    raw, clean = (
        torch.stack([make_maps(i)[5][part].half().float().flatten(0, 1) for i in images]) for part in ("raw", "clean")
    )
    p, predicted = clean, denoiser(raw, (4, 4))
    cosine = (predicted * p).sum(-1) / (predicted.norm(dim=-1) * p.norm(dim=-1))
    (1 - cosine + (predicted - p).square().sum(-1).sqrt()).mean().backward()
    decayed = [q for n, q in denoiser.named_parameters() if q.ndim > 1 and n != "pos_embed"]
    rest = [q for n, q in denoiser.named_parameters() if q.ndim == 1 or n == "pos_embed"]
    torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0}], 2e-4).step()
    got = denoiser_weights(tmp_path / "out")
    for name, value in denoiser.state_dict().items():
        torch.testing.assert_close(got[f"denoiser.{name}"], value, atol=2e-6, rtol=0)


# ---- the result


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    assert run(pairs, out, "--steps", "40") == 0
    return out


def test_the_folder_loads_in_timm_with_the_backbone_untouched_and_the_denoiser_better_than_raw(trained, pairs):
    model = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    torch.manual_seed(0)
    plain = timm.create_model("test_vit").eval()
    plain.set_input_size(img_size=64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), model.denoising(False):
        assert torch.equal(model.forward_features(images), plain.forward_features(images))
    maps = make_maps(99)[5]
    with torch.no_grad():
        denoised = model.denoiser(maps["raw"].flatten(0, 1)[None], (4, 4))[0].unflatten(0, (4, 4))
    error = lambda x: (x - maps["clean"]).norm().item()  # noqa: E731
    assert error(denoised) < 0.3 * error(maps["raw"])


def test_log_and_pictures_tell_how_it_went(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [10, 20, 30, 40]
    assert all(line["images_per_second"] > 0 and 0 <= line["lr"] <= 2e-4 for line in steps)
    values = [line for line in lines if "val_loss" in line]
    assert len(values) == 10 and values[-1]["val_loss"] < values[-1]["val_loss_raw"]
    picture = np.array(Image.open(trained / "pictures" / "step-0000040.png"))
    assert picture.shape == (160, 480, 3)
    raw, predicted, target = (picture[:, at : at + 160].astype(float) for at in (0, 160, 320))
    assert np.abs(predicted - target).mean() < np.abs(raw - target).mean()


def test_the_static_denoiser_subtracts_the_mean_of_the_training_pairs_artifacts(pairs, tmp_path):
    assert run(pairs, tmp_path / "out", "--arch", "static", "--val-fraction", "0") == 0
    mean = np.mean([make_maps(i)[5]["artifacts"].half().double().numpy() for i in range(12)], axis=0)
    (value,) = denoiser_weights(tmp_path / "out").values()
    np.testing.assert_allclose(value[0].numpy(), -mean.reshape(16, 64), atol=1e-6)


def test_held_out_pairs_are_not_trained_on(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    training, held_out = open_pairs(pairs).split(0.25, seed=0)
    assert len(held_out.files) == 3 and not set(training.files) & set(held_out.files)
    assert run(pairs, tmp_path / "a", "--steps", "3", "--val-fraction", "0.25") == 0
    for file in held_out.files:
        change_pair(pairs / file, raw=torch.randn(4, 4, 64).half())
    assert run(pairs, tmp_path / "b", "--steps", "3", "--val-fraction", "0.25") == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("arch", ["block", "block-no-pe", "conv1x1", "conv3x3"])
def test_several_layers_together_are_trained_as_each_alone(arch, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", layers=(2, 5))
    assert run(pairs, tmp_path / "both", "--steps", "4", "--arch", arch) == 0
    assert run(pairs, tmp_path / "last", "--steps", "4", "--arch", arch, "--layers", "5") == 0
    assert run(pairs, tmp_path / "inner", "--steps", "4", "--arch", arch, "--layers", "2") == 0
    both = denoiser_weights(tmp_path / "both")
    last, inner = (denoiser_weights(tmp_path / name) for name in ("last", "inner"))
    alone = {name.replace("denoiser.", "denoiser.layers.5."): value for name, value in last.items()} | inner
    assert alone.keys() == both.keys()
    for name, value in alone.items():  # a convolution adds up in another order when its input has other strides
        torch.testing.assert_close(both[name], value, rtol=0, atol=1e-6 if "conv" in arch else 0)
    model = timm.create_model(f"local-dir:{tmp_path / 'both'}", pretrained=True)
    assert list(model.denoisers()) == [2, 5]


def test_init_goes_on_from_a_trained_denoiser(trained, pairs, tmp_path):
    assert run(pairs, tmp_path / "out", "--init", str(trained), "--steps", "1", "--lr", "0") == 0
    assert same(denoiser_weights(tmp_path / "out"), denoiser_weights(trained))
    assert run(pairs, tmp_path / "other", "--init", str(trained), "--steps", "1", "--blocks", "2") == 2


def test_bfloat16_and_several_blocks_and_warmup_are_trained(pairs, tmp_path):
    options = ["--dtype", "bfloat16", "--blocks", "2", "--warmup", "2", "--epochs", "2"]
    assert run(pairs, tmp_path / "out", *options) == 0
    keys = denoiser_weights(tmp_path / "out")
    assert "denoiser.blocks.1.mlp.fc2.weight" in keys and {v.dtype for v in keys.values()} == {torch.float32}


# ---- interruptions


STEPS = ("--steps", "200", "--batch-size", "4", "--checkpoint-every", "7", "--val-every", "50")


def kill_at_random_moments(pairs: Path, out: Path, times: int, seed: int) -> int:
    """Start the command and kill it, again and again; returns how often it died before it was done."""
    moments, killed = random.Random(seed), 0
    for _ in range(times):
        process = start(pairs, out, *STEPS)
        began = (out / "log.jsonl").stat().st_mtime_ns if (out / "log.jsonl").exists() else 0
        while process.poll() is None:  # until training, not importing, is what it does
            if (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_mtime_ns != began:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.communicate()
    return killed


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_run_again_ends_with_the_same_weights(pairs, tmp_path, times):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert finish(start(pairs, whole, *STEPS)) == 0
    assert kill_at_random_moments(pairs, torn, times, seed=times) >= min(times, 3) - 1
    assert finish(start(pairs, torn, *STEPS)) == 0
    assert same(weights(torn), weights(whole))
    numbers = [
        [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in open(out / "log.jsonl")]
        for out in (whole, torn)
    ]
    assert numbers[0] == numbers[1]


def test_stopped_after_any_checkpoint_it_continues_bit_for_bit(pairs, tmp_path, monkeypatch):
    options = ("--steps", "9", "--checkpoint-every", "2")
    assert run(pairs, tmp_path / "whole", *options) == 0
    save = train_denoiser.save_checkpoint

    def save_and_die(path, model, optimizer, step, facts):
        save(path, model, optimizer, step, facts)
        raise KeyboardInterrupt

    for _ in (2, 4, 6, 8):
        monkeypatch.setattr(train_denoiser, "save_checkpoint", save_and_die)
        assert run(pairs, tmp_path / "out", *options) == 130
        monkeypatch.undo()
    assert run(pairs, tmp_path / "out", *options) == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_finished_run_is_not_done_again_and_other_settings_are_refused(pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    log = (tmp_path / "out" / "log.jsonl").read_bytes()
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == log
    before = weights(tmp_path / "out")
    assert run(pairs, tmp_path / "out", "--steps", "2", "--lr", "0.1") == 2
    assert "lr: the folder has 0.0002, this run has 0.1" in capsys.readouterr().err
    assert same(weights(tmp_path / "out"), before)


def test_two_processes_at_half_the_batch_end_with_the_weights_of_one(pairs, tmp_path):
    options = ("--steps", "12", "--val-every", "6")
    assert run(pairs, tmp_path / "one", *options) == 0
    launcher = (*TORCHRUN, "--master-port", "29611", "-m")
    two = start(pairs, tmp_path / "two", *options, "--batch-size", "2", launcher=launcher)
    output = two.communicate(timeout=300)
    assert two.returncode == 0, output
    one, both = denoiser_weights(tmp_path / "one"), denoiser_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], both[name], atol=2e-5, rtol=1e-4)


# ---- what is refused


def test_reading_ahead_keeps_the_order_and_raises_where_the_error_belongs():
    def task(i):
        time.sleep(0.01 * (i % 3))
        if i == 7:
            raise ValueError("seven")
        return i

    threads = torch.get_num_threads()
    assert set(read_ahead(torch.get_num_threads for _ in range(9))) == {1} and torch.get_num_threads() == threads
    found = []
    with pytest.raises(ValueError, match="seven"):
        for value in read_ahead((lambda i=i: task(i) for i in range(20)), workers=3):
            found.append(value)
    assert found == list(range(7))


def test_pairs_kept_in_memory_are_those_on_disk(pairs):
    found = open_pairs(pairs)
    kept, read = PairReader(found), PairReader(found, room=0)
    for _ in range(2):
        assert torch.equal(kept.read([3, 1, 3]), read.read([3, 1, 3]))
    assert len(kept._kept) == 2 and not read._kept


def damage(pairs: Path, how: str) -> None:
    path = pair_path(pairs, 3)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif how == "missing":
        path.unlink()
    elif how == "other grid":
        change_pair(path, raw=torch.zeros(5, 5, 64).half(), clean=torch.zeros(5, 5, 64).half())
    elif how == "mixed within":
        change_pair(path, raw=torch.zeros(5, 5, 64).half())
    elif how == "nan":
        change_pair(path, clean=torch.full((4, 4, 64), float("nan")).half())
    elif how == "infinity":
        change_pair(path, raw=torch.full((4, 4, 64), float("inf")).half())
    elif how == "no index":
        (pairs / "index.jsonl").unlink()
    elif how == "empty index":
        (pairs / "index.jsonl").write_bytes(b"")
    elif how == "no settings":
        (pairs / "settings.json").unlink()
    elif how == "broken settings":
        (pairs / "settings.json").write_text("{")


THIRD = pair_path(Path("pairs"), 3).name
BAD_PAIRS = {
    "truncated": THIRD, "garbage": THIRD, "missing": THIRD, "other grid": THIRD, "mixed within": THIRD,
    "nan": THIRD, "infinity": THIRD, "no index": "index.jsonl", "empty index": "index.jsonl",
    "no settings": "settings.json", "broken settings": "settings.json",
}  # fmt: skip


@pytest.mark.parametrize("start_from", ["static", "random"])
@pytest.mark.parametrize("how", BAD_PAIRS)
def test_bad_pairs_are_named(how, start_from, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", 6)
    damage(pairs, how)
    assert run(pairs, tmp_path / "out", "--steps", "6", "--val-fraction", "0", "--start", start_from) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and BAD_PAIRS[how] in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_pairs_of_another_model_weights_layer_or_width_are_refused(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", 2)
    out = tmp_path / "out"

    def error(*options: str) -> str:
        assert train_denoiser.main(["--pairs", str(pairs), "--out", str(out), "--no-pretrained", *options]) == 2
        return capsys.readouterr().err

    assert "model 'test_vit', not with --model test_vit2" in error("--model", "test_vit2")
    assert "hold block 5" in error("--model", "test_vit", "--layers", "3")
    wide = write_pairs(tmp_path / "wide", 2, model="vit_tiny_patch16_224")
    pairs = wide
    assert "64 channels, but --model vit_tiny_patch16_224 has 192" in error("--model", "vit_tiny_patch16_224")
    pairs = write_pairs(tmp_path / "weights", 2, weights="0" * 64)
    assert "whose weights are not those of --model test_vit" in error("--model", "test_vit")
    pairs = tmp_path / "nowhere"
    assert "nowhere holds no pairs" in error("--model", "test_vit")
    assert "no_such_model" in error("--model", "no_such_model", "--pairs", str(wide))
    assert "not to ResNet" in error("--model", "resnet18", "--pairs", str(wide))


def test_a_diverging_loss_is_an_error_that_names_the_setting_and_keeps_the_checkpoint(pairs, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--steps", "40", "--lr", "3", "--warmup", "30", "--checkpoint-every", "1")
    assert run(pairs, out, *options) == 1
    assert "the loss diverged" in (error := capsys.readouterr().err) and "--lr" in error
    state = load_file(out / "checkpoint.safetensors")
    assert all(value.float().isfinite().all() for value in state.values())
    assert run(pairs, out, *options) == 1


def test_a_damaged_checkpoint_is_named(pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    path = tmp_path / "out" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert run(pairs, tmp_path / "out", "--steps", "2") == 2
    assert "checkpoint.safetensors cannot be continued from" in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    ("--val-fraction", "1"), ("--warmup", "9", "--steps", "3"), ("--device", "nonsense"), ("--init", "nowhere"),
    ("--arch", "static", "--init", "x"), ("--arch", "conv3x3", "--blocks", "2"), ("--blocks", "0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(options, pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", *options) == 2
    assert options[0].strip("-").split("-")[0] in capsys.readouterr().err
