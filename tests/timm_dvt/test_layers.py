"""Denoisers of several blocks of one backbone: what comes out, what goes on untouched, and one folder for all."""

import itertools
import json

import pytest
import timm
import torch

import timm_dvt

KINDS = {
    "class token": ("test_vit", {}),
    "average pool": ("test_vit", {"global_pool": "avg"}),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 6}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 6, "embed_dim": 64, "num_heads": 1}),
}
GRID = (4, 3)


def build(kind: str = "class token", layers=(1, 3, -1), **kwargs):
    """A denoised model with denoisers far from their initial values, its plain twin, and images."""
    name, arguments = KINDS[kind]
    patch = 14 if "patch14" in name else 16
    arguments = {"img_size": 4 * patch, "dynamic_img_size": True, **arguments, **kwargs}
    plain = timm.create_model(name, **arguments).eval()
    model = timm.create_model(name, **arguments).eval()
    model.load_state_dict(plain.state_dict())
    timm_dvt.add_denoiser(model, layers=list(layers))
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, plain, torch.randn(2, 3, GRID[0] * patch, GRID[1] * patch)


def raw_tokens(plain, images) -> list[torch.Tensor]:
    """Patch tokens behind each block as it leaves them, from a hook on each block."""
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in plain.blocks]
    plain.forward_features(images)
    for hook in hooks:
        hook.remove()
    return [tokens[:, plain.num_prefix_tokens :] for tokens in seen]


def final_norm(plain):
    return plain.fc_norm if isinstance(plain.norm, torch.nn.Identity) else plain.norm


def wanted(model, plain, images, norm: bool) -> dict[int, torch.Tensor]:
    """What each block's map should be, from the hooks and the denoisers alone."""
    maps = {}
    for block, tokens in enumerate(raw_tokens(plain, images)):
        final = block == 5 and block in model.denoisers()
        tokens = final_norm(plain)(tokens) if final else tokens
        if block in model.denoisers():
            tokens = model.denoisers()[block](tokens, GRID)
        maps[block] = plain.norm(tokens) if norm and not final else tokens
    return maps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [(1, 3, -1), (0,), (2, 4)])
