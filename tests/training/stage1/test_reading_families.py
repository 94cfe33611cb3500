"""Stage 1 reads of every family the raw final features that its denoiser is given."""

import pytest
import timm
import torch

import timm_dvt
from timm_dvt.reading import final_tokens
from training.common.backbone import FeatureReader

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 1, "img_size": 64}
MODELS = {
    "beit_base_patch16_224": SMALL,  # norms behind the pool
    "naflexvit_base_patch16_siglip": SMALL,
    "samvit_base_patch16": SMALL,
    "vit_relpos_base_patch16_224": SMALL,
    "xcit_nano_12_p16_224": {"depth": 2, "img_size": 64},
    "hiera_tiny_224": {},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_reader_gives_what_the_denoiser_is_given(name):
    model = timm_dvt.add_denoiser(timm.create_model(name, **MODELS[name]).eval(), arch="static")
    seen = []
    model.denoiser.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    reader = FeatureReader(model)
    images = torch.rand(2, 3, reader.input_size, reader.input_size)
    model.forward_features((images - reader.mean) / reader.std)
    maps = reader.patch_features(images)
    assert list(maps) == [reader.depth - 1] and maps[reader.depth - 1].shape == (2, *[reader.grid] * 2, reader.channels)
    torch.testing.assert_close(maps[reader.depth - 1].flatten(1, 2), seen[0])
    prefix, patches, grid = final_tokens(model, (images - reader.mean) / reader.std)
    assert grid == (reader.grid, reader.grid) and torch.equal(patches, seen[0]) and model.denoise


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "naflexvit_base_patch16_siglip"])
def test_another_input_size_is_taken_where_the_model_can(name):
    plain = timm.create_model(name, **MODELS[name]).eval()
    if name.startswith("beit") and not hasattr(plain, "set_input_size"):
        pytest.skip(f"timm {timm.__version__} does not resize BEiT")
    before = FeatureReader(plain).grid
    reader = FeatureReader(plain, input_size=96)
    assert reader.grid == 6 and reader.patch_features(torch.rand(1, 3, 96, 96))[reader.depth - 1].shape[1:3] == (6, 6)
    assert FeatureReader(plain).grid == before  # the model itself is as it was


def test_what_a_family_cannot_be_read_at_is_refused():
    beit = timm.create_model("beit_base_patch16_224", **SMALL).eval()
    with pytest.raises(ValueError, match="stride must be the patch size, 16, for a Beit, got 8"):
        FeatureReader(beit, stride=8)
    with pytest.raises(ValueError, match="layers must be the last one alone for a Beit"):
        FeatureReader(beit, layers=[0])
    cait = timm.create_model("cait_xxs24_224", img_size=64).eval()
    with pytest.raises(ValueError, match="input_size is 96, at which a Cait does not run"):
        FeatureReader(cait, input_size=96)
    with pytest.raises(TypeError, match="not to ResNet: its maps have several resolutions"):
        FeatureReader(timm.create_model("test_resnet"))
