"""Images without content: the spread of their patch tokens is the definition's, and known where a model is known."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_dvt
from tests.helpers import small_datasets
from training.evaluate.data.datasets import open_dataset
from training.evaluate.features.cached import Features
from training.evaluate.features.extractor import Extractor
from training.evaluate.position import blank
from training.evaluate.run import Run

SIZES = (32, (48, 80))
NAMES = {*blank.COLORS, "zero", "noise"}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    small_datasets.folder(folder, train=1, val=3)
    return open_dataset("folder", folder, "images")["val"]


def small(name="vit_tiny_patch16_224", **more):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=64, depth=1, embed_dim=32, num_heads=2, num_classes=0, **more).eval()


def numbers(model, split, state, **settings):
    features = Features(Extractor(model), split, None)
    return blank.run({"val": features}, blank.Settings(**{"sizes": SIZES, **settings}), Run(state))


def loop(tokens):
    """The definition, in float64, token by token."""
    tokens = tokens.numpy().astype(np.float64)
    mean = sum(tokens) / len(tokens)
    return np.sqrt(sum(((token - mean) ** 2).mean() for token in tokens) / len(tokens))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_spreads_are_those_of_the_models_own_features_at_any_size_and_aspect(name, dynamic, split):
    more = {"patch_size": 16, "dynamic_img_size": dynamic}
    model = timm_dvt.add_denoiser(small(name, **more)).eval()
    for parameter in model.denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = {"red": blank.COLORS["red"], "white": (1.0, 1.0, 1.0)}
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = {name: (torch.tensor(color).view(1, 3, 1, 1) - mean) / std for name, color in images.items()}
    images["zero"] = torch.zeros(1, 3, 1, 1)
    found = {state: numbers(model, split, state) for state in ("raw", "denoised")}
    for height, width in ((32, 32), (48, 80)):
        twin = copy.deepcopy(model)
        if not dynamic:
            twin.set_input_size(img_size=(height, width))
        for name, image in images.items():
            for state, numbers_of in found.items():
                with torch.no_grad(), twin.denoising(state == "denoised"):
                    tokens = twin.forward_features(image.expand(1, 3, height, width))[0, twin.num_prefix_tokens :]
                    if twin.norm_after_pool and state == "raw":  # timm leaves the norm to the head there
                        tokens = twin.fc_norm(tokens)
                assert numbers_of[f"spread/{height}x{width}/{name}"] == pytest.approx(loop(tokens), rel=1e-4)
    raw, denoised = found.values()
    spreads = [key for key in raw if key.startswith("spread/")]
    assert {key.split("/")[2] for key in spreads} == NAMES and len(spreads) == 2 * len(NAMES)
    ratios = {key: denoised[key] / raw[key] for key in spreads}
    solid = [ratio for key, ratio in ratios.items() if not key.endswith("noise")]
    assert denoised["ratio"] == pytest.approx(np.mean(solid)) and denoised["ratio_worst"] == pytest.approx(max(solid))
    assert denoised["ratio_noise"] == pytest.approx(np.mean([r for k, r in ratios.items() if k.endswith("noise")]))
    assert raw["ratio"] == raw["ratio_worst"] == raw["ratio_noise"] == 1


def of_position_alone(**more):
    """A ViT whose tokens are the patch's color, embedded, plus the position embedding: no norm, blocks that add 0."""
    model = small(**more)
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    model.norm = nn.Identity()
    nn.init.normal_(model.pos_embed)
    return model


def test_of_a_model_that_adds_its_embedding_a_denoiser_that_takes_off_three_quarters_leaves_a_quarter(split):
    model = of_position_alone()
    embedding = model.pos_embed.detach()[:, 1:]
    timm_dvt.add_denoiser(model, arch="static")
    model.denoiser.pos_embed.data = -0.75 * embedding
    found = numbers(model, split, "denoised", sizes=(64,))
    assert found["ratio"] == pytest.approx(0.25, rel=1e-4) and found["ratio_worst"] == pytest.approx(0.25, rel=1e-4)
    assert found["ratio_walls"] == pytest.approx(0.25, rel=1e-4)  # whatever is beside them, here
    raw = numbers(model, split, "raw", sizes=(64,))
    assert raw["ratio_walls"] == 1
    assert raw["spread/64x64/zero"] == pytest.approx(loop(embedding[0]), rel=1e-5)
    photographs = [loop(map_.flatten(0, 1)) for map_ in Features(Extractor(model), split, None).maps([0, 1, 2], "raw")]
    want = 100 * loop(embedding[0]) / np.sqrt(np.mean(np.square(photographs)))
    assert raw["of_photographs"] == pytest.approx(want, rel=1e-4)


def test_a_model_that_knows_no_place_has_no_spread_and_no_denoiser_makes_it_less(split):
    model = of_position_alone()
    nn.init.zeros_(model.pos_embed)
    timm_dvt.add_denoiser(model, arch="static")
    found = numbers(model, split, "denoised")
    assert max(value for key, value in found.items() if key.startswith("spread/") and "noise" not in key) < 1e-6


def test_sizes_are_rounded_to_whole_patches_and_seeds_draw_the_noise(split):
    model = timm_dvt.add_denoiser(small())
    found = numbers(model, split, "raw", sizes=(30, (50, 75), 33), images=0)
    assert {key.split("/")[1] for key in found if "/" in key} == {"32x32", "48x80"}
    assert not {"of_photographs", "ratio_walls"} & {*found}
    features = {"val": Features(Extractor(model), split, None)}
    first, again, other = (blank.run(features, blank.Settings((32,), 0), Run("raw", seed)) for seed in (0, 0, 1))
    assert first == again and first["spread/32x32/noise"] != other["spread/32x32/noise"]
    with pytest.raises(ValueError, match=r"sizes must be pixels or \(height, width\)"):
        numbers(model, split, "raw", sizes=((1, 2, 3),))


def test_a_model_of_one_size_is_shown_that_size(split):
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", img_size=64, depth=1, embed_dim=32, num_heads=2, num_classes=0)
    found = numbers(timm_dvt.add_denoiser(model), split, "denoised")
    assert {key.split("/")[1] for key in found if "/" in key} == {"64x64"}
