"""Claims about stage 2: what is optimized, and what comes of it."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.helpers.pair_folders import change_pair, make_maps, pair_path, write_pairs
from tests.helpers.processes import same, weights
from tests.helpers.stage2_runs import denoiser_weights, run
from timm_dvt.architectures import ARCHITECTURES
from training.loop.distance import norm_distance as distance
from training.loop.optimization import make_adamw
from training.loop.order import positions
from training.pairs.reader import open_pairs
from training.stage2.targets import Target

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


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


def test_targets_are_f_and_shares_of_the_residual():
    raw, semantics, artifacts = torch.randn(3, 2, 1, 16, 8)
    _, target = Target("F")(torch.stack([raw, semantics]))
    assert torch.equal(target, semantics)
    both = (raw.double() + semantics.double() - artifacts.double()) / 2
    for name, want in (("mean", both), ("raw-G", raw.double() - artifacts.double())):
        given, target = Target(name)(torch.stack([raw, semantics, artifacts]))
        assert torch.equal(given, raw)
        torch.testing.assert_close(target.double(), want, atol=1e-6, rtol=0)
    _, target = Target("rescaled")(torch.stack([raw, semantics, artifacts]))
    torch.testing.assert_close(target.norm(dim=-1), (raw - artifacts).norm(dim=-1))
    assert torch.cosine_similarity(target, semantics, dim=-1).min() > 1 - 1e-6


@pytest.mark.parametrize("target, share", [("F", 0.0), ("mean", 0.5), ("raw-G", 1.0)])
def test_a_run_starts_from_the_mean_correction_to_its_target(target, share, tmp_path):
    """With a residual in the pairs: at a learning rate of 0 the position embedding stays mean(target - raw)."""
    folder = write_pairs(tmp_path / "pairs")
    want = torch.zeros(16, 64)
    for image in range(12):
        maps = make_maps(image)[5]
        residual = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(image)).half().float()
        change_pair(pair_path(folder, image), raw=(maps["raw"] + residual).half())
        correction = (share - 1) * residual - maps["artifacts"]
        want += correction.flatten(0, 1) / 12
    out = tmp_path / "out"
    assert run(folder, out, "--target", target, "--lr", "0", "--steps", "1", "--val-fraction", "0") == 0
    assert torch.allclose(denoiser_weights(out)["denoiser.pos_embed"][0], want, atol=4e-3)  # pairs in half precision
    assert json.loads((out / "settings.json").read_text())["target"] == target


def test_position_embedding_norms_and_biases_are_not_decayed():
    model = timm.create_model("test_vit")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)]: g["weight_decay"] for g in make_adamw(model, 1e-3, 0.1).param_groups for p in g["params"]}
    assert set(decayed) == set(names.values())
    assert decayed["blocks.0.mlp.fc1.weight"] == 0.1
    assert {decayed[name] for name in ("pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.bias")} == {0.0}


def test_one_step_is_plain_adamw_on_plain_eq_11(pairs, tmp_path):
    """The first update, recomputed with torch's own optimizer from the start that --start random gives."""
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
    for _ in range(2):
        assert run(pairs, tmp_path / "out", "--arch", "static", "--val-fraction", "0") == 0
        assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) <= 1  # a run of no steps is no longer one
    mean = np.mean([make_maps(i)[5]["artifacts"].half().double().numpy() for i in range(12)], axis=0)
    gated = denoiser_weights(tmp_path / "out")
    assert sorted(gated) == ["denoiser.flat_below", "denoiser.pos_embed"]  # random tokens tell no blank images apart
    np.testing.assert_allclose(gated["denoiser.pos_embed"][0].numpy(), -mean.reshape(16, 64), atol=1e-6)
    assert run(pairs, tmp_path / "no", "--arch", "static", "--val-fraction", "0", "--no-blank-gate") == 0
    (value,) = denoiser_weights(tmp_path / "no").values()
    assert torch.equal(value, gated["denoiser.pos_embed"])


def test_held_out_pairs_are_not_trained_on(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    training, held_out = open_pairs(pairs).split(0.25, seed=0)
    assert len(held_out.files) == 3 and not set(training.files) & set(held_out.files)
    assert run(pairs, tmp_path / "a", "--steps", "3", "--val-fraction", "0.25") == 0
    for file in held_out.files:
        change_pair(pairs / file, raw=torch.randn(4, 4, 64).half())
    assert run(pairs, tmp_path / "b", "--steps", "3", "--val-fraction", "0.25") == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_crops_are_learned_from_unless_whole_images_alone_are_asked_for(tmp_path):
    bare, with_crops = write_pairs(tmp_path / "bare"), write_pairs(tmp_path / "crops", crops=3)
    for pairs, out, more in ((bare, "a", ()), (with_crops, "b", ("--whole", "1")), (with_crops, "c", ())):
        assert run(pairs, tmp_path / out, "--steps", "3", *more) == 0
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert same(a, b) and not same(a, c)
    training, _ = open_pairs(with_crops).split(0.05, seed=0)
    for file in training.files:
        change_pair(
            with_crops / file, **{f"crops.{part}": torch.zeros(3, 4, 4, 64).half() for part in ("raw", "clean")}
        )
    assert run(with_crops, tmp_path / "d", "--steps", "3") == 0
    assert not same(weights(tmp_path / "d"), c)


@pytest.mark.parametrize("arch", [name for name, row in ARCHITECTURES.items() if row.trains])
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


def test_init_of_the_last_block_is_for_no_other(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", layers=(2, 5))
    assert run(pairs, tmp_path / "last", "--layers", "5", "--steps", "1") == 0
    assert run(pairs, tmp_path / "earlier", "--layers", "2", "--init", str(tmp_path / "last"), "--steps", "1") == 2
    assert "holds denoisers for blocks [5], none for 2" in capsys.readouterr().err


def test_bfloat16_and_several_blocks_and_warmup_are_trained(pairs, tmp_path):
    options = ["--dtype", "bfloat16", "--blocks", "2", "--warmup", "2", "--epochs", "2"]
    assert run(pairs, tmp_path / "out", *options) == 0
    keys = denoiser_weights(tmp_path / "out")
    assert "denoiser.blocks.1.mlp.fc2.weight" in keys and {v.dtype for v in keys.values()} == {torch.float32}
