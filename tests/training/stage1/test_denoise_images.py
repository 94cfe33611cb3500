"""Claims about the command for many images: what a pair holds, what becomes of broken files, what is refused."""

import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.helpers.stage1_runs import contents, draw_images, read_lines, run
from timm_dvt.image_files import load_image
from timm_dvt.loading import load_model
from training import denoise_images
from training.pairs.folder import read_header, read_index, read_maps, read_pair, read_settings
from training.stage1 import images as stage1_images
from training.stage1.decompose import NonFiniteFeatures, Stage1Settings, decompose

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture()
def images(tmp_path):
    return draw_images(tmp_path / "images")


def test_a_pair_holds_what_the_library_function_gives(images, tmp_path):
    options = ["--layers", "2", "-1", "--seed", "3", "--precision", "full"]
    assert run(images / "c.png", tmp_path / "out", *options) == 0
    (entry,) = read_index(tmp_path / "out")
    header = read_header(tmp_path / "out" / entry.file)
    settings = Stage1Settings(views=24, seed=header["seed"], layers=(2, 5), input_size=64, crops=8)
    model = load_model("test_vit", pretrained=False, seed=3)
    wanted = decompose(model, load_image(images / "c.png"), settings)
    assert read_settings(tmp_path / "out")["layers"] == [2, 5]
    for layer in (2, 5):
        maps = read_pair(tmp_path / "out" / entry.file, layer, ("raw", "clean", "artifacts"))
        assert maps["raw"].shape == (4, 4, 64)
        torch.testing.assert_close(maps["raw"], wanted[layer].raw)
        torch.testing.assert_close(maps["clean"], wanted[layer].semantics)
        torch.testing.assert_close(maps["artifacts"], wanted[layer].artifacts)
        crops = [read_maps(tmp_path / "out" / entry.file, [layer], ("raw", "clean"), k) for k in range(1, 9)]
        torch.testing.assert_close(torch.stack([raw for (raw,), _ in crops]), wanted[layer].crop_raw)
        torch.testing.assert_close(torch.stack([clean for _, (clean,) in crops]), wanted[layer].crop_semantics)


def test_an_image_gets_the_same_pair_in_any_order_and_company(images, tmp_path):
    (tmp_path / "list.txt").write_text("images/c.png\nimages/b/1.png\n")
    assert run(tmp_path / "list.txt", tmp_path / "listed") == 0
    assert run(images, tmp_path / "all") == 0
    by_hash = {entry.sha256: entry for entry in read_index(tmp_path / "all")}
    assert len(by_hash) == 6
    seeds = {read_header(tmp_path / "all" / entry.file)["seed"] for entry in by_hash.values()}
    assert len(seeds) == 6
    for entry in read_index(tmp_path / "listed"):
        ours = read_pair(tmp_path / "listed" / entry.file)
        theirs = read_pair(tmp_path / "all" / by_hash[entry.sha256].file)
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)


def test_broken_images_are_reported_with_the_reason_and_the_rest_goes_on(images, tmp_path, capsys):
    whole = (images / "c.png").read_bytes()
    (images / "empty.png").touch()
    (images / "b" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.jpg").write_text("not an image at all")
    Image.new("RGB", (1, 1), "red").save(images / "one_pixel.png")
    Image.new("CMYK", (50, 40), (10, 200, 30, 0)).save(images / "cmyk.jpg")
    Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20).save(images / "gray16.png")
    assert run(images, tmp_path / "out") == 1
    failures = read_lines(tmp_path / "out" / "failures.jsonl")
    names = ["b/truncated.png", "empty.png", "one_pixel.png", "text.jpg"]
    assert [failure["image"] for failure in failures] == names
    for failure, word in zip(failures, ("truncated", "empty", "different crop", "not an image")):
        assert word in failure["reason"]
    assert len(read_index(tmp_path / "out")) == 8  # CMYK and 16-bit gray among them
    said = capsys.readouterr().err
    assert "4 of 12 images failed" in said and "text.jpg: not an image" in said

    (images / "text.jpg").write_bytes(whole)
    for name in names[:3]:
        (images / name).unlink()
    assert run(images, tmp_path / "out") == 0
    failures = read_lines(tmp_path / "out" / "failures.jsonl")
    assert [failure["image"] for failure in failures] == names[:3]  # repaired, text.jpg is none any more


def test_an_image_that_failed_is_not_computed_again_until_it_changes(images, tmp_path, monkeypatch):
    calls = []

    def fail(model, image, settings, **options):
        calls.append(settings.seed)
        raise NonFiniteFeatures("block 5 gave NaN")

    monkeypatch.setattr(stage1_images, "decompose", fail)
    assert run(images / "c.png", tmp_path / "out") == 1
    assert run(images / "c.png", tmp_path / "out") == 1
    assert len(calls) == 1
    (failure,) = read_lines(tmp_path / "out" / "failures.jsonl")
    assert failure["image"] == "c.png" and failure["reason"] == "block 5 gave NaN"


def test_a_backbone_that_gives_nan_is_reported_for_the_image(images, tmp_path, monkeypatch):
    model = load_model("test_vit", pretrained=False)
    with torch.no_grad():
        model.blocks[3].mlp.fc1.bias.fill_(torch.nan)
    monkeypatch.setattr(denoise_images, "load_model", lambda *args, **options: model)
    assert run(images, tmp_path / "out", "--limit", "2") == 1
    failures = read_lines(tmp_path / "out" / "failures.jsonl")
    assert [failure["image"] for failure in failures] == ["a/0.png", "a/1.png"]
    assert all("NaN" in failure["reason"] for failure in failures)


