"""timm_dvt.inspect: a model's planted artifacts are found and named, the model stays, and mistakes are told."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_dvt
from tests.timm_dvt.test_calibration import photographs
from tests.timm_dvt.test_families import randomized, smallest
from timm_dvt.__main__ import main
from timm_dvt.errors import UnsupportedModelError, UserError
from timm_dvt.families import examples
from timm_dvt.inspection import InspectionError, inspect
from timm_dvt.inspection.findings import findings
from timm_dvt.inspection.page import page
from timm_dvt.inspection.reader import layer_reader
from timm_dvt.layouts import layout_of

FEW = dict(views=64)


def vit(name: str = "vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{"depth": 2, "img_size": 96, "embed_dim": 32, "num_heads": 2, **kwargs}).eval()


def of_position_alone(strength: float):
    """Tokens are the patch's colors, embedded, plus the position embedding: blocks add 0, and there is no norm."""
    model = vit()
    for block in model.blocks:
        nn.init.normal_(block.norm1.weight)  # as of a trained model
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    model.norm = nn.Identity()
    nn.init.normal_(model.pos_embed, std=strength)
    nn.init.normal_(model.patch_embed.proj.weight, std=0.05)
    return model


@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_a_planted_embeddings_share_of_a_model_is_found_within_two_errors_at_every_layer(strength):
    model, seen = of_position_alone(strength), []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 1:].double()))
    found = inspect(model, photographs(8), **FEW)
    embedding = model.pos_embed.detach()[0, 1:].double()
    planted = float((embedding - embedding.mean(0)).square().sum(1).mean())
    views = torch.cat([batch for batch in seen if len(batch) == 8][1:])  # the first was timed
    within = float((views - views.mean(1, keepdim=True)).square().sum(2).mean())
    assert len(views) == 64 == found.views and len(found.layers) == 3
    for layer in found.layers:
        assert abs(layer.share.value - planted / within) < 2 * layer.share.error < 0.2
        assert layer.flat.share.value == pytest.approx(1, abs=1e-5)  # a plain color shows nothing else
        assert layer.flat.pattern.value == pytest.approx(planted / within, rel=0.02)
        assert layer.flat.alike.value > 0.8
    assert any(finding.kind == "position" for finding in found.findings)


def test_a_model_without_position_embedding_shows_chance():
    model = vit(pos_embed="none")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    found = inspect(model, photographs(16), views=128)
    for layer in found.layers:
        assert layer.share.is_chance or layer.share.value < 0.01
        assert max(layer.row.value, layer.column.value) < 0.1 and layer.flat.pattern.value < 1e-6
    assert [finding.kind for finding in found.findings] == ["nothing", "nothing"] and found.trained


class Louder(nn.Module):
    """An identity that makes tokens of some places ten times as long."""

    def __init__(self, places: list[int]) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, self.places] *= 10
        return x


def test_planted_outlier_tokens_of_a_model_are_counted_exactly_where_they_are():
    model = of_position_alone(0.5)
    nn.init.zeros_(model.patch_embed.proj.weight)
    model.blocks[1] = nn.Sequential(model.blocks[1], Louder([1, 8]))  # the first patch, and the second row's first
    found = inspect(model, photographs(4), **FEW)
    first, last, features = found.layers
    assert first.outliers.count == 0 and last.outliers.count == features.outliers.count == 2 * 64
    assert last.outliers.place.value > 0.99 and last.outliers.ratio == pytest.approx(10, rel=0.5)
    (words,) = (finding.text for finding in found.findings if finding.kind == "outliers")
    assert "5.6 ± 0.0% of the patches" in words and "registers" in words and "Their place explains" in words


def test_what_is_read_is_what_timm_gives_and_the_model_stays_as_it_was():
    model = timm_dvt.add_denoiser(vit("vit_base_patch16_siglip_gap_224"), layers=[0, -1]).train()
    for parameter in model.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    before, images = copy.deepcopy(model), torch.randn(3, 3, 96, 96)
    found = inspect(model, photographs(4), **FEW)
    names = ["block 0", "block 0, denoised", "block 1", "features", "features, denoised"]
    assert [layer.name for layer in found.layers] == names and model.training and model.denoise
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    model.eval()
    maps = layer_reader(model, None, 2)(images)
    with torch.no_grad():
        on = model.forward_intermediates(images, intermediates_only=True)
        with model.denoising(False):
            off = model.forward_intermediates(images, intermediates_only=True)
            features = model.fc_norm(model.forward_features(images)).unflatten(1, (6, 6))
    for name, want in zip(names, (off[0], on[0], off[1], None, on[1])):
        torch.testing.assert_close(maps[name], features if want is None else want.permute(0, 2, 3, 1))


