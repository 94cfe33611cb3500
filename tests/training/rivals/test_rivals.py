"""Each rival takes out what was planted for it, and nothing else, in closed form."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import small_datasets
from tests.helpers.small_datasets import small_vit
from timm_dvt.calibration.linear import projecting_out
from timm_dvt.calibration.samples import canvas
from timm_dvt.loading import load_model
from training.evaluate.position import share
from training.rivals import insid3, mean_map, rasa
from training.rivals.__main__ import main
from training.rivals.sample import Moments, Sample

K, C = 8, 24


def orthonormal(count):
    return torch.linalg.qr(torch.randn(C, count, dtype=torch.float64)).Q


def cleaned(denoiser, maps):
    with torch.no_grad():
        return denoiser(maps.flatten(-3, -2).reshape(-1, K * K, C).float(), (K, K)).double().reshape(maps.shape)


# ---- INSID3


@pytest.fixture
def planted_subspace():
    """A mean token, three directions of position, and a blank image's tokens, all of one length."""
    basis = orthonormal(4)
    mean, directions = 5 * basis[:, 0], basis[:, 1:]
    weights = nn.functional.normalize(torch.randn(K, K, 3, dtype=torch.float64), dim=-1)
    return mean, directions, mean + weights @ directions.T


def test_insid3_takes_out_the_planted_subspace_and_leaves_what_is_orthogonal_to_it(planted_subspace):
    mean, directions, blank = planted_subspace
    found = insid3.directions(blank, energy=1)
    torch.testing.assert_close(found @ found.T, directions @ directions.T)
    denoiser = projecting_out(found, K)
    torch.testing.assert_close(cleaned(denoiser, blank), mean.expand(K, K, C), atol=1e-5, rtol=0)
    content = torch.randn(2, K, K, C, dtype=torch.float64)
    content -= content @ directions @ directions.T
    torch.testing.assert_close(cleaned(denoiser, content), content, atol=1e-5, rtol=0)


def test_insid3_has_the_cosines_of_its_own_order_of_steps():
    """Length 1, SVD of the centered blank tokens, projection, length 1: in float64, with NumPy."""
    blank, tokens = np.random.default_rng(0).normal(size=(2, K * K, C))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (blank, tokens)]
    left = np.linalg.svd((unit[0] - unit[0].mean(0)).T)[0][:, : round(500 / 1024 * C)]
    theirs = unit[1] - unit[1] @ left @ left.T
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    basis = insid3.directions(torch.from_numpy(blank).reshape(K, K, C))
    ours = cleaned(projecting_out(basis, K), torch.from_numpy(tokens).reshape(K, K, C)).flatten(0, 1).numpy()
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-5)


def test_insid3_takes_their_numbers_of_directions():
    large, base = torch.randn(23, 23, 1024), torch.randn(5, 5, 768)
    assert insid3.directions(large).shape == (1024, 500)
    assert insid3.directions(base, insid3.MATCHING).shape == (768, 20)


def test_insid3_energy_counts_directions_until_they_hold_the_share():
    directions = orthonormal(3) * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    weights = torch.linalg.qr(torch.randn(K * K, 4, dtype=torch.float64) + 1).Q
    weights = torch.linalg.qr(torch.cat([torch.ones(K * K, 1, dtype=torch.float64), weights[:, :3]], 1)).Q[:, 1:]
    mean = torch.linalg.qr(torch.cat([directions, torch.randn(C, 1, dtype=torch.float64)], 1)).Q[:, 3]
    blank = (1e4 * mean + weights @ directions.T).reshape(K, K, C)  # so long that lengths are all but equal
    counts = [insid3.directions(blank, energy=energy).shape[1] for energy in (0.6, 0.7, 0.92, 0.94)]
    assert counts == [1, 2, 2, 3]  # squares 9, 4, 1 of 14: 0.643, 0.929, 1


# ---- RASA


def planted_lines(content, along):
    """Moments of tokens z + row a + column b, for content of covariance `content` and z's mean token."""
    places = rasa.positions(K, K)
    mean = torch.randn(C, dtype=torch.float64)
    mean_map = (mean + places @ along.T).reshape(K, K, C)
    second = content + torch.outer(mean, mean) + along @ (places.T @ places / K**2) @ along.T
    return Moments(mean_map, second)


