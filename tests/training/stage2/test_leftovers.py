"""What predictions share at a place is taken off, and no more of it than so few images can tell."""

import torch

from tests.helpers.pair_folders import make_maps, pair_path, write_pairs
from tests.helpers.stage2_runs import denoiser_weights, run
from training.stage2.leftovers import shrunk_mean


def test_steins_factor_finds_a_planted_map_and_leaves_noise_alone():
    """Against the true map: closer than the plain mean, and next to nothing where there is no map."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 49, 32, generator=generator, dtype=torch.float64)
    planted = torch.randn(49, 32, generator=generator, dtype=torch.float64)
    for strength in (0.0, 0.1, 0.3, 1.0):
        maps = noise + strength * planted
        found = shrunk_mean(maps.sum(0), maps.square().sum(), len(maps))
        wrong = (found - strength * planted).square().mean().item()
        # The best that a factor can do: s^2 v / (s^2 + v), with v = 1 / 20 the noise that is left in a mean.
        best = strength**2 * 0.05 / (strength**2 + 0.05)
        assert wrong < best + 0.006, strength
    assert torch.equal(shrunk_mean(planted, planted.square().sum(), 1), torch.zeros_like(planted))


def test_a_centered_run_takes_off_the_mean_of_its_predictions(tmp_path):
    """With a static denoiser predictions are known without one: raw - mean G, over the twelve pairs."""
    folder = write_pairs(tmp_path / "pairs")
    maps = [make_maps(image)[5] for image in range(12)]
    mean_artifacts = torch.stack([m["artifacts"].half().double() for m in maps]).mean(0)
    predictions = torch.stack([m["raw"].half().double() - mean_artifacts for m in maps]).flatten(1, 2)
    apart = predictions - predictions.mean(1, keepdim=True)
    mean = apart.mean(0)
    error = apart.var(0).sum() / 12
    want = -mean * max(0.0, 1 - float(error / mean.square().sum()))
    out = tmp_path / "out"
    assert run(folder, out, "--arch", "static", "--center", "--val-fraction", "0") == 0
    weights = denoiser_weights(out)
    torch.testing.assert_close(weights["denoiser.pos_embed_out"][0].double(), want, atol=2e-3, rtol=1e-3)
    assert "denoiser.pos_embed_out" not in denoiser_weights(_plain(folder, tmp_path / "plain"))


def _plain(folder, out):
    assert pair_path(folder, 0).exists()
    assert run(folder, out, "--arch", "static", "--val-fraction", "0") == 0
    return out
