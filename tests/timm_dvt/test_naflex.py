"""NaFlex: packed patches of images of several aspect ratios are denoised each on a grid of its own."""

import copy

import pytest
import timm
import torch

import timm_dvt
from timm_dvt.feature_methods import denoise_packed, packed_pixels

ARGUMENTS = {"depth": 2, "embed_dim": 64, "num_heads": 1}
GRIDS = ((4, 6), (5, 3), (4, 6))
PATCH = 16


def build(name: str, **arguments):
    backbone = timm.create_model(name, **ARGUMENTS, **arguments).eval()
    model = timm_dvt.add_denoiser(backbone, grid_size=(4, 4), flat_gate=True)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = [torch.randn(1, 3, rows * PATCH, columns * PATCH) for rows, columns in GRIDS]
    images[2][..., : 3 * PATCH] = torch.linspace(0.5, 0.6, 3 * PATCH)  # a wall on its left
    return model, images


def packed(images: list[torch.Tensor], length: int = 28) -> dict[str, torch.Tensor]:
    """What timm's NaFlex collator makes of images: patches, their coordinates, which of them are no padding."""
    batch = {
        "patches": torch.zeros(len(images), length, PATCH * PATCH * 3),
        "patch_coord": torch.zeros(len(images), length, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(images), length, dtype=torch.bool),
    }
    for i, image in enumerate(images):
        rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
        patches = image[0].reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        count = rows * columns
        batch["patches"][i, :count] = patches
        batch["patch_coord"][i, :count] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        batch["patch_valid"][i, :count] = True
    return batch


def intermediates(model, batch, **options):
    try:
        return model.forward_intermediates(batch, output_fmt="NLC", **options)
    except AssertionError as e:
        pytest.skip(f"timm {timm.__version__} takes no packed patches there: {e}")


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"])
@torch.no_grad()
def test_packed_patches_give_what_each_image_alone_gives(name):
    model, images = build(name)
    prefix = model.prefix_tokens()
    batch = packed(images)
    features = model.forward_features(**batch)
    for i, image in enumerate(images):
        alone = model.forward_features(image)
        count = alone.shape[1]
        torch.testing.assert_close(features["patches"][i, :count], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(batch)[i], model(image)[0], atol=1e-4, rtol=1e-4)
    (maps,) = intermediates(model, batch, indices=1, intermediates_only=True)
    torch.testing.assert_close(maps, features["patches"][:, prefix:])

    leveled = features["patches"]
    model.denoiser.flat_below = None
    changed = (model.forward_features(**batch)["patches"] - leveled).abs().amax(-1)[:, prefix:] > 1e-3
    wall = (batch["patch_coord"][2, :, 1] < 3) & batch["patch_valid"][2]
    assert not changed[:2].any() and torch.equal(changed[2], wall)


@torch.no_grad()
def test_pixels_of_packed_patches_are_known_in_every_form_that_timm_takes():
    model, images = build("naflexvit_base_patch16_gap", enable_patch_interpolator=True)
    batch = packed(images)
    flat = model.forward_features(**batch)["patches"]
    shaped = {**batch, "patches": batch["patches"].unflatten(2, (PATCH, PATCH, 3))}
    torch.testing.assert_close(model.forward_features(**shaped)["patches"], flat)
    if not hasattr(model.embeds, "channels_last"):
        pytest.skip(f"timm {timm.__version__} knows pixels with their channels last alone")
    model.embeds.channels_last = False
    channels_first = shaped["patches"].permute(0, 1, 4, 2, 3)
    for patches in (channels_first, channels_first.flatten(2)):
        pixels = packed_pixels(patches, model.embeds)
        assert torch.equal(pixels[2, 7], images[2][0, :, PATCH : 2 * PATCH, PATCH : 2 * PATCH])


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"])
@torch.no_grad()
def test_off_is_timms_and_padding_is_left_alone(name):
    model, images = build(name)
    prefix, batch = model.prefix_tokens(), packed(images)
    on = model.forward_features(**batch)["patches"]
    plain = timm_dvt.attach.remove_denoiser(copy.deepcopy(model))
    raw, valid = plain.forward_features(**batch)["patches"], batch["patch_valid"]
    assert torch.equal(on[:, :prefix], raw[:, :prefix])
    assert torch.equal(on[:, prefix:][~valid], raw[:, prefix:][~valid])
    assert not torch.allclose(on[:, prefix:][valid], raw[:, prefix:][valid], atol=1e-2)
    model.set_denoise(False)
    assert torch.equal(model.forward_features(**batch)["patches"], raw) and torch.equal(model(batch), plain(batch))
    maps, timms = (intermediates(m, batch, output_dict=True) for m in (model, plain))
    assert torch.equal(maps["image_features"], timms["image_features"]) and maps.keys() == timms.keys()


def test_patches_are_placed_by_their_coordinates_in_whatever_order_they_come():
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(5))[None]
    order, tokens = torch.randperm(15), torch.randn(1, 15, 8)
    seen = []

    def denoiser(patches, grid, images):
        seen.append((patches, grid, images))
        return -patches

    image = torch.randn(1, 3, 3 * 2, 5 * 4)
    pixels = image.reshape(1, 3, 3, 2, 5, 4).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # patches of 2 x 4
    clean = denoise_packed(denoiser, tokens[:, order], pixels[:, order], coordinates[:, order])
    assert torch.equal(clean, -tokens[:, order])
    ((patches, grid, whole),) = seen
    assert grid == (3, 5) and torch.equal(patches, tokens) and torch.equal(whole, image)


@torch.no_grad()
def test_an_image_with_patches_missing_is_refused():
    model, images = build("naflexvit_base_patch16_gap")
    batch = packed(images)
    batch["patch_valid"][1, 3] = False
    with pytest.raises(ValueError, match=r"14 patch tokens do not fill a grid of 5 x 3 \(image 1 of the batch\)"):
        model.forward_features(**batch)


@torch.no_grad()
def test_any_aspect_ratio_of_plain_images():
    model, images = build("naflexvit_base_patch16_siglip")
    for image, grid in zip(images, GRIDS):
        maps = model.forward_intermediates(image, indices=1, intermediates_only=True)[0]
        assert maps.shape == (1, 64, *grid)
        tokens = model.forward_features(image)
        torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, grid), maps)