def test_rasa_takes_out_the_two_planted_directions_in_its_first_round():
    along = orthonormal(2) * torch.tensor([2.0, 0.5], dtype=torch.float64)
    moments = planted_lines(torch.eye(C, dtype=torch.float64) * 0.1, along)
    # The mean token has no part along them: a map without bias would mix it in.
    mean = moments.mean_map.mean((0, 1))
    moments = Moments(moments.mean_map - mean, moments.second - torch.outer(mean, mean))
    found = rasa.directions(moments)
    assert found.shape == (C, 2)
    torch.testing.assert_close(found @ found.T, along @ torch.linalg.pinv(along))


def test_a_round_of_rasa_is_the_plane_of_a_regression_without_bias():
    tokens = torch.randn(9, K * K, C, dtype=torch.float64) @ torch.randn(C, C, dtype=torch.float64) + 1
    tokens += rasa.positions(K, K) @ torch.randn(2, C, dtype=torch.float64)
    flat = tokens.flatten(0, 1)
    moments = Moments(tokens.mean(0).reshape(K, K, C), flat.T @ flat / len(flat))
    weights = np.linalg.lstsq(flat.numpy(), np.tile(rasa.positions(K, K).numpy(), (9, 1)), rcond=None)[0]
    found = rasa.directions(moments, rounds=1).numpy()
    np.testing.assert_allclose(found @ found.T, weights @ np.linalg.pinv(weights), atol=1e-3)  # the ridge's