def test_what_is_said_agrees_with_the_numbers_beside_it():
    report = inspect(timm_dvt.add_denoiser(of_position_alone(0.5), arch="static"), photographs(4), **FEW)
    share = report.layer().share
    nothing = replace(share, value=0.0, error=0.1, chance=0.1)

    def said(denoised):
        hidden = [replace(layer, row=nothing, column=nothing) for layer in report.layers]
        layers = [replace(layer, share=denoised) if layer.denoised else layer for layer in hidden]
        return [finding.text for finding in findings(replace(report, layers=layers))]

    # Little is left behind the denoiser, and the last block is no earlier one: of both nothing is to be advised.
    left = replace(share, value=0.005, error=0.001, chance=0.01)
    assert "nothing for a denoiser to remove from the final features" in said(denoised=left)[0]
    assert "earlier blocks" not in said(denoised=left)[0]
    # 5% that two errors reach down to nothing from are not nothing.
    unsure = replace(share, value=0.05, error=0.03, chance=0.01)
    assert "do not tell the features' 5.0 ± 3.0% from nothing: inspect more" in said(denoised=unsure)[0]
    # Norms beyond the histogram's valley that are near the usual ones are in the sentence as in the table.
    outliers = replace(report.layer().outliers, count=9, ratio=1.4, share=replace(share, value=0.113, error=0.037))
    layers = [replace(layer, outliers=outliers) for layer in report.layers]
    (words,) = (found.text for found in findings(replace(report, layers=layers)) if "utlier" in found.text)
    assert "No outlier tokens" in words and "11.3 ± 3.7% lie beyond a valley, at 1.40 times the usual norm" in words
    # Nor do two errors that reach down to nothing make outliers, nor those of a first block a model without registers.
    plenty = replace(outliers, ratio=4.0, robust_share=outliers.share)
    for one, kinds in ((replace(plenty, share=replace(share, value=0.05, error=0.03)), []), (plenty, ["note"])):
        layers = [replace(layer, outliers=one) if layer.name == "block 0" else layer for layer in report.layers]
        told = [found for found in findings(replace(report, layers=layers)) if "utlier tokens" in found.text]
        said_of_them = [found for found in told if "Outlier tokens" in found.text]
        assert [found.kind for found in said_of_them] == kinds
        assert kinds or "at 4.00 times the usual norm; these images do not tell so many from chance" in told[0].text
        assert all("registers" not in found.text for found in said_of_them)


def test_a_place_that_is_read_without_a_miss_is_read_whatever_few_images_tell_of_chance():
    report = inspect(of_position_alone(0.5), photographs(4), **FEW)
    little = replace(report.layer().share, value=0.001, error=0.0001, chance=0.01)
    for value, said in ((1.0, "So a place can be read"), (0.5, "nothing for a denoiser to remove")):
        read = replace(little, value=value, error=1e-5, chance=1.0)
        layers = [replace(layer, share=little, row=read, column=read) for layer in report.layers]
        assert any(said in found.text for found in findings(replace(report, layers=layers)))


def test_a_denoiser_that_takes_off_three_quarters_leaves_a_sixteenth_of_the_pattern_and_one_that_adds_is_named():
    model = timm_dvt.add_denoiser(of_position_alone(0.5), arch="static")
    embedding = model.pos_embed.detach()[:, 1:]
    for times, ratio in ((-0.75, 1 / 16), (1.0, 4.0)):
        model.denoiser.pos_embed.data = times * embedding
        found = inspect(model, photographs(4), blocks=[], **FEW)
        off, on = found.layer(), found.layer(denoised=True)
        for kind in ("flat", "noise"):
            patterns = (getattr(layer, kind).pattern.value for layer in (on, off))
            assert np.divide(*patterns) == pytest.approx(ratio, rel=0.02)
        assert (times > 0) == any("denoiser makes the pattern 2.0 times stronger" in one.text for one in found.findings)


def test_a_trial_calibrates_a_copy_and_judges_it_by_other_images():
    model = of_position_alone(1.0)
    found = inspect(model, photographs(8), blocks=[], try_calibration=True, **FEW)
    assert found.trial.method == "static" and found.trial.before.value > 0.3 > 0.05 > found.trial.after.value
    assert type(model) is timm.models.VisionTransformer
    assert any("Tried at once" in finding.text for finding in found.findings)


