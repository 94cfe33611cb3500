"""The hash grid and its Adam against float64 numpy loops and torch's dense Adam."""

import math

import numpy as np
import pytest
import torch

from training.stage1.field.hashgrid import AllEntries, HashGrid, HashGridSettings, TouchedEntries, grid_levels
from training.stage1.field.touched_adam import TouchedAdam

# Name: settings and which of the levels they should hash.
GRIDS = {
    "dense": (HashGridSettings(levels=5, features=4, log2_hashmap_size=14, per_level_scale=1.6), 0),
    "hashed": (HashGridSettings(levels=4, features=2, log2_hashmap_size=6, per_level_scale=2.0), 4),
    "mixed": (HashGridSettings(levels=6, features=8, log2_hashmap_size=8, base_resolution=8), 3),
    "huge": (HashGridSettings(levels=3, features=2, log2_hashmap_size=12, per_level_scale=64.0), 2),
    "smaller-than-a-row": (HashGridSettings(levels=2, features=2, log2_hashmap_size=3), 2),
    "one-level": (HashGridSettings(levels=1, features=2, per_level_scale=1.0), 0),
    "volume": (HashGridSettings(dims=3, levels=3, features=2, log2_hashmap_size=14, per_level_scale=1.5), 1),
}


def reference_lookups(coords, settings):
    """tiny-cuda-nn's formulas in plain loops: for each coordinate [(row, weight, level)], and the row count.

    Python integers and float64, but for the scale, which is float32 in tiny-cuda-nn and decides the layout.
    """
    found = [[] for _ in coords]
    offset = 0
    log2_scale = np.log2(np.float32(settings.per_level_scale))
    for level in range(settings.levels):
        power = np.exp2(np.float32(level) * log2_scale)
        scale = float(power * np.float32(settings.base_resolution) - np.float32(1.0))
        resolution = math.ceil(scale) + 1
        size = resolution**settings.dims
        size += -size % 8
        size = min(size, 2**settings.log2_hashmap_size)
        for sample, coord in enumerate(coords):
            position = [float(x) * scale + 0.5 for x in coord]
            cell = [math.floor(p) for p in position]
            for corner in range(2**settings.dims):
                weight, vertex = 1.0, []
                for dim in range(settings.dims):
                    step = corner >> dim & 1
                    fraction = position[dim] - cell[dim]
                    weight *= fraction if step else 1 - fraction
                    vertex.append(cell[dim] + step)
                stride, index = 1, 0
                for dim in range(settings.dims):
                    if stride > size:
                        break
                    index += vertex[dim] * stride
                    stride *= resolution
                if size < stride:
                    index = 0
                    for dim, prime in zip(range(settings.dims), (1, 2654435761, 805459861)):
                        index ^= vertex[dim] * prime % 2**32
                found[sample].append((offset + index % size, weight, level))
        offset += size
    return found, offset


def reference_encode(coords, table, settings):
    """(B, levels * features) float64 from a table (E, features)."""
    found, _ = reference_lookups(coords, settings)
    out = np.zeros((len(coords), settings.levels, settings.features))
    for sample, lookups in enumerate(found):
        for row, weight, level in lookups:
            out[sample, level] += weight * table[row]
    return out.reshape(len(coords), -1)


def reference_gradient(coords, upstream, settings):
    """(E, features) float64, from the gradient (B, levels * features) of the encoding."""
    found, entries = reference_lookups(coords, settings)
    out = np.zeros((entries, settings.features))
    upstream = upstream.reshape(len(coords), settings.levels, settings.features)
    for sample, lookups in enumerate(found):
        for row, weight, level in lookups:
            out[row] += weight * upstream[sample, level]
    return out


def some_coords(dims, count=40):
    """Coordinates inside, and every corner of the unit square or cube."""
    inside = torch.rand(count, dims, generator=torch.Generator().manual_seed(1))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * dims)
    edges = inside[:8].clone()
    edges[:4, 0], edges[4:, -1] = 0.0, 1.0
    return torch.cat((inside, corners, edges))


