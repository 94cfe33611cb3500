"""`calibrate` where it meets the rest: variants, saved folders, layers, channels, wrappers, torch's defaults."""

import json
from contextlib import nullcontext

import pytest
import timm
import torch

import timm_dvt
from tests.timm_dvt.test_calibration import photographs, vit
from timm_dvt.__main__ import main
from timm_dvt.attach import remove_denoiser
from timm_dvt.calibration.calibrate import calibrate
from timm_dvt.publish.cards import describe
from timm_dvt.reading import LayerReader

VARIANT = "vit_base_patch16_224.dino_dvt"
THIN = {"depth": 1, "embed_dim": 64, "num_heads": 1}
BLANK = ["--views", "32", "--no-pretrained"]


def saved(folder, **options):
    """A small denoised model as a folder, by the name that loads it."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 96, "dynamic_img_size": True, **options}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224.augreg_in21k", **arguments), layers=[0, -1])
    return f"local-dir:{timm_dvt.save_pretrained(model, folder, model_args=arguments)}"


@pytest.mark.parametrize("method", ["static", "project"])
@torch.no_grad()
def test_a_variant_calibrated_anew_keeps_its_backbones_name_and_its_folder_loads(method, tmp_path):
    model = timm.create_model(VARIANT, img_size=64, **THIN).eval()
    calibrate(model, views=32, method=method)
    assert model.backbone_name == "vit_base_patch16_224.dino"
    images = torch.randn(1, 3, 64, 64)
    folder = timm_dvt.save_pretrained(model, tmp_path, model_args=THIN)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again.forward_features(images), model.forward_features(images))
    assert again.backbone_name == "vit_base_patch16_224.dino"


def test_a_denoiser_removed_from_a_variant_leaves_timms_name_and_source_of_weights():
    plain = timm.create_model("vit_base_patch16_224.dino", depth=1)
    for name in (VARIANT, "vit_small_patch14_dinov2.focus_dvt"):
        model = remove_denoiser(timm.create_model(name, depth=1))
        architecture, tag = name.removesuffix("_dvt").split(".")
        assert (model.pretrained_cfg["architecture"], model.pretrained_cfg["tag"]) == (architecture, tag)
        assert "file" not in model.pretrained_cfg and model.default_cfg is model.pretrained_cfg
        if name == VARIANT:
            assert model.pretrained_cfg["hf_hub_id"] == plain.pretrained_cfg["hf_hub_id"]
        assert timm_dvt.add_denoiser(model).backbone_name == f"{architecture}.{tag}"


def test_the_command_calibrates_a_model_that_has_denoisers_and_tells_of_each(tmp_path, capsys):
    name = saved(tmp_path / "trained")
    assert main(["calibrate", "--model", name, "--views", "32", "--out", str(tmp_path / "out")]) == 0
    assert "block 0: the mean artifact map" in capsys.readouterr().out
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert list(again.denoisers()) == [0, 1] and again.backbone_name == "vit_tiny_patch16_224.augreg_in21k"
    assert set(json.loads((tmp_path / "out" / "calibration.json").read_text())["layers"]) == {"0", "1"}


@pytest.mark.parametrize("layers", ["0", "0,2"])
def test_the_command_takes_layers_and_refuses_those_that_are_not_there(layers, tmp_path, capsys):
    words = ["calibrate", "--model", "test_vit", *BLANK, "--out", str(tmp_path)]
    assert main([*words, "--layers", layers, "-1"]) == 0
    depth = len(timm.create_model("test_vit").blocks)
    denoisers = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).denoisers()
    assert list(denoisers) == [*map(int, layers.split(",")), depth - 1]
    capsys.readouterr()
    assert main([*words, "--layers", "99"]) == 2
    assert "layers must be" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["static", "project", "leftover"])
def test_a_variant_is_looked_at_at_the_size_that_it_is_meant_for(method, monkeypatch):
    model = timm.create_model(VARIANT, **THIN).eval()
    assert model.patch_embed.img_size == (224, 224)
    sizes = set()
    monkeypatch.setattr(LayerReader, "__call__", _recorded(LayerReader.__call__, sizes))
    calibrate(model, views=32, method=method)
    assert sizes == {(512, 512)}


def _recorded(function, sizes):
    def call(self, inputs):
        sizes.add(tuple(inputs.shape[-2:]))
        return function(self, inputs)

    return call


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "1 transformer block of"),
        ({"depth": 2}, "2 transformer blocks of"),
        ({"arch": "block-no-pe"}, "1 transformer block without position embedding of"),
        ({"arch": "conv1x1"}, "3 convolutions of 1 x 1 of"),
        ({"arch": "conv3x3"}, "3 convolutions of 3 x 3 of"),
        ({"arch": "static"}, "1 artifact map subtracted of"),
        ({"arch": "project"}, "1 linear map of each token of"),
        ({"layers": [0, -1]}, "for each of the blocks 0, 1, counted from 0, 1 transformer block, together of"),
        ({"layers": [0]}, "for each of the blocks 0, counted from 0, 1 transformer block, together of"),
    ],
)
def test_a_card_says_what_the_denoiser_is(options, words):
    assert describe(timm_dvt.add_denoiser(vit(), **options)).startswith(words)


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_are_calibrated_on_blank_images_and_refused_in_a_line_elsewhere(
    channels, tmp_path, capsys
):
    name = saved(tmp_path / "model", in_chans=channels)
    photographs(1)[0].save(tmp_path / "image.png")
    words = ["calibrate", "--model", name, "--out", str(tmp_path / "out"), "--views", "32"]
    assert main([*words, "--images", str(tmp_path / "image.png")]) == 2
    assert f"images of {channels} channels" in capsys.readouterr().err
    assert main(words) == 0 and not (tmp_path / "out" / "before_after.png").exists()
    timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert main(["demo", "--model", name, "--out", str(tmp_path / "panel.png")]) == 2


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, "peft"])
def test_a_wrapped_model_is_refused_with_the_way_to_the_one_inside(wrap):
    class Peft(torch.nn.Module):  # as PEFT's hands on what its base model has
        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

        def get_base_model(self):
            return self.base_model

    wrap = Peft if wrap == "peft" else wrap
    paths = {"OptimizedModule": r"\._orig_mod", "DataParallel": r"\.module", "Peft": r"\.get_base_model\(\)"}
    for model in (vit(), timm_dvt.add_denoiser(vit())):
        wrapped = wrap(model)
        remedy = f"give the one inside, its {paths[type(wrapped).__name__]}"
        calls = [timm_dvt.add_denoiser, remove_denoiser, calibrate, lambda m: calibrate(m, method="leftover")]
        if wrap is not torch.compile:  # through which weights are loaded
            calls.append(lambda m: timm_dvt.load_denoiser(m, "nowhere"))
        for call in (*calls, lambda m: timm_dvt.save_pretrained(m, "nowhere")):
            with pytest.raises(TypeError, match=remedy):
                call(wrapped)


def test_weights_are_loaded_through_torch_compile(tmp_path):
    trained = timm_dvt.add_denoiser(timm.create_model("test_vit"))
    timm_dvt.save_pretrained(trained, tmp_path)
    compiled = torch.compile(timm_dvt.add_denoiser(timm.create_model("test_vit")))
    assert timm_dvt.load_denoiser(compiled, tmp_path) is compiled
    assert torch.equal(compiled._orig_mod.denoiser.pos_embed, trained.denoiser.pos_embed)


def test_a_callers_default_dtype_and_device_change_no_extraction(tmp_path):
    photographs(1)[0].save(tmp_path / "a.png")

    def maps(out):
        folder = timm_dvt.extract(
            tmp_path / "a.png", "test_vit", tmp_path / out, size=32, pretrained=False, format="npy"
        )
        return timm_dvt.open_features(folder)["a.png"]

    want = maps("want")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert (maps("got") == want).all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_extraction_draws_no_random_numbers_of_its_callers(tmp_path):
    photographs(1)[0].save(tmp_path / "a.png")
    before = torch.get_rng_state()
    timm_dvt.extract(tmp_path / "a.png", "test_vit", tmp_path / "out", size=32, pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("command", ["calibrate", "inspect"])
@pytest.mark.parametrize("wrong", [["--model", "vit_tin_patch16_224"], ["--model", "test_vit", "--views", "8"]])
def test_what_is_wrong_at_sight_leaves_no_folder(command, wrong, tmp_path):
    with pytest.raises(SystemExit) if command == "inspect" and "--views" in wrong else nullcontext():
        assert main([command, *wrong, "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["static", "project"])
def test_a_callers_default_dtype_and_device_change_nothing(dtype, method):
    def small():
        return vit("test_vit", img_size=48)

    def found(models):
        with_images = calibrate(models[0], photographs(4), views=32, method=method)
        with_blanks = calibrate(models[1], views=32, method=method)
        denoisers = [with_images.denoiser, with_blanks.denoiser]
        return [tensor for denoiser in denoisers for tensor in denoiser.state_dict().values()]

    want, models = found([small(), small()]), [small(), small()]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            got = found(models)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
