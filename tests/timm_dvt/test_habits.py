"""What a timm user does with a ViT goes on working with a denoised one."""

import copy
import io
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from timm.utils import ModelEmaV3

import timm_dvt

NAMES = ["vit_small_patch14_reg4_dinov2.lvd142m_dvt", "eva02_base_patch16_clip_224.merged2b_dvt"]

THIN = {"depth": 2, "embed_dim": 128, "num_heads": 2}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def create(name, **kwargs):
    patch = 14 if "patch14" in name else 16
    model = timm.create_model(name, **{**THIN, "img_size": 4 * patch, "num_classes": 7, **kwargs}).eval()
    return model, torch.randn(2, model.in_chans, 5 * patch, 3 * patch)


@torch.no_grad()
def test_reset_classifier(name):
    model, images = create(name)
    before = model.forward_features(images)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and torch.equal(model.forward_features(images), before)
    model.reset_classifier(0, "")
    assert model(images).shape == before.shape


@torch.no_grad()
def test_set_input_size(name):
    model, images = create(name, dynamic_img_size=False)
    model.set_input_size(img_size=images.shape[-2:])
    assert model.forward_features(images).shape[1] == model.num_prefix_tokens + 15


def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, images = create(name)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model.train()
        model.forward_features(images).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.denoiser.parameters()])
    assert model.denoiser.grad_checkpointing
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_weight_decay_and_layer_decay(name):
    model, _ = create(name)
    assert "denoiser.pos_embed" in model.no_weight_decay() and "pos_embed" in model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(parameter): n for n, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert {scale[n] for n in scale if n.startswith("denoiser.")} == {1.0} and max(scale.values()) == 1.0
    assert all(value < 1 for n, value in scale.items() if n.startswith(("blocks.", "patch_embed.", "pos_embed")))
    assert decay["denoiser.pos_embed"] == 0 and decay["denoiser.blocks.0.mlp.fc1.weight"] == 0.05
    create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5).step()


def test_device_and_dtype_at_creation_and_the_meta_device(name):
    model, images = create(name, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(images.bfloat16()).dtype == torch.bfloat16
    meta, _ = create(name, device="meta")
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}
    assert meta.forward_features(images.to("meta")).shape == model.forward_features(images.bfloat16()).shape


@torch.no_grad()
def test_in_chans_num_classes_and_config_overlay(name):
    model, images = create(name, in_chans=5, num_classes=11)
    assert images.shape[1] == 5 and model(images).shape == (2, 11)
    model, _ = create(name, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5})
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == (0.1, 0.2, 0.3) and config["crop_pct"] == 0.5


@torch.no_grad()
def test_checkpoint_path(name, tmp_path):
    model, images = create(name)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again, _ = create(name, checkpoint_path=str(tmp_path / "model.pth"))
    assert torch.equal(again(images), model(images))
    assert torch.equal(again.forward_features(images), model.forward_features(images))


def test_train_and_eval_reach_the_denoiser(name):
    model, _ = create(name)
    assert not model.denoiser.training
    assert model.train().denoiser.training and not model.eval().denoiser.training


@torch.no_grad()
def test_autocast(name):
    model, images = create(name)
    want = model.forward_features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.forward_features(images).float()
    assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "backbone", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "deit_tiny_distilled_patch16_224"]
)
@torch.no_grad()
def test_copies_and_pickles_are_whole_and_their_own(backbone):
    patch = 14 if "patch14" in backbone else 16
    plain = timm.create_model(backbone, depth=1, img_size=2 * patch, dynamic_img_size=True)
    model = timm_dvt.add_denoiser(plain.eval())
    images = torch.randn(1, 3, 3 * patch, 5 * patch)
    want = model.forward_features(images)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert type(twin) is type(model) and torch.equal(twin.forward_features(images), want)
        twin.denoiser.pos_embed.zero_()
        twin.set_denoise(False)
        assert torch.equal(model.forward_features(images), want)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
@torch.no_grad()
def test_copies_of_a_compiled_model_compute_with_their_own_weights(backbone):
    small = {"depth": 1, "img_size": 64, "embed_dim": 64, "num_heads": 1}
    model = timm_dvt.add_denoiser(timm.create_model(backbone, **small).eval())
    images = torch.randn(1, 3, 64, 64)
    model.compile(backend="eager")
    want = model(images)
    averaged = ModelEmaV3(model).module
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), averaged):
        assert type(twin) is type(model)
        assert torch.allclose(twin(images), want, atol=1e-5)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(images).any()
    assert torch.allclose(model(images), want, atol=1e-5)


def test_gradients_reach_the_denoiser_and_frozen_backbones_get_none(name):
    model, images = create(name)
    assert timm_dvt.freeze_backbone(model) is model
    trainable = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if n.startswith("denoiser.")}
    model.forward_intermediates(images, indices=1, intermediates_only=True)[0].square().mean().backward()
    for n, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (n in trainable), n
    with pytest.raises(TypeError, match="has no denoiser"):
        timm_dvt.freeze_backbone(timm.create_model("vit_tiny_patch16_224", depth=1))