def test_what_the_solver_warns_of_is_said_once_with_the_image(images, tmp_path, capsys):
    assert run(images, tmp_path / "out", "--views", "5", "--limit", "3") == 0
    said = capsys.readouterr().err
    assert said.count("only 5 different crops") == 1 and "a/0.png: warning: only 5" in said


def test_each_kind_of_warning_is_said_once_whatever_its_numbers(images, tmp_path, capsys, monkeypatch):
    kinds = iter(
        [f"{count} {word}" for count, word in enumerate(("crops", "crops", "sizes", "sizes", "crops", "views"))]
    )

    def warning(*arguments, **options):
        warnings.warn(next(kinds), stacklevel=1)  # of one place in the code
        return decompose(*arguments, **options)

    monkeypatch.setattr(stage1_images, "decompose", warning)
    assert run(images, tmp_path / "out") == 0
    said = [line.split("warning: ")[1] for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert said == ["0 crops (said once)", "2 sizes (said once)", "5 views (said once)"]


def test_an_unforeseen_error_stops_the_run_and_names_the_image(images, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("the graphics card has gone")

    monkeypatch.setattr(stage1_images, "decompose", fail)
    with pytest.raises(RuntimeError, match="graphics card"):
        run(images, tmp_path / "out")
    assert "a/0.png: stopped at this image" in capsys.readouterr().err
    assert not (tmp_path / "out" / "failures.jsonl").exists()  # it is not the image's fault


def test_views_that_tell_nothing_fail_the_image_with_the_remedy(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one_pixel.png")
    assert run(tmp_path / "one_pixel.png", tmp_path / "out") == 1
    (failure,) = read_lines(tmp_path / "out" / "failures.jsonl")
    assert "use more views" in failure["reason"]


@pytest.mark.slow
def test_the_field_solver_is_run_with_its_steps(images, tmp_path):
    options = ["--solver", "field", "--field-steps", "20", "--limit", "1"]
    assert run(images, tmp_path / "out", *options) == 0
    settings = read_settings(tmp_path / "out")
    assert settings["field"]["steps"] == 20 and "linear" not in settings
    (entry,) = read_index(tmp_path / "out")
    assert read_pair(tmp_path / "out" / entry.file)["clean"].shape == (4, 4, 64)
    assert run(images, tmp_path / "out", *options[:3], "21", "--limit", "1") == 2


def test_another_setting_or_model_is_refused_and_named(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(images, out, "--limit", "1") == 0
    before = contents(out)
    for options, named in (
        (["--views", "25"], "views: the folder has 24, this run has 25"),
        (["--seed", "1"], "seed: the folder has 0, this run has 1"),
        (["--layers", "0", "5"], "layers: the folder has [5], this run has [0, 5]"),
        (["--model", "test_vit2"], 'model: the folder has "test_vit", this run has "test_vit2"'),
        (["--precision", "full"], 'precision: the folder has "half", this run has "full"'),
    ):
        assert run(images, out, *options) == 2
        assert named in capsys.readouterr().err
    assert contents(out) == before
    assert run(images, out, "--limit", "2", "--batch-size", "5") == 0  # these change no result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "/absent"], "/absent does not exist"),
        (["--model", "resnet18"], "A denoiser can be added to"),
        (["--model", "vit_of_nobody"], "vit_of_nobody"),
        (["--layers", "6"], "layers must be block indices from -6 to 5"),
        (["--input-size", "65"], "input_size must be a multiple of the patch size 16, got 65"),
        (["--area", "0.5", "0.1"], "area must be (smallest, largest) within (0, 1], got (0.5, 0.1)"),
        (["--crops", "50", "--views", "8"], "--crops must be below --views, 8, got 50"),
        (["--stride", "17"], "stride must be from 1 to the patch size 16, got 17"),
        (["--device", "cuda:99"], "device must be one that torch has here, got 'cuda:99'"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_before_any_work(images, tmp_path, capsys, options, message):
    assert run(images, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_can_come_from_a_folder(images, tmp_path):
    model = timm.create_model("test_vit", num_classes=0)
    folder = tmp_path / "model"
    timm.models.save_for_hf(model, folder, model_config={"num_classes": 0})
    options = ["--model", f"local-dir:{folder}", "--pretrained", "--limit", "1"]
    assert run(images, tmp_path / "out", *options) == 0
    (entry,) = read_index(tmp_path / "out")
    pixels = load_image(images / "a/0.png")
    header = read_header(tmp_path / "out" / entry.file)
    wanted = decompose(model.eval(), pixels, Stage1Settings(views=24, seed=header["seed"], input_size=64))
    torch.testing.assert_close(read_pair(tmp_path / "out" / entry.file)["raw"], wanted.raw.half())


def test_pairs_of_images_that_are_no_longer_given_are_counted(images, tmp_path, capsys):
    assert run(images, tmp_path / "out") == 0
    assert "more" not in capsys.readouterr().err
    (images / "c.png").write_bytes((images / "b" / "1.png").read_bytes())
    (images / "b" / "1.png").unlink()
    assert run(images, tmp_path / "out") == 0
    assert "holds 2 more pairs, of images that are not among these or were others then" in capsys.readouterr().err


def test_a_map_of_the_linear_solver_is_not_asked_of_the_field(images, tmp_path, capsys):
    assert run(images, tmp_path / "out", "--solver", "field", "--no-artifacts") == 2
    assert "--no-artifacts is of the linear solver" in capsys.readouterr().err
