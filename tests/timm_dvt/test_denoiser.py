"""The denoiser against plain arithmetic, and the position embedding it keeps per grid."""

import copy

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from tests.helpers import reference
from timm_dvt.denoiser import MAX_CACHED_GRIDS, Denoiser, default_num_heads
from timm_dvt.variants import ROWS
from timm_dvt.weights import denoiser_for, from_state_dict

WIDTHS = {"small": 384, "base": 768, "large": 1024}
PUBLISHED = sorted(
    {(WIDTHS[row.backbone.split("_")[1]], 37 if row.resolution == 518 else 32) for row in ROWS if row.folders}
)


@pytest.mark.parametrize(("dim", "side"), PUBLISHED)
def test_equals_a_float64_recomputation_at_the_training_grid_and_at_others(dim, side):
    state = reference.published_state(dim, side)
    denoiser = denoiser_for(from_state_dict({"denoiser": state}), dim, (side, side)).double().eval()
    for grid in ((side, side), (16, 16), (9, 23)):
        tokens = torch.randn(1, grid[0] * grid[1], dim, dtype=torch.float64)
        with torch.no_grad():
            error = (denoiser(tokens, grid) - reference.denoise(state, tokens, grid, dim // 64)).abs().max()
        assert error < 1e-10


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("pos_embed", [True, False])
def test_blocks_and_missing_position_embedding_equal_the_recomputation(blocks, pos_embed):
    state = reference.published_state(128, 5, blocks, pos_embed)
    denoiser = denoiser_for(from_state_dict({"denoiser": state}), 128, (5, 5)).double()
    tokens = torch.randn(2, 12, 128, dtype=torch.float64)
    assert (denoiser(tokens, (3, 4)) - reference.denoise(state, tokens, (3, 4), 2)).abs().max() < 1e-10


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(64, (4, 4)).eval()


def expected(denoiser: Denoiser, grid=(6, 5)) -> torch.Tensor:
    return resample_abs_pos_embed(denoiser.pos_embed.detach(), grid, old_size=denoiser.grid_size, num_prefix_tokens=0)


@torch.no_grad()
def test_the_position_embedding_is_resampled_once_a_grid(denoiser):
    first = denoiser.position((6, 5))
    assert torch.equal(first, expected(denoiser))
    assert denoiser.position((6, 5)) is first
    assert denoiser.position((4, 4)) is denoiser.pos_embed


CHANGES = {
    "load": lambda d: d.load_state_dict(Denoiser(64, (4, 4)).state_dict()),
    "load with assign": lambda d: d.load_state_dict(Denoiser(64, (4, 4)).state_dict(), assign=True),
    "in place": lambda d: d.pos_embed.add_(1),
    "through data": lambda d: d.pos_embed.data.mul_(2),
    "new data": lambda d: setattr(d.pos_embed, "data", torch.randn_like(d.pos_embed)),
    "new parameter": lambda d: setattr(d, "pos_embed", torch.nn.Parameter(torch.randn(1, 16, 64))),
    "other dtype": lambda d: d.to(torch.bfloat16),
    "other dtype and back": lambda d: d.to(torch.bfloat16).float(),
    "one entry": lambda d: d.pos_embed[0, 3].zero_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_position_embedding_is_never_stale(denoiser, change):
    with torch.no_grad():
        before = denoiser.position((6, 5)).clone()
        CHANGES[change](denoiser)
        after = denoiser.position((6, 5))
    assert after.dtype == denoiser.pos_embed.dtype
    assert torch.equal(after, expected(denoiser))
    assert not torch.equal(after.float(), before)


def fused_adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr, fused=True)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, fused_adamw])
def test_an_optimiser_step_shows_in_the_next_forward(denoiser, make):
    optimiser = make(denoiser.parameters(), lr=0.1)
    with torch.no_grad():
        before = denoiser.position((6, 5)).clone()
    denoiser(torch.randn(1, 30, 64), (6, 5)).square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        assert torch.equal(denoiser.position((6, 5)), expected(denoiser))
        assert not torch.equal(denoiser.position((6, 5)), before)


def test_gradients_reach_the_position_embedding_through_another_grid(denoiser):
    with torch.no_grad():
        denoiser.position((6, 5))
    denoiser(torch.randn(1, 30, 64), (6, 5)).sum().backward()
    assert denoiser.pos_embed.grad.abs().sum() > 0


def test_what_inference_mode_kept_serves_training_of_what_comes_before(denoiser):
    denoiser.requires_grad_(False)
    with torch.inference_mode():
        denoiser.position((6, 5))
    tokens = torch.randn(1, 30, 64, requires_grad=True)
    denoiser(tokens, (6, 5)).sum().backward()
    assert tokens.grad is not None


@torch.no_grad()
def test_many_grids_do_not_pile_up_and_copies_carry_none(denoiser):
    for side in range(5, 5 + 3 * MAX_CACHED_GRIDS):
        assert torch.equal(denoiser.position((side, 5)), expected(denoiser, (side, 5)))
    assert len(denoiser._kept["in"].grids) == MAX_CACHED_GRIDS
    assert not copy.deepcopy(denoiser)._kept["in"].grids


def test_tokens_that_do_not_fill_the_grid_are_refused(denoiser):
    with pytest.raises(ValueError, match="15 patch tokens do not fill a grid of 4 x 4"):
        denoiser(torch.randn(1, 15, 64), (4, 4))


@pytest.mark.parametrize(("dim", "heads"), [(192, 3), (384, 6), (1152, 18), (48, 1), (1000, 10), (100, 1), (1408, 22)])
def test_heads_are_dvts_where_they_divide_the_width(dim, heads):
    assert default_num_heads(dim) == heads


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="num_heads is 5"):
        Denoiser(64, (4, 4), num_heads=5)
    with pytest.raises(ValueError, match="depth is 0"):
        Denoiser(64, (4, 4), depth=0)
