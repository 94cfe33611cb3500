"""`calibrate` by "leftover": what a denoiser leaves of position is taken off behind it, and the denoiser stays."""

import copy

import pytest
import timm
import torch

import timm_dvt
from tests.timm_dvt.test_calibration import photographs, plant, vit
from timm_dvt.__main__ import main
from timm_dvt.calibration.calibrate import calibrate
from timm_dvt.errors import CalibrationError


def denoised(planted: torch.Tensor | None, keep_length: bool = False):
    """A small ViT with a denoiser that takes off half of a planted map."""
    model = vit()
    if planted is not None:
        assert torch.equal(plant(model), planted)
    timm_dvt.add_denoiser(model, arch="static", keep_length=keep_length)
    if planted is not None:
        model.denoiser.pos_embed.data.copy_(-planted / 2)
    return model.eval()


@pytest.mark.parametrize("keep_length", [False, True])
def test_what_a_denoiser_leaves_is_found_to_within_a_tenth(keep_length):
    planted = plant(vit())
    model, plain = denoised(planted, keep_length), denoised(None, keep_length)
    before = copy.deepcopy(model.denoiser.pos_embed)
    for one in (model, plain):
        calibrate(one, photographs(16), method="leftover")
    found = (plain.denoiser.pos_embed_out - model.denoiser.pos_embed_out)[0].detach()
    assert (found - planted / 2).norm() < 0.1 * (planted / 2).norm()
    assert torch.equal(model.denoiser.pos_embed, before) and model.denoiser.keep_length == keep_length
    facts = model.denoiser.calibration
    assert facts.method == "leftover" and facts.images == 16 and facts.share_after < facts.share_before / 5


def test_it_is_saved_and_found_anew_instead_of_added_up(tmp_path):
    model = denoised(plant(vit()))
    calibrate(model, photographs(16), method="leftover")
    first = model.denoiser.pos_embed_out.detach().clone()
    calibrate(model, photographs(16), method="leftover")
    assert torch.equal(model.denoiser.pos_embed_out, first)
    timm_dvt.save_pretrained(model, tmp_path)
    again = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2)
    timm_dvt.load_denoiser(timm_dvt.add_denoiser(again), tmp_path)
    assert torch.equal(again.denoiser.pos_embed_out, first)


@pytest.mark.parametrize("gated", [True, False])
def test_a_denoiser_without_a_gate_gets_one_for_blank_images(gated):
    """As authors' denoisers, trained on photographs, which make the pattern of plain colors stronger."""
    model = timm.create_model("vit_small_patch14_dinov2.focus", pretrained=True, img_size=112).eval()
    timm_dvt.add_denoiser(model, arch="static")
    torch.nn.init.normal_(model.denoiser.pos_embed)
    calibrate(model, "timm_dvt/assets", method="leftover", views=32, blank_gate=gated)
    gray = torch.zeros(1, 3, 112, 112)
    with torch.no_grad():
        spread = [model.forward_features(gray)[0, 1:].std(0).norm()]
        with model.denoising(False):
            spread.append(model.forward_features(gray)[0, 1:].std(0).norm())
    assert model.denoiser.calibration.views == 32
    assert (spread[0] < 0.01 * spread[1]) == gated == (model.denoiser.blank_gate is not None)
    assert gated == (model.denoiser.flat_below is not None)
    if gated:
        model.denoiser.flat_below.fill_(0.125)
        calibrate(model, "timm_dvt/assets", method="leftover", views=32)
        assert model.denoiser.flat_below == 0.125  # it keeps the gates that there are


def test_what_cannot_be_is_refused_and_leaves_the_denoiser_as_it_was(tmp_path):
    with pytest.raises(CalibrationError, match="this model has none; use static"):
        calibrate(vit(), method="leftover")
    model = denoised(None, keep_length=True)
    with pytest.raises(CalibrationError, match="takes those that have a denoiser"):
        calibrate(model, method="leftover", layers=[0])
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"bad\.png"):
        calibrate(model, [tmp_path / "bad.png"] * 4, method="leftover")
    assert model.denoiser.keep_length and model.denoiser.pos_embed_out is None


def test_the_command_improves_a_saved_denoiser(tmp_path, capsys):
    torch.manual_seed(0)
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2)).eval()
    timm_dvt.save_pretrained(model, tmp_path / "trained")
    for number, image in enumerate(photographs(4)):
        image.save(tmp_path / f"{number}.png")
    words = ["--model", f"local-dir:{tmp_path / 'trained'}", "--out", str(tmp_path / "out"), "--views", "32"]
    assert main(["calibrate", "--method", "leftover", *words, "--images", *map(str, tmp_path.glob("*.png"))]) == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert again.denoiser.pos_embed_out.abs().sum() > 0
    assert torch.equal(again.denoiser.blocks[0].attn.qkv.weight, model.denoiser.blocks[0].attn.qkv.weight)
    assert "Position explains" in capsys.readouterr().out