def test_images_may_be_left_out_and_models_of_other_channels_see_blank_ones():
    found = inspect(of_position_alone(0.5), **FEW)
    assert found.parts and found.images == 8 and "two photographs" in found.findings[-1].text
    found = inspect(vit(in_chans=5), **FEW)
    assert found.images == 0 and not found.parts and found.layer().share.error >= 0
    json.dumps(found.to_dict(), allow_nan=False)


def test_random_weights_are_told():
    found = inspect(vit(), photographs(4), blocks=[-1], views=32)
    assert not found.trained and [finding.kind for finding in found.findings] == ["random weights"]


BAD = {
    "no ViT": (lambda: inspect(timm.create_model("test_resnet")), "A ResNet cannot be inspected"),
    "one image": (lambda: inspect(vit(), photographs(1)), "images holds 1 image. What"),
    "duplicates": (
        lambda: inspect(vit(), photographs(1) * 30),
        "30 images, and only 1 of them shows what no other does",
    ),
    "few of many": (
        lambda: inspect(vit(), photographs(1) * 30, views=32),
        "of images 4 were looked at, as each takes 8 of the views, and only 1 of them shows",
    ),
    "one color": (
        lambda: inspect(vit(), [torch.full((3, 96, 96), gray / 9) for gray in range(9)]),
        "9 images, and only 0 of them show what",
    ),
    "block": (lambda: inspect(vit(), blocks=[2]), "blocks is .2.; this model has those from -2 to 1"),
    "views": (lambda: inspect(vit(), views=8), "views is 8"),
    "channels": (lambda: inspect(vit(in_chans=1), photographs(4)), "1 channels; leave images out"),
    "trial": (lambda: inspect(vit(), photographs(4), try_calibration=True), "takes 8"),
    "no file": (lambda: inspect(vit(), "none.png"), "none.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_in_a_line(case):
    call, message = BAD[case]
    with pytest.raises(UserError, match=message):
        call()


def test_frames_of_one_video_are_told(caplog):
    inspect(vit(), photographs(8), blocks=[-1], views=64)
    assert not caplog.text
    scene, *others = photographs(9)
    inspect(vit(), [Image.blend(scene, other, 0.4) for other in others], blocks=[-1], views=64)
    assert "the images look alike" in caplog.text


# ---- the command


class Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_the_command_prints_what_it_means_and_writes_a_page_that_needs_nothing_else(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(photographs(8)):
        image.save(tmp_path / "photos" / f"{i}.png")
    out = tmp_path / "a" / "report"
    words = ["inspect", "--model", "test_vit", "--no-pretrained", "--images", str(tmp_path / "photos"), "--views", "32"]
    assert main([*words, "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "64 forward passes at" in printed.err and "These weights are random" in printed.out
    assert sorted(path.name for path in out.iterdir()) == ["inspection.html", "inspection.json"]
    page = Parts()
    page.feed((out / "inspection.html").read_text(encoding="utf-8"))
    assert page.tags.count("svg") >= 3 and page.tags.count("img") >= 8
    assert all(address.startswith("data:image/") for address in page.addresses)
    facts = json.loads((out / "inspection.json").read_text())
    assert facts["layers"][-1]["name"] == "features" and {"value", "error", "chance"} == {*facts["layers"][0]["share"]}
    assert main([*words, "--blocks=0,-1", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["layers"][0]["share"] == facts["layers"][0]["share"] and len(again["layers"]) == 3


def test_the_command_says_what_cannot_be(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    cases = {
        ("--model", "test_resnet"): "A ResNet cannot be inspected",
        ("--model", "test_vit", "--images", str(tmp_path)): "images holds 1 image",
        ("--model", "test_vit", "--device", "gpu"): "device must be one that torch has here, got 'gpu'",
        ("--model", "test_vti"): "did you mean test_vit",
    }
    for words, message in cases.items():
        assert main(["inspect", "--no-pretrained", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.sweep
def test_importing_the_package_does_not_enter_the_room():
    code = "import sys, timm_dvt; assert not any('inspection' in m for m in sys.modules); timm_dvt.inspect"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.sweep
def test_every_class_that_can_have_a_denoiser_can_be_inspected():
    kinds = set()
    for name, sketch in examples():
        try:
            layout_of(sketch)
        except UnsupportedModelError:
            with pytest.raises(InspectionError, match="cannot be inspected"):
                layer_reader(sketch, None, 1)
            continue
        model = randomized(name, smallest(name))
        found = inspect(model, photographs(4), views=32)
        assert len(found.layers) == layout_of(model).maps + 1, name
        assert len(page(found)) > 10_000 and found.trained
        kinds.add(type(model).__name__)
    assert len(kinds) > 20
