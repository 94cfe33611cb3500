"""Every way features leave a denoised model, for every kind of ViT, against timm and the recomputed denoiser."""

import itertools

import pytest
import timm
import torch

import timm_dvt
from tests.helpers import reference

THIN = {"embed_dim": 128, "num_heads": 2}
# One of each kind: class token, registers, average pooling, RoPE with and without absolute PE, attention pooling and no
# class token, pre-norm, two prefix tokens of a subclass, three heads, average pooling over a rotary ViT.
KINDS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", THIN),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "average pool with prefix": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "max pool": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", THIN),
    "siglip": ("vit_base_patch16_siglip_512.v2_webli", THIN),
    "pre-norm": ("vit_base_patch16_clip_384.laion2b_ft_in12k_in1k", THIN),
    "distilled token": ("deit_tiny_distilled_patch16_224", {}),
    "norm behind a class token": ("vit_tiny_patch16_224", {"fc_norm": True}),
}
GRID = (6, 4)


def build(kind: str, **kwargs):
    """A denoised model with a denoiser far from its initial values, its plain twin, and images of a 6 x 4 grid."""
    name, arguments = KINDS[kind]
    patch = 14 if "patch14" in name else 16
    arguments = {"depth": 3, "img_size": 4 * patch, "dynamic_img_size": True, **arguments, **kwargs}
    plain = timm.create_model(name, **arguments).eval()
    for norm in plain.modules():
        if isinstance(norm, torch.nn.LayerNorm):  # as of a trained model: applied twice it shows
            torch.nn.init.normal_(norm.weight, 1, 0.3)
    model = timm.create_model(name, **arguments).eval()
    model.load_state_dict(plain.state_dict())
    assert timm_dvt.add_denoiser(model) is model
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, plain, torch.randn(2, 3, GRID[0] * patch, GRID[1] * patch)


def final_norm(plain):
    return plain.fc_norm if isinstance(plain.norm, torch.nn.Identity) else plain.norm


def wanted_patches(model, plain, images) -> torch.Tensor:
    """Denoised patch tokens, from timm's un-normed last block."""
    raw = plain.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)[0]
    return reference.denoise(reference.published_keys(model), final_norm(plain)(raw), GRID, model.denoiser.num_heads)


def close(a, b) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_patch_tokens_are_the_denoised_normed_ones_and_prefix_tokens_are_untouched(kind):
    model, plain, images = build(kind)
    prefix = plain.num_prefix_tokens
    tokens = model.forward_features(images)
    assert torch.equal(tokens[:, :prefix], plain.forward_features(images)[:, :prefix])
    assert close(tokens[:, prefix:], wanted_patches(model, plain, images))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_off_is_the_plain_model_exactly_in_every_output(kind):
    model, plain, images = build(kind)
    model.set_denoise(False)
    assert torch.equal(model(images), plain(images))
    assert torch.equal(model.forward_features(images), plain.forward_features(images))
    ours, theirs = model.forward_intermediates(images), plain.forward_intermediates(images)
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_pool_the_denoised_tokens_once_normed(kind):
    model, plain, images = build(kind)
    patches = wanted_patches(model, plain, images)
    prefix = plain.num_prefix_tokens
    tokens = plain.forward_features(images)
    if kind in ("class token", "registers", "pre-norm", "distilled token", "norm behind a class token"):
        want = plain(images)  # the class token is the backbone's, so are the logits
        assert torch.equal(model(images), want)
    elif kind == "siglip":
        want = plain.fc_norm(plain.attn_pool(patches))
    elif kind == "max pool":
        want = plain.head(patches.amax(dim=1))
    elif kind == "average pool with prefix":
        want = plain.head(torch.cat([plain.fc_norm(tokens[:, :prefix]), patches], dim=1).mean(dim=1))
    elif kind == "average pool":
        want = plain.head(patches.mean(dim=1))
    else:
        want = plain.forward_head(torch.cat([tokens[:, :prefix], patches], dim=1))
        if plain.global_pool == "avg":
            want = plain.head(patches.mean(dim=1))
    assert close(model(images), want)


