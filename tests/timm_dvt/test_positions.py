"""What position adds, told from sums over windows: against least squares, and where the truth is known."""

import numpy as np
import pytest
import torch

from timm_dvt.calibration.positions import PRIOR, PositionSums, Windows


def test_the_estimated_error_is_the_true_one():
    # Tokens are content, drawn anew at each place of each canvas, plus a map that is known.
    windows = Windows.draw(8, (2, 2))
    artifacts = torch.randn(5, 4, 6)
    artifacts -= artifacts.mean((0, 1))
    true, told = [], []
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        sums = PositionSums(windows, 8)
        for visit in range(16):
            content = windows_of(2 * torch.randn(7, 6, 6, generator=draw), windows, 5, 4)
            sums.add(content + artifacts + torch.randn(8, 5, 4, 6, generator=draw), visit % 8)
        position = sums.estimate()
        true.append(float((position.artifacts - artifacts).norm() / artifacts.norm()))
        told.append(position.error)
    assert np.mean(told) == pytest.approx(np.mean(true), rel=0.1)


def windows_of(canvas_map: torch.Tensor, windows: Windows, rows: int, columns: int) -> torch.Tensor:
    cut = [canvas_map[y : y + rows, x : x + columns] for y, x, _ in windows.places]
    return torch.stack([view.flip(place[2]) for view, place in zip(cut, windows.places)])


def test_a_sky_above_in_every_image_does_not_pass_for_what_position_adds():
    windows = Windows.draw(8, (4, 4))
    sky = torch.linspace(1, -1, 12)[:, None, None] * torch.randn(6)  # (12, 1, 6), of all canvases
    artifacts = torch.randn(8, 8, 6)
    artifacts -= artifacts.mean((0, 1))
    sums = PositionSums(windows, 8)
    for visit in range(16):
        content = sky + torch.randn(12, 12, 6)
        sums.add(windows_of(content, windows, 8, 8) + artifacts, visit % 8)
    left = sums.estimate().artifacts - artifacts
    # What is left of the sky: its mean over columns and channels, place by place from top to bottom.
    slope = (left * sky[2:10]).sum() / (8 * sky[2:10].square().sum())
    assert abs(slope) < 0.15  # 0.6 where windows are only mirrored left to right


def test_the_map_is_that_of_a_float64_least_squares_over_all_windows():
    # The reference writes one row for each token and solves for content and artifacts at once, content as a random
    # effect: PRIOR times its squares is the penalty.
    rows, columns, dim, canvases = 4, 3, 5, 8
    windows = Windows.draw(4, (2, 1))
    maps = torch.randn(canvases, 4, rows, columns, dim, dtype=torch.float64)
    sums = PositionSums(windows, 8)
    for group, one in enumerate(maps):
        sums.add(one, group)
    cells = torch.arange((rows + 2) * (columns + 1)).view(rows + 2, columns + 1, 1)
    shown = windows_of(cells, windows, rows, columns).flatten()
    count, places = cells.numel(), rows * columns
    design = torch.zeros(canvases, len(shown), canvases * count + places, dtype=torch.float64)
    for one in range(canvases):
        design[one, torch.arange(len(shown)), one * count + shown] = 1
        design[one, torch.arange(len(shown)), canvases * count + torch.arange(len(shown)) % places] = 1
    design = design.flatten(0, 1)
    penalty = torch.diag(torch.tensor([PRIOR] * (canvases * count) + [0.0] * places, dtype=torch.float64))
    tokens = (maps - maps.mean((1, 2, 3), keepdim=True)).reshape(-1, dim)
    want = torch.linalg.solve(design.T @ design + penalty, design.T @ tokens)[-places:]
    want -= want.mean(0)
    position = sums.estimate()
    got = position.artifacts.flatten(0, 1)
    shrink = (got * want).sum() / want.square().sum()
    torch.testing.assert_close(got, shrink * want, rtol=1e-4, atol=1e-5)
    assert 0 <= shrink < 1 and shrink == pytest.approx(1 - position.error**2, abs=1e-4)


def test_where_position_shows_nothing_nothing_is_subtracted():
    sums = PositionSums(Windows.whole(), 8)
    for visit in range(64):
        sums.add(torch.randn(1, 6, 6, 12), visit % 8)
    position = sums.estimate()
    assert position.error > 0.8 and position.artifacts.norm() < 0.3 * torch.randn(6, 6, 12).norm()
    assert position.components().shape[1] <= 1
