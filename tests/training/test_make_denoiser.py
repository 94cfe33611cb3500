"""Claims about make_denoiser: one command, from images to a folder that loads, killed or not, with pairs or without."""

import json
import os
import random
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

import timm_dvt  # noqa: F401
from tests.helpers.processes import in_two, kill_at_random_moments, same, start
from training import distill, make_denoiser
from training.common.hub_images import fetch_images
from training.evaluate.before_after import worse
from training.figures.page import Picture, Section, Table, Text, page
from training.stage1 import images as stage1_images

MODEL = ("--model", "test_vit", "--no-pretrained")
SMALL = ("--input-size", "64", "--views", "8", "--steps", "12", "--device", "cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight images of a few soft blobs."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        small = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((120, 100), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def command(images, out, *more):
    return ["training.make_denoiser", "--images", str(images), "--out", str(out), *MODEL, *SMALL, *more]


def run(images, out, *more):
    return make_denoiser.main(command(images, out, *more)[1:])


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    assert run(images, out) == 0
    return out


def test_the_folder_loads_and_its_denoiser_can_be_switched(made):
    model = timm.create_model(f"local-dir:{made}", pretrained=True).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        on = model.forward_features(x)
        model.set_denoise(False)
        off = model.forward_features(x)
    torch.manual_seed(0)
    plain = timm.create_model("test_vit", dynamic_img_size=True).eval()
    plain.set_input_size(img_size=(64, 64))
    with torch.no_grad():
        assert torch.equal(off, plain.forward_features(x)) and not torch.equal(on, off)
    assert model.denoiser.flat_below is not None  # calibration keeps what training gave


def test_what_the_denoiser_leaves_of_position_is_taken_off_unless_it_shall_stay(images, made, tmp_path):
    assert run(images, tmp_path / "out", "--no-leftover") == 0
    as_trained, taken_off = (load_file(out / "model.safetensors") for out in (tmp_path / "out", made))
    assert set(taken_off) - set(as_trained) == {"denoiser.pos_embed_out"}
    assert taken_off["denoiser.pos_embed_out"].abs().sum() > 0
    assert same({k: v for k, v in taken_off.items() if k in as_trained}, as_trained)


@pytest.mark.slow
def test_two_processes_make_the_denoiser_of_one(images, made, tmp_path):
    codes, said = in_two(29651, *command(images, tmp_path / "out"))
    assert codes == [0, 0], said
    together, alone = (load_file(out / "model.safetensors") for out in (tmp_path / "out", made))
    assert set(together) == set(alone)
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert (tmp_path / "out" / "page.html").exists()


def test_card_and_page_say_what_came_of_it(made):
    card = (made / "README.md").read_text()
    html = (made / "page.html").read_text()
    few = "Measured on 2 images that were held out. So few tell little"
    for text in (
        "position",
        "pattern in images of one color",
        "forward passes",
        "timm.create_model",
        "better the nearer they are to 0",
        few,
    ):
        assert text in card and text in html
    last = json.loads((made / "log.jsonl").read_text().splitlines()[-1])
    assert f"validation: {last['val_loss_raw']:.3g} of raw tokens, {last['val_loss']:.3g} of what it pred" in card
    numbers = re.search(r"position explains, % \| (\S+) \| (\S+) \|", card)
    assert numbers and all(float(number) == float(number) for number in numbers.groups())
    assert "A denoiser of test_vit.r160_in1k with random weights" in html
    assert "a gray image" in html and html.count("<img") == 3  # and the two that are held out
    assert "http" not in re.sub(r'src="data:[^"]*"', "", html)
    seen = {json.loads(line)["image"] for line in (made / "pairs" / "index.jsonl").read_text().splitlines()}
    assert len(seen) == 6  # two of the eight are held out


def test_an_out_below_the_images_is_continued_and_its_pictures_are_no_images(images, tmp_path):
    """Nor are those of a run into another folder there."""
    where = shutil.copytree(images, tmp_path / "images")
    assert run(where, where / "mine", "--steps", "20") == 0
    assert list((where / "mine" / "pictures").glob("*.png"))
    before = contents(where / "mine")
    assert run(where, where / "mine", "--steps", "20") == 0
    assert {path: data for path, data in contents(where / "mine").items() if path in before} == before
    assert run(where, where / "other", "--steps", "20") == 0
    assert same(*(load_file(where / out / "model.safetensors") for out in ("mine", "other")))


def test_an_image_counts_once_and_names_of_any_bytes_are_shown(images, tmp_path, capsys):
    where = tmp_path / "images"
    where.mkdir()
    for number in range(5):
        for name in (b"caf\xe9%d.png" % number, b"caf\xe9%d (1).png" % number):
            shutil.copyfile(images / f"{number}.png", where / os.fsdecode(name))
    assert run(where, tmp_path / "out") == 0
    assert r"left out caf\xe90.png: the same image as" in capsys.readouterr().err
    seen = {json.loads(line)["image"] for line in (tmp_path / "out" / "pairs" / "index.jsonl").read_text().splitlines()}
    assert len(seen) == 3
    assert r"caf\xe9" in (tmp_path / "out" / "page.html").read_text()


@pytest.mark.parametrize("more, said", [((), "gives a pair"), (("--no-pairs",), "can be decomposed; the last: ")])
def test_where_no_image_gives_a_pair_it_is_said(more, said, images, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", dynamic_img_size=True)
    model.norm.weight.data *= 1e6  # beyond half precision
    timm.models.save_for_hf(model, tmp_path / "large", safe_serialization=True)
    where = ["--images", str(images), "--out", str(tmp_path / "out"), "--model", f"local-dir:{tmp_path / 'large'}"]
    assert make_denoiser.main([*where, *SMALL, *more]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"error: none of the \d images {said}", error) and "too large for half precision" in error


def test_what_is_worse_with_the_denoiser_on_is_named():
    off = {"share": 6.0, "zero": -0.1, "blank": 100.0}
    assert worse({"raw": off, "denoised": {"share": 2.0, "zero": 0.1, "blank": 100.0}}) == ""
    said = worse({"raw": off, "denoised": {"share": 2.0, "zero": -0.2, "blank": 130.0}})
    assert "blank image" in said and "images of one color" in said and "position explains" not in said


@pytest.mark.slow
def test_without_pairs_the_weights_are_the_same_and_nothing_is_left_but_them(images, made, tmp_path):
    assert run(images, tmp_path / "out", "--no-pairs") == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(made / "model.safetensors"))
    assert not (tmp_path / "out" / "pairs").exists()


def others(images, folder, count=8):
    """Other images under the same names."""
    folder.mkdir()
    for number in range(count):
        mirrored = ImageOps.mirror(Image.open(images / f"{number}.png"))
        mirrored.save(folder / f"{number}.png")
    return folder


def stopped_in_stage_1(monkeypatch, *arguments):
    """Run until four pairs are there."""
    solve, left = stage1_images.decompose, [5]

    def stop(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return solve(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stage1_images, "decompose", stop)
        assert run(*arguments) == 130


def contents(out):
    return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.sweep
@pytest.mark.parametrize("more", [("--limit", "6"), ()])
def test_after_a_stop_in_stage_1_other_images_give_what_they_give_in_a_new_folder(images, tmp_path, monkeypatch, more):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    stopped_in_stage_1(monkeypatch, images, out)
    now = others(images, tmp_path / "others")
    assert run(now, out, *more) == run(now, fresh, *more) == 0
    assert same(load_file(out / "model.safetensors"), load_file(fresh / "model.safetensors"))
    assert (out / "README.md").read_text().replace(str(out), str(fresh)) == (fresh / "README.md").read_text()
    assert run(images, out) == 2  # trained on others by now


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", "13"),
        *(pytest.param(o, marks=pytest.mark.slow) for o in (("--views", "9"), ("--target", "mean"), ("--seed", "1"))),
    ],
)
def test_other_settings_are_refused_before_anything_is_written(images, made, tmp_path, monkeypatch, capsys, options):
    before = contents(made)
    assert run(images, made, *options) == 2 and run(others(images, tmp_path / "others"), made) == 2
    assert "was begun with other settings" in capsys.readouterr().err and contents(made) == before
    stopped_in_stage_1(monkeypatch, images, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert run(images, tmp_path / "out", *options) == 2 and contents(tmp_path / "out") == before
    assert run(images, made) == 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), pytest.param(("--no-pairs",), marks=pytest.mark.sweep)])