OPTIONS = list(
    itertools.product(
        [None, 1, [0], [0, -1]],  # indices
        [False, True],  # norm
        [False, True],  # return_prefix_tokens
        [False, True],  # stop_early
        ["NCHW", "NLC"],
        [False, True],  # intermediates_only
        [False, True],  # output_dict
    )
)


@pytest.mark.parametrize("kind", ["registers", "average pool", "siglip", "eva02"])
@torch.no_grad()
def test_forward_intermediates_is_timms_but_for_the_last_block(kind):
    model, plain, images = build(kind)
    patches, prefix = wanted_patches(model, plain, images), plain.num_prefix_tokens
    for indices, norm, tokens_too, stop, fmt, only, as_dict in OPTIONS:
        if (norm + tokens_too + stop + only) % 2 or (stop + (fmt == "NLC") + only + as_dict) % 2:
            continue  # of the six that are one thing or the other, any three in all their combinations
        if tokens_too and not prefix and kind == "eva02" or as_dict and kind == "eva02":
            continue  # options timm's Eva does not have
        call = dict(indices=indices, norm=norm, return_prefix_tokens=tokens_too, stop_early=stop, output_fmt=fmt)
        call.update(intermediates_only=only, **({"output_dict": True} if as_dict else {}))
        ours, theirs = model.forward_intermediates(images, **call), plain.forward_intermediates(images, **call)
        taken = {None: [0, 1, 2], 1: [2], 2: [1, 2]}.get(indices if not isinstance(indices, list) else "list", indices)
        taken = sorted({i % 3 for i in taken})
        if as_dict:
            assert ours.keys() == theirs.keys()
            for key in theirs.keys() & {"image_intermediates_prefix"}:
                assert all(torch.equal(a, b) for a, b in zip(ours[key], theirs[key], strict=True))
            our_maps, their_maps = ours["image_intermediates"], theirs["image_intermediates"]
            features = (ours.get("image_features"), theirs.get("image_features"))
        else:
            our_maps, their_maps = (ours, theirs) if only else (ours[1], theirs[1])
            features = (None, None) if only else (ours[0], theirs[0])
        assert len(our_maps) == len(their_maps) == len(taken)
        for block, mine, timms in zip(taken, our_maps, their_maps, strict=True):
            if isinstance(timms, tuple):
                assert torch.equal(mine[1], timms[1])
                mine, timms = mine[0], timms[0]
            if block == 2:
                assert mine.is_contiguous() or fmt == "NLC"
                want = patches if fmt == "NLC" else patches.transpose(1, 2).reshape(2, -1, *GRID)
                assert close(mine, want)
            else:
                assert torch.equal(mine, timms)
        if features[1] is not None:
            stopped = stop and max(taken) < 2
            assert torch.equal(features[0][:, :prefix], features[1][:, :prefix])
            if stopped:
                assert torch.equal(features[0], features[1])
            else:
                assert close(features[0][:, prefix:], patches)


@torch.no_grad()
def test_get_intermediate_layers_is_denoised():
    model, plain, images = build("registers")
    maps = model.get_intermediate_layers(images, n=2, reshape=True, return_prefix_tokens=True, norm=True)
    theirs = plain.get_intermediate_layers(images, n=2, reshape=True, return_prefix_tokens=True, norm=True)
    assert torch.equal(maps[0][0], theirs[0][0]) and torch.equal(maps[1][1], theirs[1][1])
    assert close(maps[1][0].flatten(2).transpose(1, 2), wanted_patches(model, plain, images))


