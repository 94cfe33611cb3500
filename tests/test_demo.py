"""The command line: what it prints and draws, and how it says that something is wrong."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_dvt
from timm_dvt import colors, demo
from timm_dvt.__main__ import main
from timm_dvt.variants import published_variants


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small denoised model, as a folder that timm loads."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 96, "dynamic_img_size": True}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    return timm_dvt.save_pretrained(model, tmp_path_factory.mktemp("model"), model_args=arguments)


def test_the_demo_draws_both_states_of_the_packages_photograph(folder, tmp_path, capsys):
    out = tmp_path / "picture.png"
    assert main(["demo", "--model", f"local-dir:{folder}", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed and "denoiser off" in printed and " ms" in printed
    assert "112 x 80 pixels, 5 x 7 patch tokens of 192 channels" in printed
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png"]


def test_the_default_has_learned_weights_without_a_network(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "a.png")]) == 0
    printed = capsys.readouterr().out
    assert "vit_tiny_patch16_224.stamps_dvt" in printed and "random" not in printed
    assert main(["demo", "--no-pretrained", "--out", str(tmp_path / "b.png")]) == 0
    assert "random weights, as asked for" in capsys.readouterr().out


def test_weights_that_cannot_be_had_are_one_line_that_says_how_to_fetch_them(tmp_path, capsys):
    model = "vit_small_patch14_dinov2.lvd142m_dvt"
    assert main(["demo", "--model", model, "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"voc_denoised/{model.removesuffix('_dvt')}.pth" in error
    assert not (tmp_path / "a.png").exists()


def test_one_projection_is_numpys_svd_of_the_map_it_was_fitted_on():
    off, on = torch.randn(6, 8, 20), torch.randn(6, 8, 20) @ torch.diag(torch.linspace(3, 0.1, 20))
    projection = colors.fit_projection(on)
    rows = on.reshape(-1, 20).double().numpy()
    _, _, axes = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    agreement = np.abs((axes[:3] @ projection.axes.numpy()).diagonal())
    np.testing.assert_allclose(agreement, 1, atol=1e-6)
    assert projection.colors(off).shape == (6, 8, 3) and projection.colors(off).dtype == np.uint8


@torch.no_grad()
def test_the_features_shown_are_the_models(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _, pixels = demo.prepare(model, demo.read_image(None))
    off, on = demo.measure(model, pixels, rounds=1)
    assert torch.equal(on.features.flatten(0, 1), model.forward_features(pixels)[0, 1:])
    model.set_denoise(False)
    assert torch.equal(off.features.flatten(0, 1), model.forward_features(pixels)[0, 1:])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "I;16", "1"])
def test_any_kind_of_image_is_read_as_rgb(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    image.save(path)
    read = demo.read_image(str(path))
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
        "nowhere to write": ([*model, "--out", str(tmp_path / "a" / "b.png")], "cannot write"),
        "no picture's name": ([*model, "--out", str(tmp_path / "b.txt")], "cannot write"),
    }


@pytest.mark.parametrize("case", [
    "no such image", "a folder", "no image", "half an image", "unknown model", "a wrong tag", "no denoiser",
    "no such folder", "nowhere to write", "no picture's name",
])  # fmt: skip
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
