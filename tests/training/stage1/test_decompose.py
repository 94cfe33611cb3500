"""decompose(): from a model and an image to F, G and the residual."""

import math
import warnings
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from training.common.views import patch_centers
from training.stage1.conditioning import IllConditioned
from training.stage1.decompose import Decomposition, NonFiniteFeatures, Stage1Settings, decompose
from training.stage1.field.fit import FieldSettings
from training.stage1.field.hashgrid import HashGridSettings


def patch_means(pos_scale: float = 0.0, pixels: int = 64) -> VisionTransformer:
    """A ViT whose features are its patches' mean colors and zeros, plus a position embedding."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=pixels,
        patch_size=8,
        embed_dim=16,
        depth=1,
        num_heads=1,
        num_classes=0,
        class_token=False,
        global_pool="avg",
        final_norm=False,
    ).eval()
    config = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
        model.blocks[0].mlp.fc2.weight.zero_()
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        for channel in range(3):
            model.patch_embed.proj.weight[channel, channel] = config["std"][channel] / 64
            model.patch_embed.proj.bias[channel] = config["mean"][channel]
        model.pos_embed.normal_(std=pos_scale) if pos_scale else model.pos_embed.zero_()
    return model


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0).eval()


def coordinate_image(height: int, width: int) -> torch.Tensor:
    x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.full((height, width), 0.5)])


def photograph() -> torch.Tensor:
    from skimage import data

    return torch.from_numpy(data.chelsea().copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize("size", [(128, 128), (90, 200)])
@pytest.mark.parametrize("stride", [None, 4])
def test_features_that_are_coordinates_come_back_as_coordinates(size, stride):
    settings = Stage1Settings(views=48, input_size=64, stride=stride)
    result = decompose(patch_means(), coordinate_image(*size), settings)
    centers = patch_centers(64, 8, stride or 8).float()
    y, x = torch.meshgrid(centers, centers, indexing="ij")
    truth = torch.stack([x, y, torch.full_like(x, 0.5)] + 13 * [torch.zeros_like(x)], -1)
    error = (result.semantics - truth).abs()
    patch = 1 / 8
    assert float(error[1:-1, 1:-1].max()) < 0.02 * patch
    assert float(error.max()) < 0.06 * patch
    assert float(result.artifacts.abs().max()) < 0.02 * patch


def test_between_the_patches_f_is_the_field_and_at_the_patches_it_is_f():
    part = decompose(patch_means(), coordinate_image(90, 120), Stage1Settings(views=48, input_size=64))
    torch.testing.assert_close(part.at(8, 8), part.semantics)
    fine = part.at(10, 24)
    ys, xs = ((torch.arange(count) + 0.5) / count for count in (10, 24))
    assert fine.shape == (10, 24, 16)
    # As at the patches: the error is largest at the edges, which few crops reach.
    assert float((fine[1:-1, 2:-2, 0] - xs[2:-2]).abs().max()) < 0.03 / 8
    assert float((fine[1:-1, 2:-2, 1] - ys[1:-1, None]).abs().max()) < 0.03 / 8
    with pytest.raises(ValueError, match="height and width must be 1 or more, got 0 and 3"):
        part.at(0, 3)


def test_kept_crops_are_what_the_backbone_gives_for_them_and_f_where_they_lie():
    """Features that are coordinates: a crop's map says where in the image it lies, and F there must say the same."""
    settings = Stage1Settings(views=48, input_size=64, crops=11, seed=3)
    part = decompose(patch_means(), coordinate_image(90, 120), settings)
    assert part.crop_raw.shape == part.crop_semantics.shape == (11, 8, 8, 16)
    assert float((part.crop_raw - part.crop_semantics).abs().max()) < 0.06 / 8
    across = part.crop_raw[:, :, -1, 0] - part.crop_raw[:, :, 0, 0]
    assert {bool(row.mean() > 0) for row in across} == {True, False}  # mirrored crops and others
    assert float(across.abs().max()) < 0.8 and len(across.mean(1).unique()) == 11  # none is the whole image

    batched = decompose(patch_means(), coordinate_image(90, 120), replace(settings, batch_size=5))
    torch.testing.assert_close(batched.crop_raw, part.crop_raw, rtol=1e-4, atol=1e-5)
    few = decompose(patch_means(), coordinate_image(90, 120), replace(settings, crops=2))
    assert torch.equal(few.crop_raw, part.crop_raw[:2]) and torch.equal(few.semantics, part.semantics)
    assert decompose(patch_means(), coordinate_image(90, 120), replace(settings, crops=0)).crop_raw is None
    with pytest.raises(ValueError, match="crops must be from 0 to 47, one below views, got 48"):
        decompose(patch_means(), coordinate_image(90, 120), replace(settings, crops=48))


def test_of_the_field_too_a_crop_has_f_where_it_lies():
    field = FieldSettings(
        steps=200, batch=512, grid=HashGridSettings(levels=8, log2_hashmap_size=14, per_level_scale=1.5)
    )
    settings = Stage1Settings(solver="field", views=24, input_size=64, crops=3, field=field)
    part = decompose(patch_means(), coordinate_image(96, 96), settings)
    xs, ys = part.crop_raw[1, 0, :, 0], part.crop_raw[1, :, 0, 1]  # features are coordinates
    torch.testing.assert_close(part.crop_semantics[1], part.field(xs.double(), ys.double()), rtol=0, atol=0.02)


