"""Every class of timm's registry: a denoiser works on it in every way, or is refused with the reason.

Nothing here names a class that is to be tested: a new timm's models are covered as soon as it is installed.
"""

import copy
import io
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_dvt
from timm_dvt.errors import UnsupportedModelError
from timm_dvt.families import examples
from timm_dvt.layouts import layout_of, meant_size

README = Path(__file__).parents[2] / "training" / "README.md"

# Sizes that make a model small, the first that its entrypoint takes and that leaves it what it is; most take one.
NARROW = {"embed_dim": 64, "num_heads": 1}
SMALL = (
    *({**NARROW, "depth": depth, "img_size": size} for depth, size in ((2, 64), (2, 56), (12, 64))),
    *({"depth": depth, "img_size": size} for depth, size in ((2, 64), (2, 56), (12, 64))),
    {"img_size": 64},
    *({"pretrained_cfg_overlay": {"input_size": (3, size, size)}} for size in (64, 56)),
    {},
)


def smallest(name: str) -> dict:
    """The arguments that make an architecture small."""
    for arguments in SMALL:
        try:
            model = timm.create_model(name, device="meta", **arguments)
            size = layout_of(model).img_size
        except Exception:  # each entrypoint and class has its own way to say no
            continue
        if size == meant_size(model):  # of whole patches, and one that it runs at
            return arguments
    raise AssertionError(f"{name}: supported, but not at any size tried")


def randomized(name: str, arguments: dict) -> nn.Module:
    """A model with no weight at zero or one, where it would hide a mistake."""
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def patches(model, features) -> torch.Tensor:
    """The patch tokens of features, from their shapes alone, as the reader of a table of timm's outputs would."""
    rows, columns = model.layout.grid
    if features.ndim == 3:
        return features[:, -rows * columns :]
    return (features if model.layout.form == "NHWC" else features.permute(0, 2, 3, 1)).flatten(1, 2)


@torch.no_grad()
def check_it_changes_patch_tokens_alone(plain, images):
    """A map of known numbers added to the patch tokens comes out of every exit, and prefix tokens stay."""
    model = timm_dvt.add_denoiser(copy.deepcopy(plain), arch="static")
    own = torch.randn_like(model.denoiser.pos_embed)
    model.denoiser.pos_embed.copy_(own)
    off, on = plain.forward_features(images), model.forward_features(images)
    raw = patches(model, off)
    raw = plain.fc_norm(raw) if model.norm_after_pool else raw
    torch.testing.assert_close(patches(model, on), raw + own)
    if on.ndim == 3:
        assert torch.equal(on[:, : model.prefix_tokens()], off[:, : model.prefix_tokens()])
    (last,) = model.forward_intermediates(images, indices=1, intermediates_only=True)
    want = (raw + own).transpose(1, 2).unflatten(2, model.layout.grid)
    torch.testing.assert_close(last, want)
    whole = model.forward_intermediates(images)
    torch.testing.assert_close(whole[1][-1], want)
    torch.testing.assert_close(whole[0], on)
    earlier = plain.forward_intermediates(images)[1][:-1]
    assert all(map(torch.equal, whole[1][:-1], earlier))
    model.denoiser.pos_embed.zero_()
    if model.norm_after_pool:  # the same norm ahead of the pool
        plain = copy.deepcopy(plain)
        plain.norm, plain.fc_norm = plain.fc_norm, plain.norm
    torch.testing.assert_close(model(images), plain(images))


@torch.no_grad()
def check_the_map_lies_where_the_image_does(plain, images):
    """A change in one corner of the image changes the map most at that corner: rows and columns are not mixed up."""
    model = timm_dvt.add_denoiser(copy.deepcopy(plain), arch="static")
    rows, columns = model.layout.grid
    changed = images.clone()
    height, width = images.shape[2] // rows, images.shape[3] // columns
    changed[:, :, -height:, :width] += 3
    (a,), (b,) = (model.forward_intermediates(x, indices=1, intermediates_only=True) for x in (images, changed))
    difference = (a - b).abs().mean(dim=(0, 1))
    if rows * columns > 4:  # of four patches random weights may mix all alike
        assert difference[-1, 0] > difference.median(), difference


