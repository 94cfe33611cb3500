"""Claims about stage 3: the result is a plain ViT nearer to the teacher, and a killed run loses nothing."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

import timm_dvt
from tests.helpers.processes import in_two, kill_at_random_moments, same, start, weights
from timm_dvt.image_files import list_images
from training import distill
from training.stage3.crops import CropReader
from training.stage3.student import Student

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = ("--batch-size", "2", "--lr", "1e-3", "--steps", "12", "--checkpoint-every", "3")


def save_teacher(folder, **kwargs):
    """A denoised model whose denoiser does much, as a folder."""
    torch.manual_seed(1)
    model = timm.create_model("test_vit", img_size=64, dynamic_img_size=True, num_classes=7, **kwargs)
    timm_dvt.add_denoiser(model)
    with torch.no_grad():
        model.denoiser.pos_embed.normal_()
    return timm_dvt.save_pretrained(model, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A teacher's folder and one of six images."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(6):
        coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")
    save_teacher(folder / "teacher")
    return folder


def arguments(data, out, *options: str) -> list[str]:
    return ["--model", f"local-dir:{data / 'teacher'}", "--images", str(data / "images"), "--out", str(out), *options]


def command(data, out, *options: str) -> list[str]:
    return ["training.distill", *arguments(data, out, *OPTIONS, *options)]


def run(data, out, *options: str) -> int:
    return distill.main(arguments(data, out, *OPTIONS, *options))


@pytest.fixture(scope="module")
def distilled(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled") / "out"
    assert run(data, out, "--steps", "60") == 0
    return out


@pytest.mark.slow
def test_the_result_is_a_plain_timm_model_that_loads_without_this_package(distilled, data):
    code = (
        "import sys, timm, torch\n"
        f"model = timm.create_model('local-dir:{distilled}', pretrained=True)\n"
        "assert type(model) is timm.models.VisionTransformer and model.num_classes == 7\n"
        "assert model.patch_embed.img_size == (64, 64) and model(torch.randn(1, 3, 64, 80)).shape == (1, 7)\n"
        "assert 'timm_dvt' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    teacher = timm.create_model(f"local-dir:{data / 'teacher'}")
    plain = {key: value.shape for key, value in teacher.state_dict().items() if not key.startswith("denoiser.")}
    assert {key: value.shape for key, value in weights(distilled).items()} == plain
    assert json.loads((distilled / "config.json").read_text())["architecture"] == "test_vit"


@torch.no_grad()
def test_the_student_is_nearer_to_the_teacher_than_the_backbone_and_its_head_is_the_old_one(distilled, data):
    teacher = timm.create_model(f"local-dir:{data / 'teacher'}", pretrained=True).eval()
    student = timm.create_model(f"local-dir:{distilled}", pretrained=True).eval()
    images = (torch.stack([distill_image(data, i) for i in range(6)]) - 0.5) / 0.5
    wanted = teacher.forward_features(images)
    with teacher.denoising(False):
        before = teacher.forward_features(images)
    assert (student.forward_features(images) - wanted).norm() < 0.95 * (before - wanted).norm()
    assert torch.equal(student.head.weight, teacher.head.weight)
    lines = [json.loads(line) for line in (distilled / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    assert last["val_loss"] < last["val_loss_backbone"] and list((distilled / "pictures").iterdir())


def distill_image(data, place: int) -> torch.Tensor:
    return CropReader(list_images(data / "images"), 64, 0).whole([place])[0]


def test_crops_depend_on_seed_and_place_in_the_run_alone(data):
    sources = list_images(data / "images")
    one, other = CropReader(sources, 32, seed=1), CropReader(sources, 32, seed=1)
    whole = one.random([0, 1, 2, 3], 10)
    assert torch.equal(torch.cat([other.random([2, 3], 12), other.random([0, 1], 10)]), whole[[2, 3, 0, 1]])
    assert not torch.equal(CropReader(sources, 32, seed=2).random([0, 1, 2, 3], 10), whole)
    assert not torch.equal(one.random([0, 1, 2, 3], 14), whole)


@pytest.mark.parametrize("arguments", [{"global_pool": "avg"}, {"class_token": False, "global_pool": "map"}])
@torch.no_grad()
def test_a_perfect_student_has_no_loss_however_the_model_pools(arguments, tmp_path):
    teacher = distill.load_teacher(f"local-dir:{save_teacher(tmp_path, **arguments)}", True, 0)
    teacher.denoiser.pos_embed.zero_()
    for block in teacher.denoiser.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight.zero_()
            last.bias.zero_()
    images = torch.randn(2, 3, 64, 64)
    wanted = teacher.forward_features(images)
    plain = timm.create_model("test_vit", img_size=64, num_classes=7, dynamic_img_size=True, **arguments).eval()
    plain.load_state_dict({k: v for k, v in teacher.state_dict().items() if not k.startswith("denoiser.")})
    assert Student(plain, teacher.norm_after_pool)(images, wanted) < 1e-4


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.sweep)])
def test_killed_at_random_moments_and_run_again_ends_with_the_same_weights(data, tmp_path, times):
    steps = ("--steps", "40")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert run(data, whole, *steps) == 0
    killed = kill_at_random_moments(lambda: start(*command(data, torn, *steps)), torn, times)
    assert killed
    assert run(data, torn, *steps) == 0
    assert same(weights(torn), weights(whole))


@pytest.mark.slow
def test_two_processes_at_half_the_batch_end_with_the_weights_of_one(data, tmp_path):
    assert run(data, tmp_path / "one") == 0
    codes, said = in_two(29621, *command(data, tmp_path / "two", "--batch-size", "1"))
    assert codes == [0, 0], said
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], both[name], atol=2e-4, rtol=1e-3)


def test_an_image_that_cannot_be_read_is_named_and_the_next_takes_its_place(data, tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((data / "images" / f"{i}.png").read_bytes() if i != 1 else b"no image")
    reader = CropReader(list_images(tmp_path), 32, 0)
    assert torch.equal(reader.whole([1]), reader.whole([2]))
    assert capsys.readouterr().err.count("1.png") == 1
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        CropReader(list_images(tmp_path), 32, 0).whole([0])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "test_vit", "--no-pretrained"), "--model test_vit has no denoiser"),
        (("--images", "nowhere"), "nowhere does not exist"),
        (("--input-size", "65"), "input_size must be a multiple of the patch size 16, got 65"),
        (("--warmup", "12"), "warmup must be from 0 to below the 12 steps"),
        (("--val-fraction", "-1"), "val_fraction must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message, data, tmp_path, capsys):
    assert run(data, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_a_diverging_loss_is_an_error_that_names_the_setting(data, tmp_path, capsys):
    assert run(data, tmp_path / "out", "--lr", "1e9", "--warmup", "6") == 1
    error = capsys.readouterr().err
    assert "diverged" in error or "not finite" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_is_not_continued_with_other_images_under_the_same_names(data, tmp_path, capsys):
    images = shutil.copytree(data / "images", tmp_path / "images")
    assert run(data, tmp_path / "out", "--images", str(images), "--steps", "2") == 0
    ImageOps.mirror(Image.open(images / "3.png")).save(images / "3.png")
    assert run(data, tmp_path / "out", "--images", str(images), "--steps", "2") == 2
    assert "images.digest: the folder has" in capsys.readouterr().err
