"""The zoo: its list is timm's, what is there is not made again, and a push is dry unless told otherwise."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from PIL import Image
from timm.models import get_pretrained_cfg

from training import zoo
from training.common.models import check_backbone
from training.evaluate.before_after import license_of
from training.reproduction import jobs

IMAGENET, HALF, NONE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3,) * 2, ((0.0,) * 3, (1.0,) * 3)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# As the papers and the model cards of each family say: pixels, and mean and standard deviation.
FAMILIES = {
    "dinov2": ({518}, IMAGENET),
    "dinov3.": ({256}, IMAGENET),
    "eupe": ({256}, IMAGENET),
    "tipsv2": ({448}, NONE),
    "siglip": ({512}, HALF),
    "pe_spatial": ({512, 448}, HALF),
    "clip_": ({224, 336}, CLIP),
}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_each_model_of_the_list_is_timms_at_its_familys_size_and_normalization(name):
    assert name in timm.list_pretrained(f"{name.split('.')[0]}*")
    (family,) = (family for family in FAMILIES if family in name)
    sizes, normalization = FAMILIES[family]
    config = get_pretrained_cfg(name)
    assert config.input_size[1:] in {(size, size) for size in sizes}
    if name.endswith("clip_224.laion2b") and "large" in name:  # which alone of LAION's was trained so
        normalization = HALF
    assert (config.mean, config.std) == normalization
    assert config.license


def test_timm_lacks_what_the_list_leaves_out():
    assert not timm.list_pretrained("*franca*")
    assert len(set(zoo.MODELS)) == len(zoo.MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_each_model_of_the_list_can_have_a_denoiser(name):
    check_backbone(name)


@pytest.fixture
def made(monkeypatch):
    """Instead of being made, a denoiser's folder gets a card; a model called broken fails."""
    ran = []

    def run(command, stdout, stderr, **more):
        out = jobs.Path(command[command.index("--out") + 1])
        ran.append(command[2:])
        if "resnet" in str(out):
            stderr.write(b"error: no memory\n")
            return SimpleNamespace(returncode=1, stdout=b"")
        out.mkdir(parents=True)
        (out / "README.md").write_text("a card")
        return SimpleNamespace(returncode=0, stdout=b"")

    monkeypatch.setattr(jobs.subprocess, "run", run)
    return ran


def test_what_is_there_is_not_made_again_and_what_cannot_be_is_named(made, tmp_path, capsys):
    models = ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "resnet18"]
    words = ["--images", "photos", "--out", str(tmp_path), "--models", *models, "--make=--views 4"]
    assert zoo.main(words) == 1
    for command, name in zip(made, models[:2], strict=True):
        assert command[:7] == ["training.make_denoiser", "--model", name, "--images", "photos", "--views", "4"]
    said = capsys.readouterr().out
    assert "resnet18: " in said and "2 of 3 models" in said
    (tmp_path / models[1] / "README.md").unlink()
    (tmp_path / models[1]).rmdir()
    zoo.main(words)
    assert [command[2] for command in made] == [*models[:2], models[1]]


@pytest.mark.parametrize("more, dry", [([], True), (["--no-dry-run"], False)])
def test_a_push_is_dry_unless_told_otherwise_and_goes_on_where_one_fails(
    more, dry, made, tmp_path, monkeypatch, capsys
):
    pushed = []

    def push(folder, repo_id, dry_run):
        pushed.append((folder, repo_id, dry_run))
        if "deit" in folder:
            raise zoo.UserError("no such account")

    monkeypatch.setattr(zoo, "push", push)
    models = ["deit_tiny_patch16_224.fb_in1k", "vit_tiny_patch16_224.augreg_in21k"]
    words = ["--images", "photos", "--out", str(tmp_path), "--models", *models]
    assert zoo.main([*words, "--push", "me", *more]) == 1
    assert pushed == [(str(tmp_path / name), f"me/{name}_dvt", dry) for name in models]
    assert "no such account" in capsys.readouterr().err
    assert zoo.main([*words, "--push", "not an account"]) == 2


def test_a_card_says_the_license_of_the_backbones_weights():
    def model(license):
        return SimpleNamespace(pretrained_cfg={"license": license})

    assert license_of(model("apache-2.0")) == "license: apache-2.0\n"
    assert license_of(model("dinov3-license")) == "license: other\nlicense_name: dinov3-license\n"
    assert license_of(model(None)) == license_of(SimpleNamespace()) == ""


@pytest.mark.slow
def test_a_zoo_of_a_tiny_model_is_made_loads_and_is_pushed(tmp_path, account, capsys):
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((120, 100), Image.Resampling.BICUBIC).save(path)
    model = "vit_tiny_patch16_224.augreg_in21k"
    words = ["--images", str(tmp_path / "photos"), "--out", str(tmp_path / "zoo"), "--models", model]
    make = "--no-pretrained --input-size 64 --views 8 --steps 12 --device cpu"
    assert zoo.main([*words, "--make", make, "--push", "me"]) == 0
    assert f"me/{model}_dvt: would create the repo and commit model.safetensors" in capsys.readouterr().out
    out = tmp_path / "zoo" / model
    timm.create_model(f"local-dir:{out}", pretrained=True)
    assert (out / "page.html").is_file()
    assert json.loads((tmp_path / "zoo/jobs" / f"{model}.json").read_text())["command"][0] == "training.make_denoiser"
    assert zoo.main([*words, "--make", make, "--push", "me", "--no-dry-run"]) == 0
    card = (account.folder / "me" / f"{model}_dvt" / "README.md").read_text()
    assert "license: apache-2.0" in card and "library_name: timm-dvt" in card
    assert f'timm.create_model("hf-hub:me/{model}_dvt", pretrained=True)' in card and "local-dir:" not in card
