"""Folders and repos of ours in libraries that build on timm: the real transformers, segmentation_models_pytorch."""

import json
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import timm
import torch

import timm_dvt

SMALL = {"depth": 4, "img_size": 64, "embed_dim": 96, "num_heads": 3}


@pytest.fixture(
    scope="module",
    params=["vit_base_patch16_224.mae_dvt", "eva02_base_patch16_clip_224.merged2b_dvt", "vit_tiny_patch16_224"],
)
def folder(request, tmp_path_factory):
    """A saved variant of either class, and a model whose backbone has no variant."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, **SMALL, dynamic_img_size=True)
    if not isinstance(model, timm_dvt.Denoised):
        timm_dvt.add_denoiser(model)
    torch.nn.init.normal_(model.denoiser.pos_embed)
    return timm_dvt.save_pretrained(model, tmp_path_factory.mktemp("saved"), model_args=SMALL)


@torch.no_grad()
def test_transformers_gives_timms_tokens(folder, hub):
    transformers = pytest.importorskip("transformers")
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    tokens = ours.forward_features(images)
    repo = hub.folder / "someone" / "model"
    repo.mkdir(parents=True)
    for path in folder.iterdir():
        (repo / path.name).write_bytes(path.read_bytes())
    for source in (str(folder), "someone/model"):
        model = transformers.AutoModel.from_pretrained(source).eval()
        assert type(model).__name__ == "TimmWrapperModel" and isinstance(model.timm_model, timm_dvt.Denoised)
        assert torch.equal(model(images).last_hidden_state, tokens)
        hidden = model(images, output_hidden_states=True).hidden_states
        maps = ours.forward_intermediates(images)[1]
        assert all(torch.equal(a, b) for a, b in zip(hidden, maps, strict=True))
        model.timm_model.set_denoise(False)
        with ours.denoising(False):
            assert torch.equal(model(images).last_hidden_state, ours.forward_features(images))
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    config = timm.data.resolve_model_data_config(ours)
    assert tuple(processor.data_config["input_size"]) == tuple(config["input_size"])
    assert tuple(processor.data_config["mean"]) == tuple(config["mean"])


def test_transformers_saves_and_loads_it_again(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images).last_hidden_state, model(images).last_hidden_state)


@pytest.mark.slow
def test_without_importing_timm_dvt_transformers_says_that_it_does_not_know_the_architecture(tmp_path):
    pytest.importorskip("transformers")
    config = {"architecture": "denoised_vit", "pretrained_cfg": {}, "num_classes": 0, "num_features": 192}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"denoiser.pos_embed": torch.ones(1)}
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode and "is not supported in your version of timm" in run.stderr


@torch.no_grad()
def test_a_dpt_of_segmentation_models_takes_denoised_features(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smp = pytest.importorskip("segmentation_models_pytorch")
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    model = smp.DPT(f"tu-local-dir:{folder}", encoder_weights=True, classes=3).eval()
    features, prefixes = model.encoder(images)
    maps = ours.forward_intermediates(images, indices=4, intermediates_only=True)
    assert torch.equal(features[-1], maps[-1]) and model(images).shape == (1, 3, 64, 64)
    with ours.denoising(False):
        raw = ours.forward_intermediates(images, indices=4, intermediates_only=True)
    assert not torch.allclose(features[-1], raw[-1], atol=1e-2)
    assert prefixes[-1].shape == (1, 1, ours.embed_dim)


def test_a_dpt_of_segmentation_models_takes_a_variants_name():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.DPT("tu-vit_base_patch16_224.mae_dvt", encoder_weights=None, classes=2, img_size=64)
    assert isinstance(model.encoder.model, timm_dvt.Denoised)
