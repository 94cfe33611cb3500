"""The denoiser against plain arithmetic, and its position embeddings at other grids."""

import threading

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers import reference
from timm_dvt.denoiser import Denoiser, LayerDenoisers, default_num_heads, resample
from timm_dvt.variants import ROWS
from timm_dvt.weights.checkpoints import from_state_dict
from timm_dvt.weights.denoisers import denoiser_for

WIDTHS = {"small": 384, "base": 768, "large": 1024}
PUBLISHED = sorted(
    {(WIDTHS[row.backbone.split("_")[1]], 37 if row.resolution == 518 else 32) for row in ROWS if row.folders}
)


@pytest.mark.parametrize(("dim", "side"), PUBLISHED)
def test_equals_a_float64_recomputation_at_the_training_grid_and_at_others(dim, side):
    state = reference.published_state(dim, side)
    denoiser = denoiser_for(from_state_dict({"denoiser": state}), dim, (side, side)).double().eval()
    for grid in ((side, side), (9, 23)) if dim == min(WIDTHS.values()) else ((9, 23),):  # the large one takes seconds
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
def test_the_position_embedding_is_resampled_as_timm_does(denoiser):
    assert torch.equal(denoiser.position((6, 5)), expected(denoiser))
    assert denoiser.position((4, 4)) is denoiser.pos_embed


@torch.no_grad()
def test_a_grid_is_told_from_a_square_one_of_as_many_places():
    denoiser = Denoiser(64, (4, 9), pos_embed_out=(12, 3)).eval()
    for embedding, own in ((denoiser.pos_embed, (4, 9)), (denoiser.pos_embed_out.normal_(), (12, 3))):
        maps = embedding.reshape(1, *own, 64).permute(0, 3, 1, 2)
        want = torch.nn.functional.interpolate(maps, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        assert torch.equal(resample(embedding, own, (6, 6)), want) and not torch.equal(want, embedding)


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
def test_the_position_embedding_is_never_stale(denoiser, change):
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
def test_an_optimizer_step_shows_in_the_next_forward(denoiser, make):
    optimizer = make(denoiser.parameters(), lr=0.1)
    with torch.no_grad():
        before = denoiser.position((6, 5)).clone()
    denoiser(torch.randn(1, 30, 64), (6, 5)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(denoiser.position((6, 5)), expected(denoiser))
        assert not torch.equal(denoiser.position((6, 5)), before)


def test_gradients_reach_the_position_embedding_through_another_grid(denoiser):
    with torch.no_grad():
        denoiser.position((6, 5))
    denoiser(torch.randn(1, 30, 64), (6, 5)).sum().backward()
    assert denoiser.pos_embed.grad.abs().sum() > 0


def walls(tokens):
    """Images (B, 3, 96, 80), in which every patch is leveled."""
    return torch.full((len(tokens), 3, 96, 80), 0.5, device=tokens.device)


def fake(denoiser, tokens):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        denoiser(mode.from_tensor(tokens), (6, 5), walls(tokens))


def inference(denoiser, tokens):
    with torch.inference_mode():
        denoiser(tokens, (6, 5), walls(tokens))


def on_meta(denoiser, tokens):
    there = tokens.to("meta")
    torch.func.functional_call(
        denoiser,
        {name: tensor.to("meta") for name, tensor in denoiser.state_dict().items()},
        (there, (6, 5), walls(there)),
    )


UNREAL = {
    "fake tensors": fake,
    "make_fx": lambda d, tokens: make_fx(
        lambda t: d(t, (6, 5), walls(t)), tracing_mode="fake", _allow_non_fake_inputs=True
    )(tokens),
    "vmap": lambda d, tokens: torch.vmap(lambda t: d(t[None], (6, 5), walls(t[None])))(tokens),
    "meta": on_meta,
    "inference mode": inference,
}


@pytest.mark.parametrize("kind", UNREAL)
def test_a_forward_that_is_not_a_plain_one_leaves_nothing_behind(kind):
    denoiser = Denoiser(64, (4, 4), pos_embed_out=(3, 2), flat_below=0.01).eval().requires_grad_(False)
    denoiser.pos_embed_out.normal_()
    tokens = torch.randn(2, 30, 64)
    want = denoiser(tokens, (6, 5), walls(tokens))
    UNREAL[kind](denoiser, tokens)
    assert torch.equal(denoiser(tokens, (6, 5), walls(tokens)), want)
    tokens.requires_grad_()
    denoiser(tokens, (6, 5), walls(tokens)).sum().backward()
    assert tokens.grad is not None


@torch.no_grad()
def test_replicas_in_threads_use_each_its_own_embeddings():
    """As torch.nn.DataParallel does: shallow copies with parameters of their own, a thread each."""
    denoiser = Denoiser(64, (4, 4), pos_embed_out=(3, 2)).eval()
    grids = [(side, 5) for side in range(5, 30)]
    wrong: list = []

    def run(replica, embedding):
        for grid in grids:
            want = resample_abs_pos_embed(embedding, list(grid), old_size=[4, 4], num_prefix_tokens=0)
            if not torch.equal(replica.position(grid), want):
                wrong.append(grid)

    threads = []
    for _ in range(4):
        replica = denoiser._replicate_for_data_parallel()
        replica.pos_embed = torch.randn(1, 16, 64)
        threads.append(threading.Thread(target=run, args=(replica, replica.pos_embed)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("several", [False, True])
@torch.no_grad()
def test_fixed_to_a_grid_it_gives_the_same_there_and_needs_no_resampling(several, monkeypatch):
    denoiser = Denoiser(64, (4, 4), pos_embed_out=(3, 2)).eval()
    denoiser.pos_embed_out.normal_()
    denoiser.pos_embed.requires_grad_(False)
    outer = LayerDenoisers({3: denoiser}, 3) if several else denoiser
    tokens = torch.randn(1, 30, 64)
    want = outer(tokens, (6, 5))
    outer.fix_grid((6, 5))
    assert denoiser.grid_size == denoiser.out_grid_size == (6, 5)
    assert [p.requires_grad for p in (denoiser.pos_embed, denoiser.pos_embed_out)] == [False, True]
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)
    assert torch.equal(outer(tokens, (6, 5)), want)


@pytest.mark.parametrize("grid", [(6, 5), (2, 3), (4, 7), (1, 1)])
@torch.no_grad()
def test_traced_it_is_resampled_without_interpolation_to_the_same_values(grid, denoiser):
    tokens = torch.randn(1, grid[0] * grid[1], 64)
    denoiser.requires_grad_(False)  # a constant of the trace
    traced = torch.jit.trace(lambda t: denoiser(t, grid), tokens)
    assert "upsample" not in str(traced.graph)
    assert torch.allclose(traced(tokens), denoiser(tokens, grid), atol=1e-5)


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
    with pytest.raises(ValueError, match="grid_size is \\(0, 4\\)"):
        Denoiser(64, (0, 4))