@torch.no_grad()
def check_off_is_timms_and_copies_are_whole(plain, images, folder):
    model = timm_dvt.add_denoiser(copy.deepcopy(plain))
    on = model.forward_features(images)
    assert type(model).__name__ == f"Denoised{type(plain).__name__}" and isinstance(model, type(plain))
    assert not torch.allclose(patches(model, on), patches(model, plain.forward_features(images)), atol=1e-3)
    timm_dvt.save_pretrained(model, folder)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for twin in (again, copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert type(twin) is type(model) and torch.equal(twin.forward_features(images), on)
        twin.set_denoise(False)
        assert torch.equal(twin.forward_features(images), plain.forward_features(images))
        ours, theirs = twin(images), plain(images)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
        ours, theirs = (each.forward_intermediates(images) for each in (twin, plain))
        assert torch.equal(ours[0], theirs[0]) and all(map(torch.equal, ours[1], theirs[1]))
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=[-1]).eval()
    (last,) = net(images)
    torch.testing.assert_close(last, model.forward_intermediates(images, indices=1, intermediates_only=True)[0])
    assert net.feature_info.channels() == [last.shape[1]]
    back = timm_dvt.attach.remove_denoiser(model)
    assert type(back) is type(plain) and torch.equal(back.forward_features(images), plain.forward_features(images))
    assert back.__dict__.keys() == plain.__dict__.keys()


def sweep(folder, most: float) -> tuple[set[str], dict[str, str]]:
    """Check every class; those with more parameters than `most`, when small, only for an answer without a run."""
    supported, refused = set(), {}
    for name, sketch in examples():
        kind = type(sketch).__name__
        try:
            layout_of(sketch)
        except UnsupportedModelError as e:
            refused[kind] = e.reason
            continue
        supported.add(kind)
        arguments = smallest(name)
        if sum(p.numel() for p in timm.create_model(name, device="meta", **arguments).parameters()) > most:
            continue
        plain = randomized(name, arguments)
        images = torch.randn(1, plain.in_chans, *layout_of(plain).img_size)
        try:
            check_it_changes_patch_tokens_alone(plain, images)
            check_the_map_lies_where_the_image_does(plain, images)
            check_off_is_timms_and_copies_are_whole(plain, images, folder / name)
            timm_dvt.calibrate(plain, views=32)
        except Exception as e:
            raise AssertionError(f"{name} ({kind}) is not refused, but fails: {e}") from e
    return supported, refused


@pytest.mark.sweep
def test_every_class_of_timm_works_or_is_refused_with_the_reason(tmp_path):
    supported, refused = sweep(tmp_path, most=3e6)
    assert {
        "VisionTransformer",
        "Eva",
        "Beit",
        "NaFlexVit",
        "VisionTransformerSAM",
        "VisionTransformerRelPos",
        "VisionTransformerDistilled",
        "Cait",
        "Xcit",
        "Hiera",
    } <= supported
    listed = re.search(r"With timm\s([0-9.]+):\n\n<!-- families -->\n(.*?)\.\n\n", README.read_text(), re.DOTALL)
    assert listed and (listed[1] != timm.__version__ or set(re.split(r",\s+", listed[2])) == supported)
    assert all(len(reason) > 20 for reason in refused.values()) and "ResNet" in refused


@pytest.mark.sweep
def test_also_the_classes_that_have_no_small_model(tmp_path):
    sweep(tmp_path, most=float("inf"))


class Own(nn.Module):
    """No more than what a denoiser needs: neither timm's switches nor its arguments."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 16, 16)
        self.num_features = 8
        self.feature_info = [{"module": "embed", "num_chs": 8, "reduction": 16}]

    def forward_features(self, x):
        return self.embed(x).flatten(2).transpose(1, 2)

    def forward_intermediates(self, x, indices=None, output_fmt="NCHW", intermediates_only=False):
        maps = self.embed(x)
        return [maps] if intermediates_only else (maps.flatten(2).transpose(1, 2), [maps])


@torch.no_grad()
def test_a_class_of_ones_own_can_have_a_denoiser():
    model, images = Own(), torch.randn(2, 3, 224, 224)
    raw = model.forward_features(images)
    timm_dvt.add_denoiser(model)
    model.set_grad_checkpointing()
    assert model.denoiser.grad_checkpointing and not torch.allclose(model.forward_features(images), raw)
    (maps,) = model.forward_intermediates(images, intermediates_only=True)
    assert torch.equal(maps.flatten(2).transpose(1, 2), model.forward_features(images))
    model.set_denoise(False)
    assert torch.equal(model.forward_features(images), raw)
