"""Gates of trained denoisers: fitted to blank images, to walls, and to what the pairs tell of their photographs."""

import timm
import torch

from tests.helpers.pair_folders import write_pairs
from timm_dvt.calibration.blanks import GATE_BLANKS, GATE_WALLS, PLAIN
from timm_dvt.denoiser import Denoiser
from training.pairs.reader import PairReader, open_pairs
from training.stage2 import gates


def fitted(monkeypatch, tmp_path, digits):
    """The tokens and kinds that a gate is fitted to, for pairs that say this of each image's patches."""
    seen = {}
    monkeypatch.setattr(gates, "fit_gate", lambda tokens, kinds: seen.update(tokens=tokens, kinds=kinds))
    pairs = open_pairs(write_pairs(tmp_path / "pairs", count=5))

    class Reader(PairReader):
        def busy(self, place):
            return digits

    gates.add_gates({5: Denoiser(64, (4, 4))}, timm.create_model("test_vit").eval(), pairs, Reader)
    return seen["tokens"], seen["kinds"], PairReader(pairs, ("raw",)).read(range(5))[0, :, 0]


def test_a_gate_is_fitted_to_blank_images_walls_and_the_pairs_own_maps(monkeypatch, tmp_path):
    tokens, kinds, raw = fitted(monkeypatch, tmp_path, 4 * "0011")
    drawn = GATE_BLANKS + GATE_WALLS
    assert tokens.shape == (drawn + 5, 16, 64) and torch.equal(tokens[drawn:], raw.float())
    assert torch.equal(kinds[drawn:], torch.tensor([1, 1, 2, 2]).repeat(5, 4))
    assert (kinds[:GATE_BLANKS] == PLAIN).all()


def test_of_older_pairs_which_do_not_tell_every_patch_counts_as_busy(monkeypatch, tmp_path):
    _, kinds, _ = fitted(monkeypatch, tmp_path, None)
    assert (kinds[GATE_BLANKS + GATE_WALLS :] == 2).all()
    assert PairReader(open_pairs(tmp_path / "pairs"), ("raw",)).busy(0) is None
