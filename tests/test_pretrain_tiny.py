"""Pretraining of the embedded model: losses, masks, and that a run that was stopped ends as one that was not."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.stamp_packages import fabricate
from training import pretrain_tiny
from training.pretrainer import GRID, Pretrainer, Settings, take
from training.stamp_sources import load_sources
from training.stamps import Composer

SMALL = Settings(images=16, steps=4, batch_size=4, warmup=1, decoder_width=32, decoder_depth=1)
ARGUMENTS = "--images 16 --steps 4 --batch-size 4 --warmup 1 --decoder-width 32 --decoder-depth 1".split()


@pytest.fixture(scope="module")
def share(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("share"))


def some_batch(share):
    images, labels = pretrain_tiny.compose(8, 0, str(share))
    return images, labels, pretrain_tiny.batch(images, labels, 0, SMALL)


def test_a_patch_has_the_class_of_most_of_its_pixels(share):
    images, labels, _ = some_batch(share)
    stamped = Composer("train", sources=load_sources("train", share))[5]
    assert torch.equal(images[5], torch.from_numpy(stamped.image).permute(2, 0, 1))
    for row, column in ((0, 0), (5, 7), (11, 11)):
        patch = torch.from_numpy(stamped.mask)[16 * row:16 * row + 16, 16 * column:16 * column + 16]
        counts = patch.flatten().bincount()
        assert counts[int(labels[5, GRID * row + column])] == counts.max()


def test_the_losses_are_those_of_plain_loops(share):
    _, _, (pixels, labels, order) = some_batch(share)
    torch.manual_seed(0)
    model = Pretrainer(SMALL).eval()
    losses = model(pixels, labels, order)
    count = GRID * GRID // 4
    encoder = model.encoder
    total_pixels, total_classes = [], []
    for image, some_labels, places in zip(pixels, labels, order, strict=True):
        tokens = (encoder.patch_embed(image[None]) + encoder.pos_embed[:, 1:])[0]
        first = (encoder.cls_token + encoder.pos_embed[:, :1])[0]
        seen = encoder.norm(encoder.blocks(torch.cat([first, tokens[places[:count]]])[None]))[0, 1:]
        total_classes += [F.cross_entropy(model.classes(seen), some_labels[places[:count]])]
        holes = torch.stack([model.hidden_token[0, 0] + model.decoder_pos[0, place] for place in places[count:]])
        decoded = model.pixels(model.decoder(torch.cat([model.narrow(seen), holes])[None])[0, count:])
        for predicted, place in zip(decoded, places[count:].tolist(), strict=True):
            row, column = divmod(place, GRID)
            patch = image[:, 16 * row:16 * row + 16, 16 * column:16 * column + 16].flatten()
            patch = (patch - patch.mean()) / (patch.var(unbiased=False) + 1e-6).sqrt()
            total_pixels.append((predicted - patch).square().mean())
    torch.testing.assert_close(losses["classes"], torch.stack(total_classes).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["pixels"], torch.stack(total_pixels).mean(), rtol=1e-4, atol=1e-5)


def test_hidden_patches_do_not_reach_the_encoder(share):
    _, _, (pixels, labels, order) = some_batch(share)
    model = Pretrainer(SMALL).eval()
    changed = pixels.clone()
    for image, places in zip(changed, order, strict=True):
        row, column = divmod(int(places[-1]), GRID)
        image[:, 16 * row:16 * row + 16, 16 * column:16 * column + 16] += 1
    assert torch.equal(model(pixels, labels, order)["classes"], model(changed, labels, order)["classes"])


def test_a_step_sees_the_same_batch_whenever_it_is_taken(share):
    images, labels, (pixels, some_labels, order) = some_batch(share)
    pretrain_tiny.batch(images, labels, 1, SMALL)
    again = pretrain_tiny.batch(images, labels, 0, SMALL)
    assert all(torch.equal(a, b) for a, b in zip((pixels, some_labels, order), again, strict=True))
    seen = torch.cat([pretrain_tiny.batch(images, labels, step, SMALL)[2] for step in range(2)])
    assert torch.equal(seen.sort(1).values, torch.arange(GRID * GRID).expand(8, -1))


@pytest.mark.parametrize("objectives", [("pixels", "classes"), ("features", "classes")])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(share, tmp_path, monkeypatch, objectives):
    arguments = [*ARGUMENTS, "--dtype", "float32", "--share", str(share), "--objectives", *objectives, "--out"]
    settings = Settings(objectives, 16, 4, 4, warmup=1, decoder_width=32, decoder_depth=1)
    assert pretrain_tiny.main([*arguments, str(tmp_path / "whole")]) == 0

    saved = pretrain_tiny.save_checkpoint

    def stop(*args):
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_tiny, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain_tiny.pretrain(settings, tmp_path / "stopped", torch.float32, str(share), save_every=2)
    monkeypatch.undo()
    assert pretrain_tiny.main([*arguments, str(tmp_path / "stopped")]) == 0
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys() and all(torch.equal(whole[key], stopped[key]) for key in whole)

    model = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True)
    assert model.forward_features(torch.zeros(1, 3, 192, 192)).shape == (1, 145, 192)
    assert model.pretrained_cfg["input_size"] == (3, 192, 192)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and set(objectives) < set(lines[-1])

    assert pretrain_tiny.main([*arguments, str(tmp_path / "whole"), "--lr", "0.5"]) == 2


def test_taking_tokens_is_indexing():
    tokens, which = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(take(tokens, which), torch.stack([tokens[0, [4, 0]], tokens[1, [1, 1]]]))
