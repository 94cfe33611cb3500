"""The tinycudann adapter, against a stand-in that has tinycudann's interface and computes in numpy."""

import sys
import types

import numpy as np
import pytest
import torch

import training.stage1.field.backends as field_backends
from training.stage1.field.backends import TinyCudaTrainer, TorchTrainer, grid_trainer
from training.stage1.field.field import FieldSettings, fit_field
from training.stage1.field.hashgrid import HashGrid, HashGridSettings, TouchedEntries

GRID = HashGridSettings(levels=3, features=2, log2_hashmap_size=9, per_level_scale=1.5)


class FakeEncoding(torch.nn.Module):
    """tinycudann.Encoding as the adapter knows it: constructor, flat `params`, forward and backward."""

    def __init__(self, n_input_dims, encoding_config, seed=1337, dtype=None):
        super().__init__()
        assert n_input_dims == 2 and dtype == torch.float32
        assert encoding_config["otype"] == "HashGrid" and encoding_config["interpolation"] == "Linear"
        self.config = encoding_config
        _, _, entries = self.lookups(np.zeros((1, 2)))
        self.params = torch.nn.Parameter(torch.zeros(entries * encoding_config["n_features_per_level"]))

    def lookups(self, coords):
        """Rows and weights (levels, 4, B), and the number of entries."""
        config, offset, rows, weights = self.config, 0, [], []
        for level in range(config["n_levels"]):
            scale = config["base_resolution"] * config["per_level_scale"] ** level - 1
            resolution = int(np.ceil(scale)) + 1
            size = min((resolution**2 + 7) // 8 * 8, 2 ** config["log2_hashmap_size"])
            cell = np.floor(coords * scale + 0.5).astype(np.uint64)
            fraction = coords * scale + 0.5 - cell
            for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
                x, y = cell[:, 0] + np.uint64(right), cell[:, 1] + np.uint64(down)
                hashed = (x ^ (y * np.uint64(2654435761))) % np.uint64(2**32)
                place = x + y * np.uint64(resolution) if resolution**2 <= size else hashed
                rows.append(offset + (place % np.uint64(size)).astype(np.int64))
                across = fraction[:, 0] if right else 1 - fraction[:, 0]
                weights.append(across * (fraction[:, 1] if down else 1 - fraction[:, 1]))
            offset += size
        shape = (config["n_levels"], 4, len(coords))
        return np.reshape(rows, shape), np.reshape(weights, shape), offset

    def forward(self, coords):
        return _FakeKernel.apply(self.params, coords, self)


class _FakeKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, params, coords, module):
        ctx.rows, ctx.weights, entries = module.lookups(coords.double().numpy())
        table = params.detach().numpy().reshape(entries, -1)
        ctx.shape = table.shape
        encoded = (table[ctx.rows] * ctx.weights[..., None]).sum(1)  # (levels, B, features)
        return torch.from_numpy(encoded.transpose(1, 0, 2).reshape(len(coords), -1)).float()

    @staticmethod
    def backward(ctx, upstream):
        table = np.zeros(ctx.shape)
        per_level = upstream.double().numpy().reshape(len(upstream), len(ctx.rows), -1).transpose(1, 0, 2)
        np.add.at(table, ctx.rows, ctx.weights[..., None] * per_level[:, None])
        return torch.from_numpy(table).float().flatten(), None, None


@pytest.fixture(name="tinycudann")
def fixture_tinycudann(monkeypatch):
    module = types.ModuleType("tinycudann")
    module.Encoding = FakeEncoding
    monkeypatch.setitem(sys.modules, "tinycudann", module)
    return module


# Levels of GRID have 256, 512 and 512 entries, the last two hashed.
@pytest.mark.parametrize("coarse", [0, 300, 40_000], ids=["none-coarse", "one-coarse", "all-coarse"])
def test_the_grid_ends_where_dense_adam_ends_whichever_levels_are_moved_whole(coarse, monkeypatch):
    monkeypatch.setattr(field_backends, "COARSE", coarse)
    generator = torch.Generator().manual_seed(0)
    grid, dense = (HashGrid(GRID, torch.Generator().manual_seed(5)) for _ in range(2))
    start = grid.params.detach().clone()
    trainer, adam = TorchTrainer(grid, max_steps=60), torch.optim.Adam([dense.params])
    assert trainer.coarse_levels == {0: 0, 300: 1, 40_000: 3}[coarse]
    target = torch.randn(GRID.width, generator=generator)
    for step in range(60):
        coords = torch.rand(20, 2, generator=generator)
        encoded = trainer.encode(coords)
        # The gradient depends on the values, so that a difference would feed back.
        ((encoded - target) ** 2).sum().backward()
        trainer.step(0.01 * (1 - step / 60))
        reference = dense(coords)
        torch.testing.assert_close(encoded.detach(), reference.detach(), rtol=0, atol=1e-5)
        adam.zero_grad()
        ((reference - target) ** 2).sum().backward()
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / 60)
        adam.step()
    assert trainer.finish() is grid
    assert (grid.params - start).abs().max() > 0.1
    torch.testing.assert_close(grid.params, dense.params, rtol=0, atol=1e-5)


