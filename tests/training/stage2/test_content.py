"""Claims about what `keep_content` puts back into a target."""

import json

import numpy as np
import pytest
import torch

from tests.helpers.pair_folders import change_pair, make_maps, pair_path, write_pairs
from tests.helpers.stage2_runs import denoiser_weights, run
from training.stage2.content import DAMPED, LEADING, ContentFit

pytestmark = pytest.mark.usefixtures("one_thread")


def planted(images: int = 40, places: int = 25, channels: int = 12):
    """Raw maps of content and a position map, and targets without the map whose content has shrunk."""
    draw = torch.Generator().manual_seed(0)
    content = torch.randn(images, 1, places, channels, generator=draw) * torch.linspace(3, 1, channels)
    position = 2 * torch.randn(1, 1, places, channels, generator=draw)
    shrunk = torch.randn(channels, channels, generator=draw) * 0.1 + 0.6 * torch.eye(channels)
    return content, content + position, content @ shrunk


def test_it_is_the_least_squares_of_what_tokens_explain_beside_their_places():
    """By numpy on all tokens with an indicator column for each place, in float64."""
    _, raw, target = planted()
    fit = ContentFit()
    for part in (slice(0, 7), slice(7, 40)):
        fit.add(raw[part], target[part])
    found = fit.result()
    centered = (raw - raw.mean(2, keepdim=True)).double().numpy()[:, 0]
    change = (target - raw).double().numpy()[:, 0].reshape(-1, 12)
    columns = np.concatenate([centered.reshape(-1, 12), np.tile(np.eye(25), (40, 1))], 1)
    want = np.linalg.lstsq(columns, change, rcond=None)[0][:12]
    np.testing.assert_allclose(found.linear[0], want, atol=2e-4)  # a ridge of 1e-4
    variances = np.linalg.eigvalsh(np.einsum("bnc,bnd->cd", centered, centered))[::-1]
    count = int(np.trace(found.leading[0].numpy()).round())
    assert variances[:count].sum() >= LEADING * variances.sum() > variances[: count - 1].sum()


def test_what_shrank_comes_back_and_position_stays_away():
    content, raw, target = planted()
    fit = ContentFit()
    fit.add(raw, target)
    found = fit.result()
    back = found.put_back(raw, target)
    change = lambda x: x - x.mean(2, keepdim=True)  # noqa: E731
    want = change(content) - (1 - DAMPED) * change(content) @ found.leading[0]
    error = lambda x: (change(x) - want).square().mean().sqrt().item()  # noqa: E731
    # 40 images tell a linear map beside 25 places not to the last digit, and content differs by place on their average.
    assert error(back) < 0.25 * error(target)
    assert change(back).mean(0).square().mean() < 0.2 * change(raw).mean(0).square().mean()


def test_the_command_learns_a_target_with_content_put_back(tmp_path):
    """At a learning rate of 0 the position embedding is the mean of target - raw, whose content has come back."""
    folder = write_pairs(tmp_path / "pairs", count=24)
    for image in range(24):
        change_pair(pair_path(folder, image), clean=(0.5 * make_maps(image)[5]["clean"]).half())
    fit = ContentFit()
    maps = [
        {part: m.half().float().flatten(0, 1)[None, None] for part, m in make_maps(i)[5].items()} for i in range(24)
    ]
    halves = [(m["raw"], (0.5 * m["clean"]).half().float()) for m in maps]
    for raw, clean in halves:
        fit.add(raw, clean)
    found = fit.result()
    want = torch.cat([found.put_back(raw, clean) - raw for raw, clean in halves]).mean(0)[0]
    out = tmp_path / "out"
    assert run(folder, out, "--keep-content", "--lr", "0", "--steps", "1", "--val-fraction", "0") == 0
    assert torch.allclose(denoiser_weights(out)["denoiser.pos_embed"][0], want, atol=1e-2)
    assert json.loads((out / "settings.json").read_text())["keep_content"] is True


@pytest.mark.parametrize("images", [1, 3])
def test_images_that_are_all_alike_lose_nothing_but_along_leading_directions(images):
    _, raw, target = (part[:1].expand(images, -1, -1, -1) for part in planted())
    fit = ContentFit()
    fit.add(raw, target)
    found = fit.result()
    assert found.linear.abs().max() < 1e-4
    centered = target - target.mean(2, keepdim=True)
    torch.testing.assert_close(
        found.put_back(raw, target), target - (1 - DAMPED) * centered @ found.leading[0], atol=1e-5, rtol=1e-5
    )


def test_a_pair_of_nan_is_named(tmp_path, capsys):
    folder = write_pairs(tmp_path / "pairs", count=4)
    change_pair(pair_path(folder, 2), raw=torch.full((4, 4, 64), torch.nan).half())
    assert run(folder, tmp_path / "out", "--keep-content", "--steps", "1", "--val-fraction", "0") == 2
    said = capsys.readouterr().err
    assert "NaN or infinite features in " in said and pair_path(folder, 2).name in said