def test_killed_at_random_moments_and_run_again_it_ends_as_if_it_was_not(images, made, tmp_path, more):
    random.seed(0)
    out = tmp_path / "out"
    assert kill_at_random_moments(lambda: start(*command(images, out, *more)), out, 3) >= 1
    process = start(*command(images, out, *more))
    process.communicate()
    assert process.returncode == 0
    assert same(load_file(out / "model.safetensors"), load_file(made / "model.safetensors"))


SMALL_MODEL = {"depth": 2, "embed_dim": 64, "num_heads": 1, "img_size": 64}
FAMILIES = {  # a class of each kind that is no VisionTransformer or Eva, and what makes it small
    "beit_base_patch16_224": SMALL_MODEL,  # takes other sizes, by another bias table
    "samvit_base_patch16": SMALL_MODEL,  # a map, of a neck
    "cait_xxs24_224": {"depth": 2, "img_size": 64},  # takes its own size alone
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("more", [(), pytest.param(("--no-pairs",), marks=pytest.mark.sweep)])
def test_every_class_of_backbone_goes_through_all_stages(images, tmp_path, name, more):
    timm.models.save_for_hf(timm.create_model(name, **FAMILIES[name]), tmp_path / "plain", model_args=FAMILIES[name])
    out, distilled = tmp_path / "out", tmp_path / "distilled"
    assert run(images, out, "--model", f"local-dir:{tmp_path / 'plain'}", "--pretrained", *more) == 0
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), model.denoising(False):
        assert torch.equal(model.forward_features(x), plain.forward_features(x))
    student = ("--model", f"local-dir:{out}", "--steps", "2", "--batch-size", "2", "--device", "cpu")
    assert distill.main(["--images", str(images), "--out", str(distilled), *student]) == 0
    assert type(timm.create_model(f"local-dir:{distilled}", pretrained=True)) is type(plain)