@pytest.mark.parametrize("coarse", [0, 40_000])
def test_a_step_without_a_backward_pass_says_so(coarse, monkeypatch):
    monkeypatch.setattr(field_backends, "COARSE", coarse)
    trainer = TorchTrainer(HashGrid(GRID), max_steps=1)
    trainer.encode(torch.rand(4, 2))
    with pytest.raises(RuntimeError, match="backward"):
        trainer.step(0.01)


def train(backend):
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(200, 2, generator=generator)
    patches = torch.randint(16, (200,), generator=generator)
    features = torch.randn(200, 8, generator=generator)
    settings = FieldSettings(steps=40, batch=64, grid=GRID, backend=backend)
    return fit_field(coords, patches, features, 4, settings), coords


@pytest.mark.usefixtures("tinycudann")
@pytest.mark.parametrize("coarse", [0, 40_000])
def test_both_back_ends_train_the_same_field(coarse, monkeypatch):
    monkeypatch.setattr(field_backends, "COARSE", coarse)
    torch_field, coords = train("torch")
    tiny_field, _ = train("tinycudann")
    torch.testing.assert_close(tiny_field.losses, torch_field.losses, rtol=1e-3, atol=0)
    torch.testing.assert_close(tiny_field.artifacts, torch_field.artifacts, rtol=0, atol=1e-3)
    assert (tiny_field.grid.params - torch_field.grid.params).abs().max() < 2e-3
    torch.testing.assert_close(tiny_field.semantics(coords), torch_field.semantics(coords), rtol=0, atol=1e-2)


@pytest.mark.usefixtures("tinycudann")
def test_parameters_go_to_tinycudann_and_come_back_in_the_same_layout():
    grid = HashGrid(GRID, torch.Generator().manual_seed(5))
    start = grid.params.detach().clone()
    trainer = grid_trainer("tinycudann", grid, max_steps=1)
    assert isinstance(trainer, TinyCudaTrainer)
    assert torch.equal(trainer.encoding.params, start)
    coords = torch.rand(9, 2, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(trainer.encode(coords), grid(coords), rtol=0, atol=1e-10)
    trainer.encode(coords).sum().backward()
    trainer.step(0.01)
    finished = trainer.finish()
    changed = (finished.params != start).view(-1, GRID.features).any(1).nonzero()[:, 0]
    assert changed.tolist() == TouchedEntries(*grid.lookups(coords)).rows.tolist()


def test_another_formula_or_layout_in_tinycudann_is_an_error(tinycudann, monkeypatch):
    grid = HashGrid(GRID)

    class OtherHash(FakeEncoding):
        def lookups(self, coords):
            rows, weights, entries = super().lookups(coords)
            return rows[:, ::-1], weights, entries

    monkeypatch.setattr(tinycudann, "Encoding", OtherHash)
    with pytest.raises(RuntimeError, match="encodes otherwise"):
        grid_trainer("tinycudann", grid, 1)

    class OtherLayout(FakeEncoding):
        def lookups(self, coords):
            rows, weights, entries = super().lookups(coords)
            return rows, weights, entries + 8

    monkeypatch.setattr(tinycudann, "Encoding", OtherLayout)
    with pytest.raises(RuntimeError, match="lays the grid out in"):
        grid_trainer("tinycudann", grid, 1)


def test_asking_for_a_tinycudann_that_does_not_import_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    with pytest.raises(ImportError, match=r'backend="torch" gives the same field without it'):
        train("tinycudann")


def test_auto_is_torch_where_tinycudann_is_missing_or_the_grid_is_on_the_cpu(tinycudann, monkeypatch):
    assert tinycudann.Encoding is FakeEncoding
    assert isinstance(grid_trainer("auto", HashGrid(GRID), 1), TorchTrainer)
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    assert isinstance(grid_trainer("auto", HashGrid(GRID), 1), TorchTrainer)