def test_a_round_of_rasa_is_the_plane_that_minimizes_the_loss_with_a_sigmoid():
    places = rasa.positions(K, K)
    root, along = orthonormal(C) * torch.linspace(0.2, 1, C), orthonormal(2) * torch.tensor([1.5, 0.8])
    tokens = 2 * root[:, 0] + torch.randn(40, K * K, C, dtype=torch.float64) @ root.T + places @ along.T
    flat = tokens.flatten(0, 1)
    weights = torch.zeros(C, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.mse_loss((tokens @ weights).sigmoid(), (places + 0.5).expand(40, -1, -1))
        value.backward()
        return value

    optimizer.step(loss)
    moments = Moments(tokens.mean(0).reshape(K, K, C), flat.T @ flat / len(flat))
    plane = torch.linalg.qr(weights.detach()).Q
    cosines = torch.linalg.svdvals(plane.T @ rasa.directions(moments, rounds=1))
    assert cosines.min() > 0.995


def test_after_rasa_no_regression_predicts_row_or_column_from_tokens():
    """Content along the planted directions, so that rounds are needed; NumPy regresses tokens not learned from."""
    along = 2 * orthonormal(2)
    root = torch.randn(C, C, dtype=torch.float64) / C**0.5
    moments = planted_lines(root @ root.T, along)
    mean = moments.mean_map.mean((0, 1))
    content = mean + torch.randn(60, K * K, C, dtype=torch.float64) @ root.T
    places = rasa.positions(K, K)
    tokens = (content + places @ along.T).reshape(60, K, K, C)

    def explained(maps):
        target = np.tile(places.numpy(), (60, 1))
        design = np.c_[maps.reshape(-1, C).numpy(), np.ones(60 * K * K)]
        left = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
        return 1 - (left**2).sum(0) / (target**2).sum(0)

    found = rasa.directions(moments, rounds=9)
    after = explained(cleaned(projecting_out(found, K), tokens))
    # Regressed with a bias, which finds a little along the mean token, where RASA does not go.
    assert (explained(tokens) > 0.8).all() and (after < 0.05).all()
    assert found.shape[1] < C


def test_rasa_takes_out_nothing_where_there_is_no_line():
    moments = planted_lines(torch.eye(C, dtype=torch.float64), torch.zeros(C, 2, dtype=torch.float64))
    assert rasa.directions(moments).shape == (C, 0)


# ---- the mean map, and what all learn from


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("folder")
    small_datasets.folder(where, train=4, val=3)
    return where


def test_the_moments_are_those_of_the_crops_tokens(folder):
    model = small_vit()
    images = sorted((folder / "train" / "images").rglob("*.jpg"))
    sample = Sample(model, images, 64, views=5, batch_size=2)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    crops = torch.stack([(canvas(images[i % 4], (64, 64), i) - mean) / std for i in range(5)])
    with torch.no_grad():
        tokens = model.forward_features(crops)[:, 1:].double()
        black = model.forward_features(((0 - mean) / std).expand(1, 3, 64, 64))[0, 1:].double()
    second = sum(torch.outer(x, x) for x in tokens.flatten(0, 1)) / (5 * 16)
    torch.testing.assert_close(sample.moments.mean_map, tokens.mean(0).reshape(4, 4, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(sample.moments.second, second, atol=1e-5, rtol=0)
    torch.testing.assert_close(sample.black, black.reshape(4, 4, 32), atol=1e-5, rtol=0)


def test_the_mean_map_is_subtracted_and_the_mean_token_stays(folder):
    model = small_vit()
    images = sorted((folder / "train" / "images").rglob("*.jpg"))
    sample = Sample(model, images, 64, views=4)
    crops = torch.cat(list(sample.batches()))
    raw = sample.maps(crops)
    mean_map.fit(model, sample)
    with torch.no_grad():
        clean = model.denoiser(raw.flatten(1, 2).float(), (4, 4)).double()
    planted = raw.mean(0) - raw.mean((0, 1, 2))
    torch.testing.assert_close(clean, (raw - planted).flatten(1, 2), atol=1e-5, rtol=0)


# ---- the command


def test_two_folders_are_two_columns(folder, tmp_path):
    small_datasets.folder(tmp_path / "second", train=2, val=3)
    arguments = dict(img_size=64, depth=1, embed_dim=32, num_heads=2, num_classes=0)
    words = ["--model", small_datasets.saved_model(tmp_path / "model", arguments), "--views", "32"]
    words += ["--images", str(folder / "train" / "images"), "--out", str(tmp_path / "out"), "--rivals", "static"]
    assert main([*words, "--tasks", f"position:folder:{folder}", f"position:folder:{tmp_path / 'second'}"]) == 0
    headings = (tmp_path / "out" / "rivals.md").read_text().splitlines()[0]
    assert all(headings.count(f"| {name} position % |") == 1 for name in (folder.name, "second"))


@pytest.mark.slow
def test_a_table_of_all_rows_and_nothing_done_twice(folder, tmp_path, monkeypatch, capsys):
    model = small_datasets.saved_model(
        tmp_path / "model", dict(img_size=64, depth=1, embed_dim=32, num_heads=2, num_classes=0)
    )
    words = ["--model", model, "--images", str(folder / "train" / "images"), "--out", str(tmp_path / "out")]
    words += ["--views", "32", "--rivals", "mean-map", "insid3", "registers", "static", "denoiser"]
    words += ["--tasks", f"position:folder:{folder}"]
    assert main(words) == 0
    table = (tmp_path / "out" / "rivals.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines()[2:8]] == [
        "| raw",
        "| mean-map",
        "| insid3",
        "| registers",
        "| static",
        "| denoiser",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(share, "run", lambda *_: pytest.fail("evaluated again"))
        patch.setattr(Sample, "maps", lambda *_: pytest.fail("learned again"))
        assert main(words) == 0
    assert (tmp_path / "out" / "rivals.md").read_text() == table
    loaded = load_model(f"local-dir:{tmp_path / 'out' / 'models' / 'insid3'}")
    weight = loaded.denoiser.blocks[0].weight.detach().double()
    torch.testing.assert_close(weight @ weight, weight, atol=1e-5, rtol=0)  # a projection
    assert round(float(weight.trace())) == 32 - 16


def test_a_task_that_is_none_is_refused_with_those_there_are(folder, tmp_path, capsys):
    words = ["--model", "vit_tiny_patch16_224", "--images", str(folder), "--out", str(tmp_path)]
    assert main([*words, "--tasks", f"positions:folder:{folder}"]) == 2
    assert "TASK:DATASET:DIR" in capsys.readouterr().err