def test_a_position_embedding_comes_back_as_g():
    model = patch_means(pos_scale=0.3)
    result = decompose(model, coordinate_image(128, 128), Stage1Settings(views=64, input_size=64))
    position = model.pos_embed.detach().view(8, 8, 16)
    truth = position - position.mean((0, 1))
    assert float((result.artifacts - truth).norm() / truth.norm()) < 0.02
    centers = patch_centers(64, 8, 8).float()
    semantics = result.semantics - position.mean((0, 1))
    assert float((semantics[..., 0] - centers).abs().max()) < 0.02
    assert float((semantics[..., 1] - centers[:, None]).abs().max()) < 0.02


def test_the_batch_size_changes_nothing():
    image, model = photograph(), small_vit()
    one, other = (decompose(model, image, Stage1Settings(views=40, input_size=64, batch_size=size)) for size in (1, 7))
    for name in ("raw", "semantics", "artifacts", "residual"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-4)


def test_parts_add_up_and_g_has_zero_mean():
    result = decompose(small_vit(), photograph(), Stage1Settings(views=20, input_size=64))
    assert isinstance(result, Decomposition)
    assert result.raw.shape == result.semantics.shape == result.artifacts.shape == (8, 8, 32)
    torch.testing.assert_close(result.raw, result.semantics + result.artifacts + result.residual)
    assert float(result.artifacts.mean((0, 1)).abs().max()) < 1e-5


def test_layers_of_one_pass_are_those_of_separate_passes():
    image, model = photograph(), small_vit()
    together = decompose(model, image, Stage1Settings(views=20, input_size=64, layers=(0, -1)))
    assert isinstance(together, dict) and sorted(together) == [0, 2]
    for layer, result in together.items():
        alone = decompose(model, image, Stage1Settings(views=20, input_size=64, layers=(layer,)))
        torch.testing.assert_close(result.semantics, alone[layer].semantics, rtol=1e-4, atol=1e-5)
    last = decompose(model, image, Stage1Settings(views=20, input_size=64))
    torch.testing.assert_close(together[2].semantics, last.semantics, rtol=1e-4, atol=1e-5)


def test_the_field_gives_the_same_kind_of_answer():
    small = HashGridSettings(levels=8, log2_hashmap_size=14, per_level_scale=1.5)
    field = FieldSettings(steps=200, batch=512, grid=small)
    settings = Stage1Settings(solver="field", views=24, input_size=64, field=field)
    steps = []
    result = decompose(patch_means(), coordinate_image(96, 96), settings, fit_progress=steps.append)
    centers = patch_centers(64, 8, 8).float()
    assert sum(steps) == 200
    assert result.semantics.shape == result.residual.shape == (8, 8, 16)
    # F rows and columns must not be swapped: x varies along columns, y along rows.
    semantics = result.semantics - result.semantics.mean((0, 1))
    assert float((semantics[..., 0] - (centers - 0.5)).abs().mean()) < 0.1
    assert float((semantics[..., 1] - (centers[:, None] - 0.5)).abs().mean()) < 0.1


@pytest.mark.parametrize("solver", ["linear", "field"])
def test_a_callers_default_dtype_and_device_change_nothing(solver):
    settings = Stage1Settings(
        views=8, input_size=64, solver=solver, field=FieldSettings(steps=2, grid=HashGridSettings(levels=2))
    )
    model, image = small_vit(), photograph()
    want = decompose(model, image, settings)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = decompose(model, image, settings)
    finally:
        torch.set_default_dtype(torch.float32)
    for part in ("raw", "semantics", "artifacts", "residual"):
        assert torch.equal(getattr(got, part), getattr(want, part)), part


def test_progress_counts_views():
    done = []
    decompose(small_vit(), photograph(), Stage1Settings(views=19, input_size=64), progress=done.append)
    assert done == [8, 8, 3]


def test_features_that_are_not_finite_stop_the_image():
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteFeatures, match="block 2 gave NaN"):
        decompose(model, photograph(), Stage1Settings(views=8, input_size=64))


def test_a_tiny_image_and_a_long_one_are_decomposed():
    for size in ((9, 11), (40, 900)):
        result = decompose(small_vit(), torch.rand(3, *size), Stage1Settings(views=20, input_size=64))
        assert bool(result.semantics.isfinite().all())


def test_an_image_without_content_gives_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = torch.full((3, 64, 64), 0.3)
        result = decompose(patch_means(), flat, Stage1Settings(views=20, input_size=64))
    torch.testing.assert_close(result.semantics[..., :3], torch.full((8, 8, 3), 0.3), rtol=0, atol=1e-4)
    assert float(result.artifacts.abs().max()) < 1e-4


def test_equal_crops_are_refused_before_any_forward_pass():
    done = []
    settings = Stage1Settings(views=20, input_size=64, area=(1, 1), aspect=(1, 1), flip=0)
    with pytest.raises(IllConditioned, match="use more views"):
        decompose(small_vit(), photograph(), settings, progress=done.append)
    assert not done


def test_a_bfloat16_pass_is_close():
    image, model = photograph(), small_vit()
    exact, rough = (
        decompose(model, image, Stage1Settings(views=20, input_size=64, dtype=dtype))
        for dtype in ("float32", "bfloat16")
    )
    assert float((exact.semantics - rough.semantics).norm() / exact.semantics.norm()) < 0.03


@pytest.mark.parametrize("change", [{"solver": "magic"}, {"batch_size": 0}, {"views": 1}])
def test_impossible_settings_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        decompose(small_vit(), photograph(), Stage1Settings(**{"input_size": 64, **change}))


@pytest.mark.parametrize("image", [torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_impossible_images_are_refused(image):
    with pytest.raises(ValueError, match="image must be"):
        decompose(small_vit(), image, Stage1Settings(input_size=64))
