"""torch.fx: timm's own feature extraction by graph nodes works on a denoised model as on a plain one."""

import pytest
import timm
import torch
from timm.models import FeatureGraphNet, create_feature_extractor

import timm_dvt


def build(name: str, **arguments):
    model = timm_dvt.add_denoiser(timm.create_model(name, **arguments).eval())
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, *model.layout.img_size)


MODELS = {
    "test_vit": {},
    "test_vit2": {"global_pool": "avg", "fc_norm": True},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 56},
    "beit_base_patch16_224": {"depth": 2, "img_size": 64, "embed_dim": 64, "num_heads": 1},
    "samvit_base_patch16": {"depth": 2, "img_size": 64, "embed_dim": 64, "num_heads": 1},
}


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_timms_feature_extractor_gives_a_variants_features(name, state):
    model, images = build(name, **MODELS[name])
    model.set_denoise(state)
    nodes = {"blocks.0": "early", **({"denoiser": "tokens"} if state else {})}
    extractor = create_feature_extractor(model, nodes)
    got = extractor(images)
    (early,) = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert got["early"].numel() >= early.numel()
    if state:
        features = model.forward_features(images)
        want = model.layout.patches(features, model.prefix_tokens())
        torch.testing.assert_close(got["tokens"], want, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_whole_forward_is_traced_with_its_logits():
    model, images = build("test_vit", global_pool="avg")
    extractor = create_feature_extractor(model, {"head": "logits"})
    torch.testing.assert_close(extractor(images)["logits"], model(images), atol=1e-5, rtol=1e-4)
    twice = torch.randn(5, *images.shape[1:])
    torch.testing.assert_close(extractor(twice)["logits"], model(twice), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_timms_graph_net_of_the_blocks():
    model, images = build("test_vit")
    plain = timm.create_model("test_vit").eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("denoiser.")})
    ours, theirs = (FeatureGraphNet(each, (1, 3))(images) for each in (model, plain))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "options", [{}, {"arch": "conv3x3"}, {"pos_embed_out": (3, 3), "blank_gate": True, "flat_gate": True}]
)
@torch.no_grad()
def test_torchvisions_tracer_goes_through_a_denoiser(options):
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    plain = timm.create_model("vit_tiny_patch16_224", global_pool="avg", img_size=64, depth=2)
    model = timm_dvt.add_denoiser(plain, keep_length=True, **options).eval()
    extractor = feature_extraction.create_feature_extractor(model, {"head": "logits"})
    images = torch.randn(2, 3, 64, 64)
    images[0, :, :, :48] = 0.1  # three of four columns without texture
    assert torch.equal(extractor(images)["logits"], model(images))