@pytest.mark.sweep
def test_a_class_takes_another_size_where_it_can(images, tmp_path):
    name = "beit_base_patch16_224"
    if not hasattr(timm.create_model(name, **SMALL_MODEL), "set_input_size"):
        pytest.skip(f"timm {timm.__version__} does not resize BEiT")
    timm.models.save_for_hf(timm.create_model(name, **SMALL_MODEL), tmp_path / "plain", model_args=SMALL_MODEL)
    model = ("--model", f"local-dir:{tmp_path / 'plain'}", "--pretrained", "--input-size", "96")
    assert run(images, tmp_path / "out", *model) == 0
    made = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert made.layout.grid == made.denoiser.grid_size == (6, 6)
    assert resolve_model_data_config(made)["input_size"] == (3, 96, 96)


@pytest.mark.sweep
def test_a_model_that_has_a_denoiser_gets_another_one_of_its_backbone(images, made, tmp_path):
    assert run(images, tmp_path / "again", "--model", f"local-dir:{made}", "--pretrained") == 0
    first, again = (load_file(out / "model.safetensors") for out in (made, tmp_path / "again"))
    backbone = {key for key in first if not key.startswith("denoiser.")}
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in backbone)
    configs = [json.loads((out / "config.json").read_text()) for out in (made, tmp_path / "again")]
    assert [config["model_args"]["backbone"] for config in configs] == ["test_vit.r160_in1k"] * 2


def test_a_model_that_can_have_no_denoiser_is_refused_before_its_first_forward_pass(images, tmp_path, capsys):
    assert run(images, tmp_path / "out", "--model", "resnet18") == 2
    assert "not to ResNet" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_it_says_what_it_will_cost_before_it_begins(images, tmp_path, capsys):
    assert run(images, tmp_path / "out", "--limit", "5") == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"stage 1: 3 images x 8 views = 24 forward passes at \S+ s, about \S+ minutes; stage 2: 12", said)
    (space,) = re.findall(r"; pairs: about (\S+) GB on disk$", said)
    lie = sum(file.stat().st_size for file in (tmp_path / "out" / "pairs").rglob("*.safetensors"))
    assert float(space) == pytest.approx(lie / 1e9, rel=0.1)


@pytest.mark.slow
def test_an_image_that_cannot_be_read_is_left_out(images, made, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(images.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "9.png").write_bytes(b"no image")
    for more in ((), ("--no-pairs",)):
        assert run(folder, tmp_path / f"out{len(more)}", *more) == 0


@pytest.mark.slow
def test_an_image_that_cannot_be_decomposed_is_left_out_with_pairs_and_without(images, tmp_path, caplog, capsys):
    folder = shutil.copytree(images, tmp_path / "images")
    Image.new("RGB", (1, 1)).save(folder / "0.png")  # all of its views are the same
    for more in ((), ("--no-pairs",)):
        assert run(folder, tmp_path / f"out{len(more)}", *more) == 0
    assert f"left out {folder / '0.png'}" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (("--input-size", "65"), "input_size must be a multiple of the patch size 16"),
        (("--model", "resnet18"), "A denoiser can be added to"),
        (("--images", "hf:/nowhere/at/all"), "hf:/nowhere/at/all cannot be read as a data set"),
    ],
)
def test_what_cannot_be_is_one_line_that_says_so(images, tmp_path, capsys, options, message):
    if "data set" in message:
        pytest.importorskip("datasets", reason="needs datasets, of the extra test")
    assert run(images, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_too_few_images_are_said_to_be_before_anything_is_done(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_denoiser, "load_backbone", None)
    (tmp_path / "list.txt").write_text("".join(f"{images}/{number}.png\n" for number in range(3)))
    assert run(tmp_path / "list.txt", tmp_path / "out") == 2
    assert "images must be 4 or more" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_images_of_a_data_set_are_streamed_as_they_are(images, tmp_path):
    pytest.importorskip("datasets", reason="needs datasets, of the extra test")
    found = fetch_images(f"hf:{images}", 3, tmp_path / "kept")
    kept = sorted(found.iterdir())
    assert [path.name for path in kept] == ["000000.png", "000001.png", "000002.png"]
    assert [path.read_bytes() for path in kept] == [(images / f"{n}.png").read_bytes() for n in range(3)]


def test_a_page_is_one_file_that_shows_its_words_as_they_are():
    table = Table(["x", "y"], [["<script>", "1"]])
    parts = [Text("a < b"), table, Picture(b"\x89PNG", 'a "cat"'), Text("c", code=True)]
    html = page("T & U", "lead", [Section("S", parts)]).decode()
    assert "a &lt; b" in html and "&lt;script&gt;" in html and "T &amp; U" in html and "a &quot;cat&quot;" in html
    assert "<script" not in html and 'src="data:image/png;base64,iVBORw==' in html