@torch.no_grad()
def test_maps_are_denoised_at_the_chosen_blocks_and_timms_at_the_others(kind, layers):
    model, plain, images = build(kind, layers)
    for norm, indices in itertools.product([False, True], [None, [1, 3], [-1], [0, 2, -2], 3]):
        want = wanted(model, plain, images, norm)
        blocks = range(6) if indices is None else range(3, 6) if indices == 3 else sorted(i % 6 for i in indices)
        options = dict(indices=indices, norm=norm, output_fmt="NLC", intermediates_only=True)
        got = model.forward_intermediates(images, **options)
        assert len(got) == len(blocks)
        for block, tokens in zip(blocks, got):
            torch.testing.assert_close(tokens, want[block], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_maps_prefix_tokens_and_features_come_in_all_of_timms_forms(norm, output_dict):
    model, plain, images = build("registers")
    options = dict(indices=[1, 2, 5], norm=norm, return_prefix_tokens=True, output_dict=output_dict)
    ours, theirs = model.forward_intermediates(images, **options), plain.forward_intermediates(images, **options)
    want = wanted(model, plain, images, norm)
    if output_dict:
        assert ours.keys() == theirs.keys()
        maps, prefixes = ours["image_intermediates"], ours["image_intermediates_prefix"]
        features = ours["image_features"]
        old_prefixes = theirs["image_intermediates_prefix"]
    else:
        features, pairs = ours
        maps, prefixes = zip(*pairs)
        old_prefixes = [prefix for _, prefix in theirs[1]]
    for block, tokens in zip((1, 2, 5), maps):
        assert tokens.shape == (2, 64, *GRID)
        torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), want[block], atol=1e-5, rtol=1e-4)
    for ours_prefix, prefix in zip(prefixes, old_prefixes, strict=True):
        torch.testing.assert_close(ours_prefix, prefix)
    assert torch.equal(features, model.forward_features(images))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_off_is_the_plain_model_exactly_at_every_block(kind):
    model, plain, images = build(kind)
    model.set_denoise(False)
    for norm in (False, True):
        ours = model.forward_intermediates(images, indices=None, norm=norm)
        theirs = plain.forward_intermediates(images, indices=None, norm=norm)
        assert torch.equal(ours[0], theirs[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@torch.no_grad()
def test_later_blocks_are_fed_raw_tokens():
    model, plain, images = build(layers=(1, 3))
    assert torch.equal(model.forward_features(images), plain.forward_features(images))
    assert torch.equal(model(images), plain(images))
    maps = model.forward_intermediates(images, indices=[2, 4, 5], intermediates_only=True)
    assert all(map(torch.equal, maps, plain.forward_intermediates(images, indices=[2, 4, 5], intermediates_only=True)))


@torch.no_grad()
def test_average_pooled_logits_are_timms_where_the_last_block_has_no_denoiser():
    model, plain, images = build("average pool", (1, 3))
    assert torch.equal(model(images), plain(images))


@torch.no_grad()
def test_get_intermediate_layers_gives_the_same_maps():
    model, plain, images = build()
    want = wanted(model, plain, images, norm=True)
    got = model.get_intermediate_layers(images, n=[1, 2, 3, 5], norm=True)
    for block, tokens in zip((1, 2, 3, 5), got):
        torch.testing.assert_close(tokens, want[block], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("out_indices", [(1, 3), (2, 3, 5), (0, 1)])
@torch.no_grad()
def test_features_only_gives_the_same_maps_also_where_blocks_are_pruned(out_indices, tmp_path):
    model, plain, images = build()
    timm_dvt.save_pretrained(model, tmp_path)
    want = wanted(model, plain, images, norm=False)
    options = dict(pretrained=True, features_only=True, out_indices=out_indices)
    net = timm.create_model(f"local-dir:{tmp_path}", **options).eval()
    for block, tokens in zip(out_indices, net(images), strict=True):
        torch.testing.assert_close(tokens.flatten(2).transpose(1, 2), want[block], atol=1e-5, rtol=1e-4)
    assert len(net.model.blocks) == max(out_indices) + 1


@torch.no_grad()
def test_pruning_takes_the_denoisers_of_pruned_blocks_and_no_others():
    model, plain, images = build()
    model.prune_intermediate_layers([1, 4], prune_norm=True)
    assert list(model.denoisers()) == [1, 3] and model.denoise
    features = model.forward_features(images)
    assert torch.equal(features[:, 1:], raw_tokens(plain, images)[4])
    model.prune_intermediate_layers([0])
    assert model.denoisers() == {} and not model.denoise
    with pytest.raises(RuntimeError, match="pruned away"):
        model.set_denoise(True)


@torch.no_grad()
def test_one_folder_holds_all_layers(tmp_path):
    model, plain, images = build(layers=(1, -1))
    timm_dvt.save_pretrained(model, tmp_path / "whole")
    timm_dvt.save_pretrained(model, tmp_path / "alone", denoiser_only=True)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_args"]["denoiser"]["layers"] == [1, 5]
    whole = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    alone = timm_dvt.add_denoiser(plain, layers=[3])
    assert timm_dvt.load_denoiser(alone, tmp_path / "alone") is alone
    want = model.forward_intermediates(images)
    for again in (whole, alone):
        assert list(again.denoisers()) == [1, 5] and not again.denoiser.training
        got = again.forward_intermediates(images)
        assert torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))


def test_the_last_block_alone_keeps_the_keys_of_a_single_denoiser():
    for layers in (None, [-1], [5], [5, -1]):
        model = timm_dvt.add_denoiser(timm.create_model("test_vit"), layers=layers)
        assert "denoiser.pos_embed" in model.state_dict() and "denoiser.blocks.0.norm1.weight" in model.state_dict()
    model = timm_dvt.add_denoiser(timm.create_model("test_vit"), layers=[2, -1])
    keys = [key for key in model.state_dict() if key.startswith("denoiser.")]
    assert {".".join(key.split(".")[:3]) for key in keys} == {"denoiser.layers.2", "denoiser.layers.5"}


@torch.no_grad()
def test_timms_habits_hold_with_several_layers():
    model, _, images = build()
    assert {n for n in model.no_weight_decay() if n.startswith("denoiser.")} == {
        f"denoiser.layers.{block}.pos_embed" for block in (1, 3, 5)
    }
    model.set_grad_checkpointing(True)
    assert all(denoiser.grad_checkpointing for denoiser in model.denoisers().values())
    model.set_grad_checkpointing(False)
    script = torch.jit.script(model)
    assert torch.allclose(script.forward_features(images), model.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("layers", [[6], [-7], []])
def test_blocks_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be one or more blocks from -6 to 5"):
        timm_dvt.add_denoiser(timm.create_model("test_vit"), layers=layers)


def test_a_folder_of_a_deeper_backbone_is_refused(tmp_path):
    model, _, _ = build(layers=(1, 5))
    timm_dvt.save_pretrained(model, tmp_path)
    short = timm_dvt.add_denoiser(timm.create_model("test_vit", depth=3, img_size=64))
    with pytest.raises(timm_dvt.CheckpointError, match="denoiser for block 5; the backbone's last is 2"):
        timm_dvt.load_denoiser(short, tmp_path)