@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_features_only_gives_the_denoised_map_last(pool):
    name = "vit_small_patch14_reg4_dinov2.lvd142m_dvt"
    arguments = dict(img_size=56, depth=4, global_pool=pool, **THIN)
    whole = timm.create_model(name, **arguments).eval()
    net = timm.create_model(name, features_only=True, out_indices=(1, -1), **arguments).eval()
    plain = timm.create_model(name, features_only=True, out_indices=(1, -1), **arguments).eval()
    state = whole.state_dict()
    for part in ("weight", "bias"):  # timm prunes the final norm here; the denoiser keeps it
        state[f"denoiser.norm.{part}"] = state[f"{'norm' if pool == 'token' else 'fc_norm'}.{part}"]
    for model in (net, plain):
        model.model.load_state_dict({key: state[key] for key in model.model.state_dict()})
    plain.model.set_denoise(False)
    images = torch.randn(1, 3, 84, 56)
    want = whole.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    got = net(images)
    assert net.feature_info.channels() == [128, 128] and net.feature_info.reduction() == [14, 14]
    assert torch.equal(got[0], want[0]) and close(got[1], want[1])
    whole.set_denoise(False)
    off = whole.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(plain(images), off, strict=True))


def test_pruning_the_last_block_takes_the_denoiser_with_it():
    model, plain, images = build("class token")
    model.prune_intermediate_layers([0, 1])
    plain.prune_intermediate_layers([0, 1])
    assert model.denoiser is None and not any("denoiser" in key for key in model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), plain.forward_features(images))
    model.set_denoise(False)
    with pytest.raises(RuntimeError, match="pruned away together with the last block"):
        model.set_denoise(True)


@pytest.mark.parametrize("kind", ["class token", "average pool", "eva02"])
@torch.no_grad()
def test_pruning_the_norm_leaves_it_with_the_denoiser(kind):
    model, plain, images = build(kind)
    want = model.forward_intermediates(images, indices=1, intermediates_only=True)[0]
    for each in (model, plain):
        each.prune_intermediate_layers([0, 2], prune_norm=True)
    assert torch.equal(model.forward_intermediates(images, indices=1, intermediates_only=True)[0], want)
    model.set_denoise(False)
    assert torch.equal(model.forward_features(images), plain.forward_features(images))


@pytest.mark.parametrize("arguments", [{"dynamic_img_pad": True}, {"img_size": (48, 80), "dynamic_img_size": False}])
@torch.no_grad()
def test_padded_and_fixed_rectangular_inputs_are_treated_as_timm_does(arguments):
    defaults = {"img_size": 64, "dynamic_img_size": True, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", **{**defaults, **arguments})
    timm_dvt.add_denoiser(model.eval())
    size = arguments.get("img_size", (50, 70))
    tokens = model.forward_features(torch.randn(1, 3, *size))
    rows, columns = model.patch_embed.dynamic_feat_size(size)
    assert tokens.shape[1] == 1 + rows * columns
    bad = torch.randn(1, 3, 50, 70)
    if "img_size" in arguments:
        assert model.denoiser.grid_size == (3, 5)
        with pytest.raises(AssertionError, match="Input"):
            model(bad)


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match="patch_drop_rate=0.5 leaves holes"):
        timm.create_model("vit_small_patch14_dinov2.lvd142m_dvt", depth=1, patch_drop_rate=0.5)
    # A distilled variant is a plain ViT: what timm allows, it allows.
    timm.create_model("vit_base_patch16_224.mae_dvt_distilled", depth=1, patch_drop_rate=0.5)
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):
        with pytest.raises(ValueError, match="patch_drop_rate=0.25 leaves holes"):
            timm_dvt.add_denoiser(timm.create_model(name, depth=1, patch_drop_rate=0.25))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224"])
def test_other_models_are_refused_with_what_is_supported(name):
    with pytest.raises(TypeError, match="VisionTransformer .* and Eva .* not to (ResNet|SwinTransformer)"):
        timm_dvt.add_denoiser(timm.create_model(name))


def test_a_second_denoiser_is_refused():
    model, _, _ = build("class token")
    with pytest.raises(TypeError, match="has a denoiser already"):
        timm_dvt.add_denoiser(model)


@torch.no_grad()
def test_odd_head_counts_and_options_of_a_denoiser():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=120, num_heads=5)
    model = timm_dvt.add_denoiser(backbone.eval(), grid_size=(3, 7), depth=2, num_heads=5, pos_embed=False)
    assert len(model.denoiser.blocks) == 2 and model.denoiser.pos_embed is None
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 5, 120)
