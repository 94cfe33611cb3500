"""Calibration without training: planted artifacts are found, content stays, and the denoiser is one like any other."""

import json
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw

import timm_dvt
from timm_dvt.__main__ import main
from timm_dvt.calibration.calibrate import calibrate
from timm_dvt.calibration.samples import blank, canvas, sources
from timm_dvt.errors import CalibrationError
from timm_dvt.image_files import list_images

SMALL = {"depth": 2, "img_size": 96, "dynamic_img_size": True}


class Planted(torch.nn.Module):
    """A final norm that adds a map of our own to the patch tokens; larger at some images, if asked for."""

    def __init__(self, norm: torch.nn.Module, planted: torch.Tensor, prefix: int) -> None:
        super().__init__()
        self.norm, self.planted, self.prefix = norm, planted, prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :] + self.planted], 1)


def vit(name: str = "vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs}).eval()


def plant(model, rank: int | None = None, size: float = 1.0) -> torch.Tensor:
    """Add a random map (H*W, C), with zero mean over places, to a model's output; returns it."""
    places, dim = model.patch_embed.num_patches, model.embed_dim
    draw = torch.Generator().manual_seed(1)
    planted = torch.randn(places, rank or dim, generator=draw)
    if rank:
        planted = planted @ torch.linalg.qr(torch.randn(dim, rank, generator=draw))[0].T * (dim / rank) ** 0.5
    planted = size * (planted - planted.mean(0))
    model.norm = Planted(model.norm, planted, model.num_prefix_tokens)
    return planted


def photographs(count: int, side: int = 160) -> list[Image.Image]:
    """Images with things in them: smooth fields of color with edges, none like another."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = np.array(coarse.resize((side, side), Image.Resampling.BICUBIC))
        for _ in range(6):
            y, x = draw.integers(0, side - 40, 2)
            image[y : y + draw.integers(10, 40), x : x + draw.integers(10, 40)] = draw.integers(0, 256, 3)
        images.append(Image.fromarray(image))
    return images


def removed(model) -> torch.Tensor:
    """What the denoiser takes from the tokens of each place, (H*W, C)."""
    return -model.denoiser.pos_embed.detach()[0]


# ---- what is found


@pytest.mark.parametrize("images", [None, 16])
def test_a_planted_artifact_is_found_to_within_a_tenth(images):
    model, plain = vit(), vit()
    planted = plant(model)
    given = None if images is None else photographs(images)
    found = removed(calibrate(model, given)) - removed(calibrate(plain, given))
    assert (found - planted).norm() < 0.1 * planted.norm()
    facts = model.denoiser.calibration
    assert facts.error <= 0.1 and facts.views < 256  # it stopped because it knew enough
    assert facts.share_before > 0.3 and facts.share_after < 0.02


@torch.no_grad()
def test_of_a_class_whose_blocks_timm_does_not_norm_the_map_of_its_features_is_taken_off():
    torch.manual_seed(0)
    small = {"embed_dim": 32, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": 64}
    model = timm.create_model("hiera_tiny_224", **small).eval()
    tokens = [model.forward_features(blank(3, (64, 64), visit)[None])[0] for visit in range(32)]
    mean = torch.stack(tokens).mean(0)
    shrunk = 1 - calibrate(model, views=32, tolerance=0).denoiser.calibration.error ** 2  # as `Position` says
    torch.testing.assert_close(removed(model), shrunk * (mean - mean.mean(0)))


@pytest.mark.parametrize("images", [None, 16])
def test_project_takes_out_the_planted_directions_and_leaves_the_others_alone(images):
    model = vit()
    planted = plant(model, rank=3, size=2.0)
    calibrate(model, None if images is None else photographs(images), method="project")
    matrix = model.denoiser.blocks[0].weight.detach()
    facts = model.denoiser.calibration
    assert (planted @ matrix).norm() < 0.1 * planted.norm()
    torch.testing.assert_close(matrix @ matrix, matrix, atol=1e-5, rtol=0)
    assert facts.components == round(float((torch.eye(len(matrix)) - matrix).trace()))
    assert facts.components == 3 and facts.share_after < 0.1 * facts.share_before
    content = torch.randn(50, len(matrix))
    content -= content @ torch.linalg.pinv(planted, rtol=1e-4) @ planted
    assert (content @ matrix).square().sum() > 0.95 * content.square().sum()


def test_project_keeps_the_mean_token():
    model = calibrate(vit(), photographs(8), method="project", views=64)
    seen = []
    model.denoiser.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for image in photographs(8):
        pixels = torch.from_numpy(np.array(image.crop((0, 0, 96, 96)))).permute(2, 0, 1)[None] / 127.5 - 1
        model.forward_features(pixels)
    raw, projected = (torch.stack(one).mean((0, 1, 2)) for one in zip(*seen))
    assert (projected - raw).norm() < 0.1 * raw.norm()


# ---- a denoiser as any other


@pytest.mark.parametrize("method", ["static", "project"])
@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_gap_224"])
@torch.no_grad()
def test_calibrated_saved_loaded_toggled_and_bit_equal_when_off(name, method, tmp_path):
    patch = 14 if "patch14" in name else 16
    small = {"embed_dim": 48, "num_heads": 2} if "siglip" in name else {}
    model = vit(name, img_size=5 * patch, **small)
    images = torch.randn(2, 3, 4 * patch, 6 * patch)
    want = model.forward_features(images)
    maps = model.forward_intermediates(images, indices=1, intermediates_only=True, norm=True)[0]
    assert calibrate(model, photographs(4), method=method, views=32) is model
    assert model.denoiser.arch == method and not model.training
    on = model.forward_features(images)
    timm_dvt.save_pretrained(model, tmp_path, model_args={"depth": 2, **small})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again.forward_features(images), on) and (method == "project" or not torch.equal(on, want))
    for one in (model, again):
        one.set_denoise(False)
        assert torch.equal(one.forward_features(images), want)
        assert torch.equal(one.forward_intermediates(images, indices=1, intermediates_only=True, norm=True)[0], maps)


@pytest.mark.parametrize("method", ["static", "project", "leftover"])
@torch.no_grad()
def test_with_lengths_kept_tokens_point_as_without_and_are_as_long_as_raw_ones(method, tmp_path):
    model, images = vit(), torch.randn(2, 3, 96, 96)
    plant(model)
    raw = model.forward_features(images)[:, 1:]
    if method == "leftover":
        timm_dvt.add_denoiser(model, arch="static")
    clean = {}
    for keep in (False, True):
        given = photographs(4) if method == "leftover" else None
        calibrate(model, given, method=method, views=32, keep_length=keep)
        clean[keep] = model.forward_features(images)[:, 1:]
    assert (clean[False].norm(dim=-1) / raw.norm(dim=-1) - 1).abs().max() > 0.01
    torch.testing.assert_close(clean[True].norm(dim=-1), raw.norm(dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(torch.nn.functional.normalize(one, dim=-1) for one in clean.values()))
    model.norm = model.norm.norm  # without what was planted it is one that timm makes
    timm_dvt.save_pretrained(model, tmp_path, model_args={"depth": 2})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again.denoiser(raw, (6, 6)), model.denoiser(raw, (6, 6)))


def test_several_layers_have_a_map_each():
    model = calibrate(vit(), layers=[0, -1], views=32)
    assert sorted(model.denoisers()) == [0, 1]
    first, last = (model.denoisers()[block] for block in (0, 1))
    assert first.calibration.views == last.calibration.views == 32
    assert not torch.equal(first.pos_embed, last.pos_embed)


@torch.no_grad()
def test_a_denoiser_that_is_there_is_replaced_and_its_layers_are_kept():
    model = timm_dvt.add_denoiser(vit(), layers=[0])
    calibrate(model, views=32)
    assert list(model.denoisers()) == [0] and model.denoisers()[0].arch == "static"
    model.train()
    before = model.denoisers()[0].pos_embed.clone()
    calibrate(model, photographs(1), views=32)
    assert model.training and not torch.equal(model.denoisers()[0].pos_embed, before)


def test_the_same_call_gives_the_same_bits_and_the_model_can_be_pickled():
    first, second = (calibrate(vit(), photographs(4), views=32) for _ in range(2))
    assert torch.equal(removed(first), removed(second))
    assert pickle.loads(pickle.dumps(first)).denoiser.calibration == first.denoiser.calibration


def test_half_precision_models_stay_what_they_are():
    model = calibrate(vit().bfloat16(), views=32)
    assert model.denoiser.pos_embed.dtype == torch.bfloat16 and model.denoiser.pos_embed.isfinite().all()


# ---- images


def test_images_come_in_every_form(tmp_path):
    picture = photographs(1)[0]
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    (tmp_path / "deeper").mkdir()
    for name in ("a.png", "deeper/b.JPG", "notes.txt"):
        (picture.save if name[-3:] != "txt" else lambda path: path.write_text(""))(tmp_path / name)
    assert len(sources(tmp_path, 9)) == 2 and len(sources(str(tmp_path), 1)) == 1
    assert len(sources([tmp_path, picture, tensor, torch.stack([tensor] * 3)], 99)) == 7
    assert len(sources((picture for _ in iter(int, 1)), 5)) == 5  # an endless generator
    ways = (picture, tensor, tensor / 255, tmp_path / "a.png")
    cut = [canvas(one, (64, 96), 3) for one in ways]
    for one in cut:
        assert one.shape == (3, 64, 96) and (one - cut[0]).abs().mean() < 0.02


@pytest.mark.parametrize("kind", ["16 bits", "transparent", "turned"])
def test_an_opened_image_is_what_its_file_is(kind, tmp_path):
    file, pixels = tmp_path / "image.png", np.arange(64 * 96).reshape(64, 96)
    image, more = photographs(1)[0], {}
    if kind == "16 bits":
        image = Image.fromarray((pixels * 10).astype(np.uint16))
    elif kind == "transparent":
        image.putalpha(Image.fromarray((pixels % 256).astype(np.uint8)).resize(image.size))
    else:
        more = {"exif": image.getexif()}
        more["exif"][0x0112] = 6  # orientation: a quarter turn
    image.save(file, **more)
    assert torch.equal(canvas(Image.open(file), (64, 96), 3), canvas(file, (64, 96), 3))


@pytest.mark.parametrize(("shown", "gate", "levels"), [(8, True, True), (8, False, False), (0, True, False)])
@pytest.mark.parametrize("method", ["static", "project"])
def test_flat_patches_are_leveled_where_images_are_given_and_gates_are_wanted(shown, gate, levels, method):
    images = photographs(shown) if shown else None
    model = timm_dvt.calibrate(vit(), images, method=method, views=64, blank_gate=gate)
    std = np.mean(timm.data.resolve_model_data_config(model)["std"])
    below = model.denoiser.flat_below
    assert float(below) == pytest.approx(0.6 / 255 / std) if levels else below is None


def test_images_that_look_alike_are_told(caplog):
    draw = np.random.default_rng(1)
    scene = draw.uniform(0, 1, (3, 96, 96)).astype(np.float32)
    frames = [
        torch.from_numpy((scene + draw.normal(0, 0.02, scene.shape)).clip(0, 1).astype(np.float32)) for _ in range(8)
    ]
    smooth = [torch.nn.functional.avg_pool2d(frame, 31, 1, 15) for frame in frames]
    options = {"views": 64, "blank_gate": False}
    timm_dvt.calibrate(vit(), photographs(8), **options)
    timm_dvt.calibrate(vit(), smooth[:4], **{**options, "views": 32})  # too few to tell
    assert not caplog.text
    timm_dvt.calibrate(vit(), smooth, **options)
    assert "the images look alike" in caplog.text and "use images of many kinds" in caplog.text


def test_a_folder_is_walked_as_training_walks_it_and_broken_files_are_left_out_and_named(tmp_path, caplog, capsys):
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    good = ["a.png", "x.jpg/b.png", "linked/c.JPEG"]
    others = ["._a.png", ".ipynb_checkpoints/a.png", ".git/a.jpg"]
    for name in (*good, *others):
        path = (elsewhere if name.startswith("linked") else folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        photographs(1)[0].save(path)
    for name in ("paper.pdf", "data.h5", "film.mpg"):
        (folder / name).write_bytes(b"none of these is an image")
    (folder / "linked").symlink_to(elsewhere / "linked")
    (folder / "x.jpg" / "loop").symlink_to(folder)
    assert {str(path) for path in sources(folder, 99)} == {str(source.path) for source in list_images(folder)}
    assert {str(path.relative_to(folder)) for path in sources(folder, 99)} == set(good) and not caplog.text
    cut = (folder / "a.png").read_bytes()[:-300]
    for name, data in (("cut.png", cut), ("none.jpg", b"<html>404</html>"), ("empty.webp", b"")):
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.bmp")
    (folder / "gone.jpg").symlink_to("nowhere")
    for images in (
        folder,
        [*folder.glob("*.*g*"), folder / "x.jpg", *(folder / n for n in ("empty.webp", "pipe.bmp"))],
    ):
        caplog.clear()
        assert len(sources(images, 99)) >= 3
        assert all(f"left out {folder / name}: " in caplog.text for name in ("cut.png", "none.jpg", "empty.webp"))
        assert "pipe.bmp: not a file" in caplog.text and f"left out {folder / 'gone.jpg'}: " in caplog.text
    for path in folder.glob("*.*"):
        path.write_bytes(b"") if path.suffix == ".png" else None
    with pytest.raises(CalibrationError, match="no image that can be read"):
        sources([folder / "a.png", folder / "none.jpg"], 9)


def test_the_command_leaves_broken_files_out_and_names_them(tmp_path, caplog, capsys):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(photographs(4)):
        image.save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "0.jpg").write_bytes(b"no image")
    command = ["calibrate", "--model", "test_vit", "--no-pretrained", "--views", "32"]
    for images in ([tmp_path / "photos"], sorted((tmp_path / "photos").iterdir())):
        words = [*command, "--images", *map(str, images), "--out", str(tmp_path / f"out{len(images)}")]
        caplog.clear()
        assert main(words) == 0
        assert f"left out {tmp_path / 'photos' / '0.jpg'}: not an image" in caplog.text
        assert "of 4 images" in capsys.readouterr().out


def test_blank_images_are_normalized_and_none_like_another():
    images = torch.stack([blank(3, (32, 48), visit) for visit in range(40)])
    assert images[0].abs().max() == 0 and images.isfinite().all()
    assert 0.5 < images.std() < 1.2 and len(images.flatten(1).unique(dim=0)) == 40


BAD = {
    "method": (dict(method="mean"), "method is 'mean'; it must be one of static, project"),
    "views": (dict(views=3), "views is 3"),
    "no images": (dict(images=[]), "holds no image"),
    "not images": (dict(images=[3]), "holds a int"),
    "normalized": (dict(images=torch.randn(3, 64, 64)), "not normalized"),
    "gray": (dict(images=torch.rand(1, 64, 64)), "not an RGB image"),
    "no such file": (dict(images="none.png"), "none.png"),
}


@pytest.mark.parametrize("case", BAD)
@torch.no_grad()
def test_a_mistake_is_told_and_the_model_left_as_it_was(case):
    arguments, message = BAD[case]
    model, images = timm_dvt.add_denoiser(vit()), torch.randn(1, 3, 96, 96)
    want, denoiser = model.forward_features(images), model.denoiser
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, **arguments)
    assert model.denoiser is denoiser and torch.equal(model.forward_features(images), want)
    plain = vit()
    with pytest.raises(ValueError):
        calibrate(plain, **arguments)
    assert type(plain) is timm.models.VisionTransformer and not hasattr(plain, "denoiser")


def test_models_that_cannot_be_calibrated_are_refused():
    with pytest.raises(TypeError, match="not to ResNet"):
        calibrate(timm.create_model("test_resnet"))
    broken = vit()
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate(broken)
    with pytest.raises(CalibrationError, match="5 channels; use blank ones"):
        calibrate(vit(in_chans=5), photographs(1))
    assert calibrate(vit(in_chans=5), views=32).denoiser.calibration.images == 0
    pruned = timm_dvt.add_denoiser(vit())
    pruned.prune_intermediate_layers([0])
    with pytest.raises(CalibrationError, match="calibrate before pruning"):
        calibrate(pruned)


# ---- the command


@pytest.mark.parametrize("method", ["static", "project"])
def test_the_command_writes_a_folder_that_loads_and_a_picture(method, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(photographs(5)):
        image.save(tmp_path / "images" / f"{i}.png")
    out = tmp_path / "a" / "out"
    arguments = ["--images", str(tmp_path / "images"), "--method", method, "--views", "64", "--out", str(out)]
    assert main(["calibrate", "--model", "test_vit", "--no-pretrained", *arguments]) == 0
    printed = capsys.readouterr()
    looked_at = {"static": "from 64 views of 5 images;", "project": "from 64 views of 4 images and of blank ones;"}
    assert looked_at[method] in printed.out and "Position explains" in printed.out
    assert f"local-dir:{out}" in printed.out and "calibrate:" in printed.err  # the bar
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model.denoiser.arch == method
    assert json.loads((out / "calibration.json").read_text())["views"] == 64
    with Image.open(out / "before_after.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_as_json_nothing_else_is_printed(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", "test_vit", "--no-pretrained", "--out", str(out), "--views", "32", "--json", "--device", "cpu"]
    assert main(["calibrate", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"folder": str(out), **json.loads((out / "calibration.json").read_text())}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "before_after.png"])
def test_a_folder_of_somebody_else_is_left_alone_and_one_of_its_own_is_calibrated_anew(name, tmp_path, capsys):
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / name).write_text("precious")
    words = ["--model", "test_vit", "--no-pretrained", "--views", "32", "--out"]
    assert main(["calibrate", *words, str(theirs)]) == 2
    assert f"holds {name}, not written by calibrate" in capsys.readouterr().err
    assert (theirs / name).read_text() == "precious" and len(list(theirs.iterdir())) == 1
    if name == "config.json":
        assert (
            main(["calibrate", *words, str(tmp_path / "own")])
            == main(["calibrate", *words, str(tmp_path / "own")])
            == 0
        )


def test_without_images_the_picture_shows_the_packages_photographs(tmp_path, capsys, monkeypatch):
    words, text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **kw: words.append(a[2]) or text(*a, **kw))
    arguments = ["--model", "test_vit", "--no-pretrained", "--views", "32", "--out", str(tmp_path)]
    assert main(["calibrate", *arguments]) == 0
    facts = "32 views of blank and noise images; estimated error of the map"
    assert facts in capsys.readouterr().out and (tmp_path / "before_after.png").exists()
    assert facts in " ".join(words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_nothing"], "'vit_nothing' is not a model"),
        (["--model", "test_resnet", "--no-pretrained"], "not to ResNet"),
        (["--model", "test_vit", "--no-pretrained", "--images", "{}"], "no image in this folder"),
        (["--model", "test_vit", "--no-pretrained", "--images", "{}/no.png"], "no.png"),
        (["--model", "test_vit", "--no-pretrained", "--views", "2"], "views is 2"),
        (["--model", "test_vit", "--no-pretrained", "--blank-gate"], "name some by --images"),
        (["--model", "test_vit", "--no-pretrained", "--device", "meta"], "device must be one that torch has"),
        (["--model", "test_vit", "--no-pretrained", "--out", "setup.cfg"], "cannot write to setup.cfg"),
    ],
)
def test_a_mistake_at_the_command_line_is_one_line_with_a_remedy(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = [one.format(tmp_path / "empty") for one in arguments]
    assert main(["calibrate", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