@pytest.fixture(params=GRIDS, name="case")
def fixture_case(request):
    settings, hashed = GRIDS[request.param]
    grid = HashGrid(settings, torch.Generator().manual_seed(0))
    return grid, hashed, some_coords(settings.dims)


def test_the_cases_cover_dense_and_hashed_levels(case):
    grid, hashed, _ = case
    assert sum(level.hashed for level in grid.levels) == hashed


def test_encoding_is_tiny_cuda_nns_to_float32(case):
    grid, _, coords = case
    expected = reference_encode(coords.numpy(), grid.table.detach().double().numpy(), grid.settings)
    encoded = grid(coords).detach().numpy()
    np.testing.assert_allclose(encoded, expected, rtol=0, atol=3e-7 * 1e-4)


def test_dense_gradient_is_tiny_cuda_nns_to_float32(case):
    grid, _, coords = case
    upstream = torch.randn(len(coords), grid.settings.width, generator=torch.Generator().manual_seed(2))
    grid(coords).backward(upstream)
    expected = reference_gradient(coords.numpy(), upstream.double().numpy(), grid.settings)
    actual = grid.params.grad.view_as(grid.table).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_touched_entries_give_the_same_encoding_and_gradient(case):
    grid, _, coords = case
    upstream = torch.randn(len(coords), grid.settings.width, generator=torch.Generator().manual_seed(2))
    touched = TouchedEntries(*grid.lookups(coords))
    entries = grid.table.detach()[touched.rows].requires_grad_()
    encoded = touched.encode(entries)
    encoded.backward(upstream)
    assert torch.equal(encoded, grid(coords))
    expected = reference_gradient(coords.numpy(), upstream.double().numpy(), grid.settings)
    np.testing.assert_allclose(
        entries.grad.numpy(), expected[touched.rows], rtol=0, atol=3e-7 * np.abs(expected).max()
    )
    untouched = np.delete(expected, touched.rows, axis=0)
    assert not untouched.any()


def test_all_entries_of_some_levels_give_the_same_encoding_and_gradient(case):
    grid, _, coords = case
    for levels in range(1, len(grid.levels) + 1):
        count = sum(level.entries for level in grid.levels[:levels])
        rows, weights = grid.lookups(coords)
        entries = grid.table.detach()[:count].clone().requires_grad_()
        encoded = AllEntries(rows[:, :levels], weights[:, :levels], count).encode(entries)
        upstream = torch.randn(encoded.shape, generator=torch.Generator().manual_seed(2))
        encoded.backward(upstream)
        assert torch.equal(encoded, grid(coords)[:, : levels * grid.settings.features])
        others = np.zeros((len(coords), (len(grid.levels) - levels) * grid.settings.features))
        upstream = np.concatenate((upstream.double().numpy(), others), axis=1)
        expected = reference_gradient(coords.numpy(), upstream, grid.settings)
        np.testing.assert_allclose(
            entries.grad.numpy(), expected[:count], rtol=0, atol=3e-7 * np.abs(expected).max()
        )
        assert not expected[count:].any()


def test_touched_rows_are_exactly_those_looked_up(case):
    grid, _, coords = case
    found, entries = reference_lookups(coords.numpy(), grid.settings)
    assert grid.entries == entries
    assert grid.params.shape == (entries * grid.settings.features,)
    assert TouchedEntries(*grid.lookups(coords)).rows.tolist() == sorted({row for one in found for row, _, _ in one})


def test_paper_grid_has_sixteen_levels_of_which_float32_makes_the_finest_hashed():
    levels = grid_levels(HashGridSettings())
    assert len(levels) == 16 and HashGridSettings().width == 128
    assert levels[0].resolution == 2**4 and levels[0].entries == 256
    assert abs(levels[-1].scale - (2**10 - 1)) < 1e-2
    assert levels[-1].entries == 2**20
    assert [level.hashed for level in levels] == [False] * 15 + [True]


