"""Claims about backbones by name: random weights are seeded, checkpoints told apart, errors helpful."""

import importlib

import pytest
import timm
import torch
from PIL import Image

import timm_dvt
from timm_dvt import loading
from timm_dvt.loading import load_model, pick_device, weights_digest
from training.common.backbone import FeatureReader


def test_random_weights_are_the_same_for_the_same_seed():
    digests = [weights_digest(load_model("test_vit", pretrained=False, seed=seed)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_the_digest_tells_any_change_of_the_weights():
    model = load_model("test_vit", pretrained=False)
    seen = {weights_digest(model)}
    with torch.no_grad():
        model.norm.bias[3] = 1e-3
    seen.add(weights_digest(model))
    seen.add(weights_digest(model.to(torch.bfloat16)))
    assert len(seen) == 3


def test_the_model_is_ready_to_read_features():
    model = load_model("test_vit", pretrained=False)
    assert not model.training and next(model.parameters()).device.type == "cpu"


def test_weights_that_cannot_be_had_are_one_error_with_the_ways_out(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(loading, "fetch_backbone", offline)
    with pytest.raises(ValueError, match=r"(?s)no route to host.*local-dir:FOLDER.*--no-pretrained"):
        load_model("test_vit")
    with pytest.raises(ValueError, match="cannot create 'test_vit': OSError: no route to host$"):
        load_model("test_vit", pretrained=False)


def test_devices_are_picked_by_name():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("cuda:99", "gpu", "meta", "xla", "hpu", ""):
        with pytest.raises(ValueError, match=f"got {wrong!r}; cpu always works") as refused:
            pick_device(wrong)
        assert len(str(refused.value)) < 400


COMMANDS = {
    "denoise_images": ["--images", "{images}", "--out", "{out}"],
    "make_denoiser": ["--images", "{images}", "--out", "{out}"],
    "distill": ["--images", "{images}", "--out", "{out}"],
    "visualize": ["{images}/0.png", "--out", "{out}"],
    "evaluate.__main__": ["position", "--dataset", "folder", "--data", "{data}", "--out", "{out}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_is_refused_in_one_line(command, channels, tmp_path, capsys, monkeypatch):
    arguments = {"depth": 1, "img_size": 32, "in_chans": channels}
    model = timm_dvt.add_denoiser(timm.create_model("test_vit", **arguments))
    with pytest.raises(ValueError, match=f"takes images of {channels} channels"):
        FeatureReader(model)
    timm_dvt.save_pretrained(model, tmp_path / "model", model_args=arguments)
    (images := tmp_path / "data/val/images").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(images / f"{number}.png")
    words = [word.format(data=tmp_path / "data", images=images, out=tmp_path / "out") for word in COMMANDS[command]]
    main = importlib.import_module(f"training.{command}").main
    try:
        code = main(["--model", f"local-dir:{tmp_path / 'model'}", *words])
    except SystemExit as leaving:
        code = leaving.code
    error = capsys.readouterr().err
    assert code == 2 and f"the model takes images of {channels} channels" in error.splitlines()[-1], error
