"""The tinycudann back-end, against a stand-in that has tinycudann's interface and computes in numpy."""

import sys
import types

import numpy as np
import pytest
import torch

from training.stage1.field.backends import make_encoding
from training.stage1.field.fit import FieldSettings, fit_field
from training.stage1.field.hashgrid import HashGrid, HashGridSettings

CPU = torch.device("cpu")
GRID = HashGridSettings(levels=3, features=2, log2_hashmap_size=9, per_level_scale=1.5)


class FakeEncoding(torch.nn.Module):
    """tinycudann.Encoding as the back-end knows it: constructor, flat `params`, forward and backward."""

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


def train(backend):
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand(200, 2, generator=generator)
    patches = torch.randint(16, (200,), generator=generator)
    features = torch.randn(200, 8, generator=generator)
    settings = FieldSettings(steps=40, batch=64, grid=GRID, backend=backend)
    return fit_field(coords, patches, features, 4, settings), coords


@pytest.mark.usefixtures("tinycudann")
def test_both_back_ends_train_the_same_field():
    torch_field, coords = train("torch")
    tiny_field, _ = train("tinycudann")
    assert isinstance(tiny_field.networks.encoding, FakeEncoding)
    torch.testing.assert_close(tiny_field.losses, torch_field.losses, rtol=1e-3, atol=0)
    torch.testing.assert_close(tiny_field.artifacts, torch_field.artifacts, rtol=0, atol=1e-3)
    torch.testing.assert_close(tiny_field.semantics(coords), torch_field.semantics(coords), rtol=0, atol=1e-2)


@pytest.mark.usefixtures("tinycudann")
def test_tinycudann_starts_from_the_parameters_of_the_torch_grid():
    torch.manual_seed(5)
    grid = HashGrid(GRID)
    torch.manual_seed(5)
    encoding = make_encoding(GRID, "tinycudann", CPU)
    assert isinstance(encoding, FakeEncoding)
    assert torch.equal(encoding.params, grid.params)


def test_another_formula_or_layout_in_tinycudann_is_an_error_or_by_auto_a_warning(tinycudann, monkeypatch):
    class OtherHash(FakeEncoding):
        def lookups(self, coords):
            rows, weights, entries = super().lookups(coords)
            return rows[:, ::-1], weights, entries

    monkeypatch.setattr(tinycudann, "Encoding", OtherHash)
    with pytest.raises(RuntimeError, match="encodes otherwise"):
        make_encoding(GRID, "tinycudann", CPU)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="otherwise.*PyTorch takes its place"):
        patch.setattr(HashGrid, "to", lambda grid, device: grid)
        assert isinstance(make_encoding(GRID, "auto", torch.device("cuda")), HashGrid)

    class OtherLayout(FakeEncoding):
        def lookups(self, coords):
            rows, weights, entries = super().lookups(coords)
            return rows, weights, entries + 8

    monkeypatch.setattr(tinycudann, "Encoding", OtherLayout)
    with pytest.raises(RuntimeError, match="lays the grid out in"):
        make_encoding(GRID, "tinycudann", CPU)


def test_asking_for_a_tinycudann_that_does_not_import_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinycudann", None)
    with pytest.raises(ImportError, match=r'backend="torch" gives the same field without it'):
        train("tinycudann")


@pytest.mark.usefixtures("tinycudann")
def test_auto_is_torch_on_the_cpu():
    assert isinstance(make_encoding(GRID, "auto", CPU), HashGrid)
