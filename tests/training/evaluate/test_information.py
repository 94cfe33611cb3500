"""The maximal information coefficient against exhaustive search and against what is published of it."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

import training.evaluate.position.information as information
from training.evaluate.position.information import channel_mic, grid_sizes, position_mic


def grid(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rows.flatten(), columns.flatten()


def exhaustive_mic(values, coordinate, bound):
    """Eq. S2 by its definition: every grid of every size below the bound, with scikit-learn's information."""
    order = np.argsort(values, kind="stable")
    ordered, place = values[order], coordinate[order]
    count, places = len(values), place.max() + 1
    allowed = [i for i in range(1, count) if ordered[i] > ordered[i - 1]]
    best = 0.0
    for a in range(2, places + 1):
        for b in range(2, count + 1):
            if a * b >= bound:
                break
            for columns in combinations(range(1, places), a - 1):
                x = np.searchsorted(columns, place, side="right")
                for rows in combinations(allowed, b - 1):
                    y = np.searchsorted(rows, np.arange(count), side="right")
                    best = max(best, mutual_info_score(x, y) / math.log(min(a, b)))
    return best


@pytest.mark.parametrize(
    "shape, bound, ties",
    [
        ((4, 4), None, False),
        ((4, 4), None, True),
        pytest.param((5, 5), None, False, marks=pytest.mark.slow),
        pytest.param((5, 5), None, True, marks=pytest.mark.slow),
        ((4, 6), 8.5, True),
        ((3, 7), 9.5, True),
    ],
)
def test_small_maps_agree_with_exhaustive_search(shape, bound, ties):
    rows, columns = grid(*shape)
    values = torch.randn(1, len(rows)) + 0.2 * columns
    values = (values * 2).round() if ties else values
    bound_given = len(rows) ** 0.6 if bound is None else bound
    want = [exhaustive_mic(v.numpy(), columns.numpy(), bound_given) for v in values]
    assert channel_mic(values, columns, bound).tolist() == pytest.approx(want, abs=1e-5)


def test_only_the_longest_grids_for_each_shorter_side_are_needed():
    assert grid_sizes(16**0.6) == [(2, 2)]
    assert grid_sizes(12.1) == [(2, 6), (3, 4), (4, 3), (6, 2)]
    # 1024^0.6 is 64 in exact arithmetic, and the bound is strict (Eq. S2).
    assert max(a * b for a, b in grid_sizes(1024**0.6)) == 63


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize(
    "relation",
    [
        lambda x: x,
        lambda x: -(x**3),
        lambda x: (x - 0.5) ** 2,
        lambda x: (2 * math.pi * x).sin(),
        lambda x: x.exp(),
    ],
)
def test_noiseless_relations_reach_one(size, relation):
    _, columns = grid(size, size)
    values = relation((columns + 0.5) / size)[None]
    assert channel_mic(values, columns).item() == pytest.approx(1, abs=0.02)


def test_a_noiseless_line_on_an_odd_grid_reaches_the_most_even_cut():
    _, columns = grid(37, 37)
    share = 18 / 37
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert channel_mic(columns[None].float(), columns).item() == pytest.approx(max(entropy, 0.9995), abs=2e-3)


def test_independent_values_go_to_zero_with_the_size_of_the_map():
    means = []
    for size in (8, 16, 32):
        _, columns = grid(size, size)
        means.append(float(channel_mic(torch.randn(8, size**2), columns).mean()))
    assert means[0] > means[1] > means[2] and means[2] < 0.1


def test_constant_channels_have_none():
    rows, _ = grid(6, 6)
    assert channel_mic(torch.ones(2, 36), rows).tolist() == [0, 0]


def test_monotone_maps_of_the_values_change_nothing():
    rows, _ = grid(12, 12)
    values = torch.randn(3, 144) + 0.1 * rows
    assert torch.equal(channel_mic(values, rows), channel_mic(values.exp() + 3, rows))


def test_equation_s1_takes_the_largest_channel_for_each_axis():
    rows, columns = grid(6, 6)
    maps = torch.randn(6, 6, 5)
    maps[..., 2], maps[..., 4] = rows.reshape(6, 6), columns.reshape(6, 6) % 3
    values = maps.reshape(36, 5).T
    want = (channel_mic(values, columns).max() + channel_mic(values, rows).max()) / 2
    assert position_mic(maps) == pytest.approx(float(want))
    assert channel_mic(values, rows).argmax() == 2


def test_large_maps_come_close_to_the_exact_value_from_below(monkeypatch):
    rows, _ = grid(8, 8)
    waves = torch.linspace(0.2, 3, 24)[:, None]
    values = torch.randn(24, 64) + 2 * (rows * waves).sin()
    exact = channel_mic(values, rows)
    monkeypatch.setattr(information, "EXACT_PATCHES", 0)
    found = channel_mic(values, rows)
    assert (found <= exact + 1e-5).all()
    assert (exact - found).mean() < 0.04


def test_no_channel_is_dropped():
    _, columns = grid(20, 20)
    values = torch.randn(50, 400)
    for hidden in (0, 17, 49):
        marked = values.clone()
        marked[hidden] = columns.float()
        assert channel_mic(marked, columns).argmax() == hidden


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="2 x 2 grid needs B > 4"):
        position_mic(torch.randn(3, 3, 4))
    with pytest.raises(ValueError, match="finite"):
        channel_mic(torch.full((1, 16), float("nan")), grid(4, 4)[0])
    with pytest.raises(ValueError, match="values must be"):
        channel_mic(torch.randn(2, 15), grid(4, 4)[0])
