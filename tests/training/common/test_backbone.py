"""Raw features: they are timm's, at any size and stride, and the model is left alone."""

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from training.common.backbone import FeatureReader, default_input_size

SMALL = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}


def vit(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes}).eval()


def eva(**changes) -> Eva:
    torch.manual_seed(0)
    rotary = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "global_pool": "token"}
    return Eva(**{**SMALL, **rotary, **changes}).eval()


def normalized(images: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize("make", [vit, eva])
@pytest.mark.parametrize("size", [64, 96])
def test_features_are_timms_intermediates_at_any_size(make, size):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    reader = FeatureReader(make(), layers=(0, -1), input_size=size)
    features = reader.patch_features(images)
    dynamic = make(dynamic_img_size=True)
    with torch.no_grad():
        x = normalized(images, dynamic)
        plain = dynamic.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
        normed = dynamic.forward_intermediates(x, indices=[2], norm=True, intermediates_only=True)[0]
    assert reader.layers == (0, 2) and list(features) == [0, 2]
    torch.testing.assert_close(features[0], plain.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features[2], normed.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [vit, eva])
def test_dynamic_and_fixed_models_give_the_same(make):
    images = torch.rand(1, 3, 96, 96)
    fixed, dynamic = (
        FeatureReader(make(dynamic_img_size=flag), input_size=96, stride=8).patch_features(images)[2]
        for flag in (False, True)
    )
    assert fixed.shape == (1, 11, 11, 48)
    torch.testing.assert_close(fixed, dynamic, rtol=1e-5, atol=1e-5)


def test_the_final_norm_is_applied_where_timm_moved_it_behind_the_pooling():
    model = vit(global_pool="avg")
    torch.nn.init.uniform_(model.fc_norm.weight, 0.5, 2)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.fc_norm(model.forward_features(normalized(images, model)))[:, 1:]
    features = FeatureReader(model, input_size=64).patch_features(images)[2]
    torch.testing.assert_close(features.flatten(1, 2), tokens)


def test_a_dense_stride_sees_the_patches_of_shifted_crops():
    model = vit(pos_embed="none", depth=1, class_token=False, global_pool="avg", fc_norm=False)
    # With attention and MLP silenced, a token is its own patch's embedding, normed.
    torch.nn.init.zeros_(model.blocks[0].attn.proj.weight)
    torch.nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    images = torch.rand(1, 3, 64, 64)
    dense = FeatureReader(model, input_size=64, stride=4).patch_features(images)[0]
    assert dense.shape == (1, 13, 13, 48)
    with torch.no_grad():
        x = normalized(images, model)
        for row in range(13):
            for column in range(13):
                patch = x[:, :, 4 * row : 4 * row + 16, 4 * column : 4 * column + 16]
                token = model.norm(model.patch_embed.proj(patch).flatten(1))
                torch.testing.assert_close(dense[:, row, column], token, rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was():
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reader = FeatureReader(model, input_size=96, stride=8)
    reader.patch_features(torch.rand(1, 3, 96, 96))
    assert model.training and model.patch_embed.proj.stride == (16, 16)
    assert model.patch_embed.grid_size == (4, 4) and model.patch_embed.strict_img_size
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    shared = {id(p) for p in reader._model.parameters()} & {id(p) for p in model.parameters()}
    assert len(shared) == len(list(model.parameters())) - 1  # all but the position embedding


def test_bfloat16_comes_back_as_float32_and_close():
    model, images = vit(), torch.rand(2, 3, 64, 64)
    exact = FeatureReader(model, input_size=64).patch_features(images)[2]
    rough = FeatureReader(model, input_size=64, dtype="bfloat16").patch_features(images)[2]
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.03


def test_default_sizes_are_the_papers():
    assert [default_input_size(patch) for patch in (14, 16)] == [518, 512]
    assert FeatureReader(vit()).grid == 32


def test_a_denoised_model_is_read_raw():
    class Denoised(VisionTransformer):
        denoise = True

        def set_denoise(self, on):
            self.denoise = on

        def forward_intermediates(self, *args, **kwargs):
            maps = super().forward_intermediates(*args, **kwargs)
            return [x * 0 for x in maps] if self.denoise else maps

    torch.manual_seed(0)
    model, images = Denoised(**SMALL).eval(), torch.rand(1, 3, 64, 64)
    raw = FeatureReader(vit(), input_size=64).patch_features(images)[2]
    assert torch.equal(FeatureReader(model, input_size=64).patch_features(images)[2], raw)
    assert model.denoise


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="ResNet"):
        FeatureReader(timm.create_model("resnet18"))


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers", (3,)),
        ("layers", ()),
        ("input_size", 70),
        ("stride", 17),
        ("stride", 0),
        ("dtype", "float16"),
    ],
)
def test_impossible_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        FeatureReader(vit(), **{name: value})