def test_parameters_start_uniform_within_1e_4():
    params = HashGrid(HashGridSettings(levels=4)).params.detach()
    assert params.abs().max() <= 1e-4
    assert abs(params.std().item() - 1e-4 / math.sqrt(3)) < 2e-6
    assert abs(params.mean().item()) < 2e-6


def test_an_impossible_grid_names_the_setting():
    for name, value in (("levels", 0), ("features", 0), ("dims", 4), ("per_level_scale", 0.5)):
        with pytest.raises(ValueError, match=name):
            HashGrid(HashGridSettings(**{name: value}))


def run_adams(eps, scale, rows=40, steps=400, seed=0):
    """The same sparse gradients through TouchedAdam and torch's dense Adam, both float64: the two tables."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    table, dense = start.clone(), torch.nn.Parameter(start.clone())
    ours = TouchedAdam(table, steps, eps=eps)
    theirs = torch.optim.Adam([dense], eps=eps)
    # Rows are touched with very different frequencies, the last few never.
    chance = torch.linspace(0.9, 0.0, rows).clamp_min(0) ** 3
    for step in range(steps):
        picked = (torch.rand(rows, generator=generator) < chance).nonzero()[:, 0]
        rate = 0.01 * (1 - step / steps)
        values = ours.gather(picked)
        assert torch.allclose(values, dense.detach()[picked], rtol=0, atol=1e-3)
        # The gradient depends on the values, so that a difference would feed back.
        noise = torch.randn(values.shape, generator=generator, dtype=values.dtype)
        gradient = scale * (values - 0.3 + 0.1 * noise)
        ours.step(gradient, rate)
        dense.grad = torch.zeros_like(dense)
        dense.grad[picked] = gradient
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    ours.settle()
    return start, table, dense.detach()


def test_rows_follow_dense_adam_even_while_they_are_not_touched():
    start, ours, dense = run_adams(eps=1e-15, scale=1.0)
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-9)
    assert (dense - start).abs().max() > 0.5
    assert torch.equal(ours[-1], start[-1])


def test_rows_follow_dense_adam_closely_with_its_default_eps_and_gradients_of_a_batch_mean():
    start, ours, dense = run_adams(eps=1e-8, scale=1e-4)
    moved = (dense - start).abs().max().item()
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-3 * moved)


def test_skipping_untouched_rows_would_be_another_trajectory():
    """The control for the two tests above: SparseAdam's rule on the same gradients ends elsewhere."""
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(1, 1, dtype=torch.float64)
    ours = TouchedAdam(table, 20)
    skipping = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    adam = torch.optim.Adam([skipping])
    for step in range(20):
        rows = torch.arange(1 if step % 4 == 0 else 0)
        values = ours.gather(rows)
        gradient = torch.rand(values.shape, generator=generator, dtype=values.dtype) + 0.5
        ours.step(gradient, 0.01)
        if len(rows):
            skipping.grad = gradient
            adam.step()
    ours.settle()
    assert abs(table.item()) > 2 * abs(skipping.item())


def test_settling_twice_changes_nothing():
    table = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    adam = TouchedAdam(table, 3)
    for rows in (torch.tensor([0, 1]), torch.tensor([1, 2])):
        values = adam.gather(rows)
        adam.step(torch.ones_like(values), 0.01)
    adam.settle()
    once = table.clone()
    adam.settle(chunk=3)
    assert torch.equal(table, once)


def test_one_sort_serves_repeated_entries():
    rows = torch.tensor([[[5, 5], [1, 5]], [[1, 9], [9, 9]]], dtype=torch.int32)
    weights = torch.tensor([[[0.5, 0.25], [1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]])
    touched = TouchedEntries(rows, weights)
    assert touched.rows.tolist() == [1, 5, 9]
    entries = torch.tensor([[10.0], [20.0], [30.0]], requires_grad=True)
    encoded = touched.encode(entries)
    assert encoded.tolist() == [[15.0, 50.0], [150.0, 330.0]]
    encoded.backward(torch.tensor([[1.0, 10.0], [100.0, 1000.0]]))
    assert entries.grad.flatten().tolist() == [10.0 + 300.0, 0.75 + 20.0, 400.0 + 11000.0]