@pytest.mark.slow
@torch.no_grad()
def test_compile(name):
    model, images = create(name)
    compiled = torch.compile(model, backend="aot_eager")
    for state in (True, False):
        model.set_denoise(state)
        assert torch.allclose(compiled(images), model(images), atol=1e-4)
    model.set_denoise(True)
    model.denoiser.pos_embed.mul_(30)
    compiled = torch.compile(model.forward_features, backend="aot_eager")
    assert torch.allclose(compiled(images), model.forward_features(images), atol=1e-4)
    model.denoiser.pos_embed.mul_(0)
    assert torch.allclose(compiled(images), model.forward_features(images), atol=1e-4)


class Tokens(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.forward_features(images)


@pytest.mark.parametrize(("name", "state"), [(NAMES[0], True), (NAMES[0], False), (NAMES[1], True)])
@torch.no_grad()
def test_export(name, state):
    model, images = create(name, depth=1)
    model.set_denoise(state)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Tokens(model), (images,), dynamic_shapes={"images": {0: batch}})
    more = torch.randn(3, *images.shape[1:])
    assert torch.allclose(program.module()(more), model.forward_features(more), atol=1e-4)


@pytest.mark.parametrize("side", [64, 96])  # the denoiser's own grid, and another one
@torch.no_grad()
def test_an_export_at_one_size_works_at_others(side):
    if not hasattr(timm.layers, "is_exporting"):
        pytest.skip("this timm's own position embeddings keep to one size")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True, depth=1, num_classes=0)
    model = timm_dvt.add_denoiser(model, pos_embed_out=(2, 3)).eval()
    torch.nn.init.normal_(model.denoiser.pos_embed)
    torch.nn.init.normal_(model.denoiser.pos_embed_out)
    height, width = (16 * torch.export.Dim(side_name, min=2, max=20) for side_name in ("rows", "columns"))
    shapes = {"images": {2: height, 3: width}}
    program = torch.export.export(Tokens(model), (torch.randn(2, 3, side, side),), dynamic_shapes=shapes)
    for size in ((64, 64), (96, 96), (48, 80)):
        images = torch.randn(2, 3, *size)
        assert torch.allclose(program.module()(images), model.forward_features(images), atol=1e-4), size


@pytest.mark.slow
@pytest.mark.parametrize("own_grid", [True, False])
@torch.no_grad()
def test_onnx_export_with_dynamic_batch(name, own_grid, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = create(name, depth=1)
    if own_grid:
        side = model.patch_embed.img_size[0]
        model, _ = create(name, depth=1, denoiser={"grid_size": (4, 4), "blank_gate": True})
        images = torch.randn(2, 3, side, side)
    path = tmp_path / "model.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"images": {0: batch}}
    torch.onnx.export(Tokens(model).eval(), (images,), path, dynamo=True, dynamic_shapes=shapes, input_names=["images"])
    session = onnxruntime.InferenceSession(path)
    more = torch.randn(3, *images.shape[1:])
    (got,) = session.run(None, {"images": more.numpy()})
    np.testing.assert_allclose(got, model.forward_features(more).numpy(), atol=1e-3)


@pytest.mark.parametrize("pos_embed_out", [False, (2, 3)])
@torch.no_grad()
def test_the_tracing_onnx_exporter_takes_any_grid_of_a_denoiser(pos_embed_out, tmp_path):
    """At the backbone's own size; elsewhere, and of EVA-02 anywhere, it takes no plain timm model either."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _ = create(NAMES[0], denoiser={"grid_size": (3, 5), "pos_embed_out": pos_embed_out, "blank_gate": True})
    images = torch.randn(1, 3, *model.patch_embed.img_size)
    path = tmp_path / "model.onnx"
    torch.onnx.export(Tokens(model).eval(), (images,), path, dynamo=False, input_names=["images"])
    (got,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(got, model.forward_features(images).numpy(), atol=1e-3)


@torch.no_grad()
def test_torchscript_scripts_where_timm_does_and_keeps_the_toggle(name):
    model, images = create(name, denoiser={"blank_gate": True})
    script = torch.jit.script(model)
    assert torch.allclose(script(images), model(images), atol=1e-5)
    assert torch.allclose(script.forward_features(images), model.forward_features(images), atol=1e-5)
    script.denoise = False
    model.set_denoise(False)
    assert torch.allclose(script.forward_features(images), model.forward_features(images), atol=1e-5)


@torch.no_grad()
def test_torch_jit_trace_does_not_bake_the_position_embedding(name):
    model, images = create(name)
    traced = torch.jit.trace(Tokens(model), images, check_trace=False)
    model.denoiser.pos_embed.mul_(3)
    assert torch.allclose(traced(images), model.forward_features(images), atol=1e-4)


@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_timms_own_save_for_hf_makes_a_folder_that_loads(tmp_path, safe):
    model = timm.create_model("vit_small_patch14_dinov2.lvd142m_dvt", depth=12, img_size=56).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe, model_args={"img_size": (56, 56)})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 56, 70)
    assert torch.equal(again.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("name", ["samvit_base_patch16", "mixer_s16_224"])
def test_a_model_whose_features_are_more_than_tokens_is_scripted_with_the_denoiser_off(name):
    torch.manual_seed(0)
    arguments = {"depth": 1, "img_size": 64} if "sam" in name else {"img_size": 64}
    model = timm_dvt.add_denoiser(timm.create_model(name, **arguments)).eval()
    model.set_denoise(False)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
    model.set_denoise(True)
    with pytest.raises(torch.jit.Error, match="only with the denoiser off"):
        torch.jit.script(model)(images)
