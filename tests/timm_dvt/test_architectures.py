"""The ablations and the static baseline as denoisers: what they compute, and that folders bring them back."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

import timm_dvt
from timm_dvt.architectures import ARCHITECTURES
from timm_dvt.denoiser import Denoiser


def random_denoiser(arch: str, dim: int = 8) -> Denoiser:
    denoiser = Denoiser(dim, (4, 4), arch=arch)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return denoiser.eval()


def build(arch: str, **kwargs):
    model = timm.create_model("test_vit", img_size=64, dynamic_img_size=True).eval()
    timm_dvt.add_denoiser(model, arch=arch, **kwargs)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_are_of_one_architecture_and_no_other(arch):
    state = Denoiser(8, (4, 4), arch=arch, num_heads=2).state_dict()
    assert [name for name, row in ARCHITECTURES.items() if row.owns(state)] == [arch]


def test_an_architecture_of_other_plain_layers_is_taken_for_none_of_these():
    convolution, linear = torch.zeros(8, 8, 1, 1), torch.zeros(8, 8)
    two = {f"blocks.{i}.{key}": x for i in (0, 2) for key, x in (("weight", convolution), ("bias", torch.zeros(8)))}
    behind = {"blocks.1.weight": linear, "blocks.1.bias": torch.zeros(8)}  # an activation first
    for state in (two, behind):
        assert not any(row.owns(state) for row in ARCHITECTURES.values())


@pytest.mark.parametrize("arch", ["conv1x1", "conv3x3"])
@torch.no_grad()
def test_convolutions_equal_scipys_with_relus_between_and_zeros_around(arch):
    from scipy.signal import correlate2d  # seconds to import

    denoiser = random_denoiser(arch).double()
    tokens = torch.randn(1, 30, 8, dtype=torch.float64)
    maps = tokens[0].T.reshape(8, 5, 6).numpy()
    for i, place in enumerate((0, 2, 4)):
        weight, bias = (getattr(denoiser.blocks[place], name).numpy() for name in ("weight", "bias"))
        assert weight.shape[-1] == (1 if arch == "conv1x1" else 3)
        maps = np.stack(
            [sum(correlate2d(maps[c], weight[o, c], mode="same") for c in range(8)) + bias[o] for o in range(8)]
        )
        maps = maps if i == 2 else maps.clip(0)
    np.testing.assert_allclose(denoiser(tokens, (5, 6))[0].numpy(), maps.reshape(8, 30).T, atol=1e-12)
    assert denoiser.pos_embed is None and len(list(denoiser.parameters())) == 6


@torch.no_grad()
def test_a_static_denoiser_adds_its_map_resampled_as_timm_does_and_starts_as_nothing():
    tokens = torch.randn(2, 30, 8)
    assert torch.equal(Denoiser(8, (4, 4), arch="static")(tokens, (5, 6)), tokens)
    denoiser = random_denoiser("static")
    want = tokens + resample_abs_pos_embed(denoiser.pos_embed, [5, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(denoiser(tokens, (5, 6)), want)
    assert list(denoiser.state_dict()) == ["pos_embed"]


def test_block_without_pe_has_one_name_however_it_is_asked_for():
    one, other = Denoiser(64, (4, 4), pos_embed=False), Denoiser(64, (4, 4), arch="block-no-pe")
    assert one.arch == other.arch == "block-no-pe" and one.pos_embed is None and other.pos_embed is None


@pytest.mark.parametrize("denoiser_only", [False, True])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_a_saved_folder_brings_every_architecture_back(arch, denoiser_only, tmp_path):
    model = build(arch)
    images = torch.randn(2, 3, 64, 80)
    timm_dvt.save_pretrained(model, tmp_path, denoiser_only=denoiser_only)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["denoiser"]["arch"] == arch
    if denoiser_only:  # the backbone's weights would come from its hub repo
        again = timm_dvt.load_denoiser(build("block"), tmp_path)
        again.load_state_dict(model.state_dict())
        assert {k for k in again.state_dict() if "denoiser" in k} == {k for k in model.state_dict() if "denoiser" in k}
    else:
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        empty = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
        assert empty.denoiser.arch == arch
    assert again.denoiser.arch == arch
    assert torch.equal(again.forward_features(images), model.forward_features(images))
    again.set_denoise(False)
    with model.denoising(False):
        assert torch.equal(again.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_scripts_and_copies(arch):
    model = build(arch)
    images = torch.randn(2, 3, 64, 64)
    want = model.forward_features(images)
    assert torch.allclose(torch.jit.script(model).forward_features(images), want, atol=1e-5)
    assert torch.equal(copy.deepcopy(model).forward_features(images), want)


@torch.no_grad()
def test_a_convolution_exports():
    model = build("conv3x3")
    images = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (images,))
    assert torch.allclose(program.module()(images), model(images), atol=1e-4)


def test_gradient_checkpointing_leaves_every_architecture_alone():
    for arch in ARCHITECTURES:
        model = build(arch)
        model.set_grad_checkpointing(True)
        model.train().forward_features(torch.randn(1, 3, 64, 64)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.denoiser.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="arch is 'conv5x5'; it must be one of block, "):
        Denoiser(64, (4, 4), arch="conv5x5")
    with pytest.raises(ValueError, match="depth is 2; only a denoiser of transformer blocks"):
        Denoiser(64, (4, 4), depth=2, arch="static")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_denoiser_that_keeps_the_length_changes_directions_alone(arch):
    torch.manual_seed(0)
    free = Denoiser(64, (4, 4), arch=arch)
    if arch == "static":
        torch.nn.init.normal_(free.pos_embed)
    tied = Denoiser(64, (4, 4), arch=arch, keep_length=True)
    tied.load_state_dict({**free.state_dict(), "keeps_length": torch.ones(())})
    x = torch.randn(2, 16, 64) * torch.rand(2, 16, 1) * 9
    with torch.no_grad():
        as_predicted, as_long = free(x, (4, 4)), tied(x, (4, 4))
    expected = x.double().square().sum(-1).sqrt()
    torch.testing.assert_close(as_long.double().square().sum(-1).sqrt(), expected, rtol=1e-5, atol=1e-6)
    cosine = torch.cosine_similarity(as_predicted, as_long, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_a_saved_denoiser_that_keeps_the_length_is_known_again(tmp_path):
    model = timm_dvt.add_denoiser(timm.create_model("test_vit", dynamic_img_size=True), keep_length=True).eval()
    timm_dvt.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(again.forward_features(x), model.forward_features(x))
    assert again.denoiser.keep_length and "keeps_length" in load_denoiser_keys(tmp_path)


@pytest.mark.parametrize(("keep_length", "own"), [(False, (4, 4)), (True, (4, 4)), (True, (3, 3))])
def test_an_output_embedding_is_added_resampled_as_timm_does_before_lengths_are_kept(keep_length, own):
    torch.manual_seed(0)
    plain = Denoiser(64, (4, 4))
    adding = Denoiser(64, (4, 4), pos_embed_out=True if own == (4, 4) else own, keep_length=keep_length)
    out = torch.randn(1, own[0] * own[1], 64)
    state = {**plain.state_dict(), "pos_embed_out": out, **({"keeps_length": torch.ones(())} if keep_length else {})}
    adding.load_state_dict(state)
    x = torch.randn(2, 30, 64)
    with torch.no_grad():
        want = plain(x, (6, 5)) + resample_abs_pos_embed(out, [6, 5], list(own), num_prefix_tokens=0)
        if keep_length:
            want = want / want.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(adding(x, (6, 5)), want)
        adding.pos_embed_out.mul_(2)  # what was kept for the grid is not used again
        assert not torch.allclose(adding(x, (6, 5)), want, atol=1e-2)


@pytest.mark.parametrize("out", [True, (3, 3), 5])
def test_a_saved_output_embedding_comes_back_and_is_not_decayed(tmp_path, out):
    model = timm_dvt.add_denoiser(timm.create_model("test_vit", dynamic_img_size=True), pos_embed_out=out).eval()
    torch.nn.init.normal_(model.denoiser.pos_embed_out)
    assert {"denoiser.pos_embed", "denoiser.pos_embed_out"} <= model.no_weight_decay()
    timm_dvt.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    other = timm_dvt.add_denoiser(timm.create_model("test_vit", dynamic_img_size=True)).eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k != "denoiser.pos_embed_out"})
    timm_dvt.load_denoiser(other, tmp_path)
    x = torch.rand(1, 3, 160, 128)
    with torch.no_grad():
        assert torch.equal(again.forward_features(x), model.forward_features(x))
        assert torch.equal(other.forward_features(x), model.forward_features(x))
    scripted = torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(scripted.forward_features(x), model.forward_features(x))


def load_denoiser_keys(folder):
    return {key.removeprefix("denoiser.") for key in load_file(folder / "model.safetensors")}
