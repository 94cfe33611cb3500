"""What this project does on a GPU, held against the same on the CPU: pytest -m cuda, on a machine that has one.

Matrix products are those of float32 here (TF32 off), so that the two differ by rounding alone.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_dvt
from tests.helpers import small_datasets, stage1_runs, stage2_runs
from tests.helpers.pair_folders import write_pairs
from tests.helpers.photographs import denoised_folder, write_pictures
from tests.helpers.processes import torchrun
from tests.timm_dvt.test_calibration import photographs, plant, vit
from tests.training.evaluate.test_evaluate import ARGS, QUICK
from tests.training.stage1.test_decompose import photograph, small_vit
from tests.training.stage1.test_field import SETTINGS, Scene, relative_error
from timm_dvt.__main__ import main as plug_in
from training import distill, make_denoiser
from training.evaluate.__main__ import main as evaluate
from training.stage1.decompose import Stage1Settings, decompose
from training.stage1.field.backends import make_encoding
from training.stage1.field.fit import FieldSettings, fit_field
from training.stage1.field.hashgrid import HashGrid, HashGridSettings

GPU = torch.device("cuda")
NAMES = [
    "vit_small_patch14_dinov2.lvd142m_dvt",
    "vit_small_patch14_reg4_dinov2.lvd142m_dvt",
    "eva02_base_patch16_clip_224.merged2b_dvt",
    "vit_base_patch16_224.mae_dvt",
]

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture(autouse=True)
def _float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # matrix products have it off by default
        yield


def create(name, **kwargs):
    """A variant of two blocks and 4 x 4 places, and images of another, oblong grid."""
    patch = 14 if "patch14" in name else 16
    model = timm.create_model(name, depth=2, img_size=4 * patch, num_classes=0, **kwargs).eval()
    return model, torch.randn(2, 3, 5 * patch, 3 * patch)


def apart(found, wanted):
    """Norm of the difference over that of what is wanted."""
    return float((found.cpu().float() - wanted.cpu().float()).norm() / wanted.cpu().float().norm())


@torch.no_grad()
def predicted(folder):
    """What a trained denoiser makes of random tokens. Of its weights some get no gradient but rounding, which Adam
    makes whole steps of."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return model.denoiser(torch.randn(8, 16, 64, generator=torch.Generator().manual_seed(0)), (4, 4))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_variant_gives_the_tokens_of_the_cpu_at_any_grid_and_off_is_plain_timm(name):
    model, images = create(name)
    model.denoiser.pos_embed.normal_()
    on = model.forward_features(images)
    maps = model.forward_intermediates(images, indices=2, intermediates_only=True)
    model.to(GPU)
    assert apart(model.forward_features(images.to(GPU)), on) < 1e-4
    for found, wanted in zip(model.forward_intermediates(images.to(GPU), indices=2, intermediates_only=True), maps):
        assert apart(found, wanted) < 1e-4
    plain = timm.create_model(name.removesuffix("_dvt"), depth=2, img_size=model.patch_embed.img_size, num_classes=0)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("denoiser.")})
    if hasattr(plain.patch_embed, "strict_img_size"):
        plain.dynamic_img_size = plain.patch_embed.strict_img_size = False
        plain.set_input_size(img_size=images.shape[-2:])
    model.set_denoise(False)
    model.set_input_size(img_size=images.shape[-2:])
    assert torch.equal(model.forward_features(images.to(GPU)), plain.eval().to(GPU).forward_features(images.to(GPU)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES[1:3])
@torch.no_grad()
def test_half_precision_and_autocast_are_near_float32(name, dtype):
    model, images = create(name)
    wanted = model.forward_features(images)
    model.to(GPU)
    with torch.autocast("cuda", dtype=dtype):
        assert apart(model.forward_features(images.to(GPU)), wanted) < 0.03
    assert apart(model.to(dtype).forward_features(images.to(GPU, dtype)), wanted) < 0.03


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", NAMES[1:3])
@torch.no_grad()
def test_torch_compile_with_its_own_backend_keeps_the_toggle(name, mode):
    model, images = create(name)
    model.to(GPU).denoiser.pos_embed.normal_()
    compiled = torch.compile(model, mode=mode)
    for state in (True, False, True):
        model.set_denoise(state)
        for _ in range(3):  # the first runs record what the later ones replay
            assert apart(compiled(images.to(GPU)), model(images.to(GPU))) < 1e-3


def test_gradients_are_those_of_the_cpu():
    model, images = create(NAMES[1])
    timm_dvt.freeze_backbone(model)
    wanted = {}
    for device in ("cpu", GPU):
        model.to(device).zero_grad()
        model.forward_features(images.to(device)).square().mean().backward()
        for name, parameter in model.denoiser.named_parameters():
            if device == "cpu":
                wanted[name] = parameter.grad.clone()
            else:
                assert apart(parameter.grad, wanted[name]) < 1e-3, name


@pytest.mark.parametrize("dtype, most", [("float32", 2e-3), ("bfloat16", 0.1)])
def test_the_linear_solver_finds_what_it_finds_on_the_cpu(dtype, most):
    model, image = small_vit(), photograph()
    wanted = decompose(model, image, Stage1Settings(views=40, input_size=64))
    found = decompose(model, image, Stage1Settings(views=40, input_size=64, dtype=dtype), device=GPU)
    for part in ("raw", "semantics", "artifacts"):
        assert getattr(found, part).device.type == "cpu"
        assert apart(getattr(found, part), getattr(wanted, part)) < most, part
    assert apart(found.at(13, 9), wanted.at(13, 9)) < most


def test_the_field_recovers_a_scene_with_a_known_answer():
    scene = Scene()
    truth = scene.semantics(scene.image_coords)
    cpu = relative_error(scene.fit().semantics(scene.image_coords), truth)
    result = scene.fit(device=GPU)
    assert relative_error(result.semantics(scene.image_coords).cpu(), truth) < 1.5 * cpu
    assert relative_error(result.artifacts.cpu(), scene.artifacts) < 0.2
    settings = Stage1Settings(solver="field", views=24, input_size=64, field=FieldSettings(steps=100, batch=256))
    assert decompose(small_vit(), photograph(), settings, device=GPU).semantics.isfinite().all()


def test_tinycudann_is_the_torch_grid():
    pytest.importorskip("tinycudann", exc_type=ImportError)
    for settings in (HashGridSettings(), HashGridSettings(levels=3, log2_hashmap_size=9, per_level_scale=1.5)):
        torch.manual_seed(5)
        theirs = make_encoding(settings, "tinycudann", GPU)
        torch.manual_seed(5)
        ours = HashGrid(settings).to(GPU)
        assert type(theirs) is not HashGrid
        for grid in (theirs, ours):
            torch.nn.init.normal_(grid.params.data, generator=torch.Generator(GPU).manual_seed(0))
        coords = torch.rand(4096, 2, device=GPU, generator=torch.Generator(GPU).manual_seed(1))
        found, wanted = theirs(coords).float(), ours(coords)
        assert apart(found, wanted) < 1e-3
        found.square().sum().backward()
        wanted.square().sum().backward()
        assert apart(theirs.params.grad, ours.params.grad) < 1e-3
    scene = Scene()
    truth = scene.semantics(scene.image_coords)
    by = {}
    for backend in ("torch", "tinycudann"):
        settings = FieldSettings(steps=300, batch=256, lr=0.03, grid=SETTINGS.grid, backend=backend)
        result = fit_field(scene.coords, scene.patches, scene.features, scene.k, settings, device=GPU)
        by[backend] = relative_error(result.semantics(scene.image_coords).cpu(), truth)
    assert by["tinycudann"] < 1.5 * by["torch"]


def test_pairs_of_many_images_are_those_of_the_cpu(tmp_path):
    images = stage1_runs.draw_images(tmp_path / "images")
    for device in ("cpu", "cuda"):
        assert stage1_runs.run(images, tmp_path / device, "--device", device, "--precision", "full") == 0
    pairs = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.safetensors"))
    assert len(pairs) == 6
    for pair in pairs:
        wanted, found = (load_file(tmp_path / device / pair) for device in ("cpu", "cuda"))
        for part in wanted:
            assert apart(found[part], wanted[part]) < 5e-3, part


def test_training_takes_the_steps_of_the_cpu_and_continues(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    for device in ("cpu", "cuda"):
        assert stage2_runs.run(pairs, tmp_path / device, "--steps", "12", "--device", device) == 0
    assert apart(predicted(tmp_path / "cuda"), predicted(tmp_path / "cpu")) < 1e-3
    log = [json.loads(line) for line in (tmp_path / "cuda" / "log.jsonl").read_text().splitlines()]
    assert any("images_per_second" in line for line in log)
    half = ("--steps", "12", "--device", "cuda", "--dtype", "bfloat16", "--checkpoint-every", "5")
    assert stage2_runs.run(pairs, tmp_path / "half", *half) == 0
    assert all(value.isfinite().all() for value in stage2_runs.denoiser_weights(tmp_path / "half").values())


def test_two_processes_on_one_gpu_train_and_denoise_together(tmp_path):
    pairs = write_pairs(tmp_path / "pairs")
    options = ("--steps", "12", "--device", "cuda")
    assert stage2_runs.run(pairs, tmp_path / "one", *options) == 0
    two = torchrun(29633, *stage2_runs.command(pairs, tmp_path / "two", *options, "--batch-size", "2"))
    output = two.communicate(timeout=300)
    assert two.returncode == 0, output
    assert apart(predicted(tmp_path / "two"), predicted(tmp_path / "one")) < 1e-3
    images = stage1_runs.draw_images(tmp_path / "images")
    words = [*stage1_runs.SMALL, "--images", str(images), "--out", str(tmp_path / "solved"), "--device", "cuda"]
    both = torchrun(29635, "training.denoise_images", *words)
    output = both.communicate(timeout=300)
    assert both.returncode == 0, output
    assert len(list((tmp_path / "solved").rglob("*.safetensors"))) == 6


def test_the_whole_method_and_a_distilled_vit(tmp_path):
    images = stage1_runs.draw_images(tmp_path / "images")
    words = ["--images", str(images), "--model", "vit_tiny_patch16_224", "--no-pretrained", "--device", "cuda"]
    small = ["--input-size", "64", "--views", "8", "--steps", "12"]
    for more in ((), ("--no-pairs",)):
        out = tmp_path / "-".join(("made", *more))
        assert make_denoiser.main([*words, *small, "--out", str(out), *more]) == 0
        model = timm.create_model(f"local-dir:{out}", pretrained=True).eval().to(GPU)
        with torch.no_grad():
            assert model.forward_features(torch.rand(1, 3, 64, 64, device=GPU)).isfinite().all()
        assert (out / "page.html").exists()
    student = ["--model", f"local-dir:{out}", "--images", str(images), "--out", str(tmp_path / "student")]
    assert distill.main([*student, "--steps", "4", "--batch-size", "2", "--device", "cuda"]) == 0
    assert not hasattr(timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True), "denoiser")


@pytest.mark.parametrize("method", ["static", "project"])
def test_calibration_finds_what_it_finds_on_the_cpu(method):
    models = {}
    for device in ("cpu", GPU):
        models[device] = vit()
        plant(models[device])
        timm_dvt.calibrate(models[device].to(device), photographs(8), method=method, views=64, tolerance=0)
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        wanted, found = (model.forward_features(images.to(device)) for device, model in models.items())
    assert apart(found, wanted) < 1e-3
    assert models[GPU].denoiser.calibration.error == pytest.approx(models["cpu"].denoiser.calibration.error, rel=1e-2)


@pytest.mark.parametrize(
    "task, dataset, number",
    [
        ("position", "ade20k", "share"),
        ("knn-seg", "voc", "mIoU"),
        ("linear-seg", "voc", "mIoU"),
        ("depth", "nyu", "delta1"),
        ("discovery", "voc", "CorLoc/voc2007"),
        ("detection", "voc", "mAP"),
        ("attentive-probe", "imagefolder", "top1"),
    ],
)
def test_tasks_give_what_they_give_on_the_cpu(task, dataset, number, tmp_path, tmp_path_factory):
    model = small_datasets.saved_model(tmp_path / "model", ARGS)
    data = small_datasets.written([dataset], tmp_path_factory.mktemp, train=24, val=12)[dataset]
    words = [task, "--dataset", dataset, "--data", str(data), "--model", model]
    told = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        assert evaluate([*words, "--out", str(out), "--device", device, "--set", *QUICK]) == 0
        (result,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
        told[device] = [result["states"][state][number]["mean"] for state in ("raw", "denoised")]
    assert np.isfinite(told["cuda"]).all()
    if task in ("position", "knn-seg", "discovery"):  # nothing is trained
        np.testing.assert_allclose(told["cuda"], told["cpu"], atol=1.0)


def test_commands_take_the_gpu_by_themselves(tmp_path):
    images = stage1_runs.draw_images(tmp_path / "images")
    command = [sys.executable, "-m", "timm_dvt", "calibrate", "--model", "vit_tiny_patch16_224", "--no-pretrained"]
    told = subprocess.run(
        [*command, "--images", str(images), "--views", "32", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert "on cuda" in told.stdout + told.stderr


@pytest.mark.parametrize("options", [["--both", "--class-token"], ["--keep-aspect", "--autocast"]])
def test_extract_writes_what_it_writes_on_the_cpu(options, tmp_path):
    images = write_pictures(tmp_path / "images", 40)
    model = ["--model", f"local-dir:{denoised_folder(tmp_path / 'model')}", *options]
    for device in ("cpu", "cuda"):
        assert plug_in(["extract", str(images), *model, "--device", device, "--out", str(tmp_path / device)]) == 0
    wanted, found = (timm_dvt.open_features(tmp_path / device) for device in ("cpu", "cuda"))
    assert list(found) == list(wanted)
    for name in wanted:
        assert apart(*(torch.from_numpy(one[name]) for one in (found, wanted))) < 3e-2
