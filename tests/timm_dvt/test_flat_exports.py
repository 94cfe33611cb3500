"""A denoiser that levels flat patches goes through compilers, exporters and TorchScript, and levels there, too."""

import pytest
import timm
import torch

import timm_dvt
from tests.helpers.walls import wall


def tokens_and_images(size: tuple[int, int] = (80, 64)):
    """A model whose forward_features levels, as a module of its own, and images with a wall for it."""

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            plain = timm.create_model("vit_tiny_patch16_224", img_size=64, dynamic_img_size=True, depth=1)
            self.model = timm_dvt.add_denoiser(plain, flat_gate=True)

        def forward(self, images):
            return self.model.forward_features(images)

    module = Tokens().eval()
    return module, batch_of(size)


def batch_of(size: tuple[int, int]) -> torch.Tensor:
    grid = (size[0] // 16, size[1] // 16)
    walls = [wall(1.0, seed, grid, (16, 16)) for seed in (0, 1)]
    return torch.stack([*walls, torch.rand(3, *size)]) * 4 - 2  # and one without


@torch.no_grad()
def check_same(there, module, images) -> None:
    """What was made of a module levels as it does, which is not what it gives without."""
    want, below = module(images), module.model.denoiser.flat_below
    assert torch.allclose(there(images), want, atol=1e-4)
    module.model.denoiser.flat_below = None
    assert (module(images) - want).abs().max() > 0.05
    module.model.denoiser.flat_below = below


def test_torchscript_scripts_it_in_the_methods_of_other_classes():
    torch.manual_seed(0)
    small = {"embed_dim": 64, "num_heads": 1, "depth": 1, "img_size": 64}
    model = timm_dvt.add_denoiser(timm.create_model("beit_base_patch16_224", **small), flat_gate=True).eval()
    images, script = batch_of((64, 64)), torch.jit.script(model)
    with torch.no_grad():
        want = model.forward_features(images)
        assert torch.allclose(script.forward_features(images), want, atol=1e-4)
        model.denoiser.flat_below = None
        assert (model.forward_features(images) - want).abs().max() > 0.05


def test_torchscript_scripts_and_traces_it():
    module, images = tokens_and_images()
    check_same(torch.jit.script(module.model).forward_features, module, images)
    check_same(torch.jit.trace(module, images, check_trace=False), module, images)


def test_an_export_at_one_size_levels_at_others():
    if not hasattr(timm.layers, "is_exporting"):
        pytest.skip("this timm's own position embeddings keep to one size")
    module, images = tokens_and_images()
    height, width = (16 * torch.export.Dim(side, min=2, max=20) for side in ("rows", "columns"))
    program = torch.export.export(module, (images,), dynamic_shapes={"images": {2: height, 3: width}})
    for size in ((80, 64), (64, 64), (96, 112)):
        check_same(program.module(), module, batch_of(size))


def test_the_tracing_onnx_exporter_takes_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, images = tokens_and_images((64, 64))
    torch.onnx.export(module, (images,), tmp_path / "model.onnx", dynamo=False, input_names=["images"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    check_same(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), module, images)


@pytest.mark.slow
def test_compilers_and_the_other_onnx_exporter_take_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, images = tokens_and_images((64, 64))
    check_same(torch.compile(module, backend="aot_eager", fullgraph=True), module, images)
    torch.onnx.export(module, (images,), tmp_path / "model.onnx", dynamo=True, input_names=["images"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    check_same(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), module, images)
