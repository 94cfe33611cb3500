"""The hash grid against tiny-cuda-nn's formulas in float64 loops."""

import math

import numpy as np
import pytest
import torch

from training.stage1.field.hashgrid import HashGrid, HashGridSettings, grid_levels

# Name: settings and which of the levels they should hash.
GRIDS = {
    "dense": (HashGridSettings(levels=5, features=4, log2_hashmap_size=14, per_level_scale=1.6), 0),
    "hashed": (HashGridSettings(levels=4, features=2, log2_hashmap_size=6, per_level_scale=2.0), 4),
    "mixed": (HashGridSettings(levels=6, features=8, log2_hashmap_size=8, base_resolution=8), 3),
    "huge": (HashGridSettings(levels=3, features=2, log2_hashmap_size=12, per_level_scale=64.0), 2),
    "smaller-than-a-row": (HashGridSettings(levels=2, features=2, log2_hashmap_size=3), 2),
    "one-level": (HashGridSettings(levels=1, features=2, per_level_scale=1.0), 0),
}


def reference_lookups(coords, settings):
    """tiny-cuda-nn's formulas in plain loops: rows and weights (B, levels, 4), and the row count.

    Python integers and float64, but for the scale, which is float32 in tiny-cuda-nn and decides the layout.
    """
    rows, weights = (np.zeros((len(coords), settings.levels, 4), kind) for kind in (np.int64, np.float64))
    offset = 0
    log2_scale = np.log2(np.float32(settings.per_level_scale))
    for level in range(settings.levels):
        power = np.exp2(np.float32(level) * log2_scale)
        scale = float(power * np.float32(settings.base_resolution) - np.float32(1.0))
        resolution = math.ceil(scale) + 1
        size = resolution**2
        size += -size % 8
        size = min(size, 2**settings.log2_hashmap_size)
        for sample, coord in enumerate(coords):
            position = [float(x) * scale + 0.5 for x in coord]
            cell = [math.floor(p) for p in position]
            for corner in range(4):
                weight, vertex = 1.0, []
                for dim in range(2):
                    step = corner >> dim & 1
                    fraction = position[dim] - cell[dim]
                    weight *= fraction if step else 1 - fraction
                    vertex.append(cell[dim] + step)
                stride, index = 1, 0
                for dim in range(2):
                    if stride > size:
                        break
                    index += vertex[dim] * stride
                    stride *= resolution
                if size < stride:
                    index = vertex[0] ^ vertex[1] * 2654435761 % 2**32
                rows[sample, level, corner], weights[sample, level, corner] = offset + index % size, weight
        offset += size
    return rows, weights, offset


@pytest.fixture(params=GRIDS, name="case")
def fixture_case(request):
    """A grid, how many of its levels are hashed, and coordinates: inside, on edges and on every corner."""
    settings, hashed = GRIDS[request.param]
    torch.manual_seed(0)
    grid, coords = HashGrid(settings), torch.rand(48, 2)
    coords[:4, 0], coords[4:8, 1] = 0.0, 1.0
    return grid, hashed, torch.cat((coords, torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)))


def test_rows_and_weights_are_tiny_cuda_nns(case):
    grid, hashed, coords = case
    rows, weights, entries = reference_lookups(coords.numpy(), grid.settings)
    found_rows, found_weights = grid.double().lookups(coords.double())
    assert grid.hashed.sum() == hashed
    assert grid.params.shape == (entries * grid.settings.features,)
    assert np.array_equal(found_rows.numpy(), rows)
    np.testing.assert_allclose(found_weights.numpy(), weights, rtol=0, atol=1e-14)


def test_encoding_and_gradient_are_weighted_sums(case):
    grid, _, coords = case
    rows, weights, entries = reference_lookups(coords.numpy(), grid.settings)
    table = grid.double().params.detach().numpy().reshape(entries, -1)
    expected = np.zeros((len(coords), grid.settings.levels, grid.settings.features))
    gradient = np.zeros_like(table)
    upstream = torch.randn(len(coords), grid.settings.width, generator=torch.Generator().manual_seed(2)).double()
    for sample, level, corner in np.ndindex(rows.shape):
        row, weight = rows[sample, level, corner], weights[sample, level, corner]
        expected[sample, level] += weight * table[row]
        gradient[row] += weight * upstream.numpy().reshape(expected.shape)[sample, level]
    encoded = grid(coords.double())
    encoded.backward(upstream)
    np.testing.assert_allclose(encoded.detach(), expected.reshape(len(coords), -1), rtol=0, atol=1e-17)
    np.testing.assert_allclose(grid.params.grad.reshape(table.shape), gradient, rtol=0, atol=1e-12)


def test_in_float32_a_place_is_off_by_its_rounding_alone(case):
    grid, _, coords = case
    encoded = grid(coords).detach()
    exact = grid.double()(coords.double()).detach()
    # Product and sum round to 2^-24 of a place below 2 * scale; neighbors in either direction are at most 2e-4 apart.
    off = 4 * 2.0**-24 * grid.scale.max().item() * 2 * 2e-4
    # The sums themselves: a handful of roundings of numbers below 1e-4.
    torch.testing.assert_close(encoded.double(), exact, rtol=0, atol=off + 16 * 2.0**-24 * 1e-4)


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
    for name, value in (("levels", 0), ("features", 0), ("per_level_scale", 0.5)):
        with pytest.raises(ValueError, match=name):
            HashGrid(HashGridSettings(**{name: value}))
