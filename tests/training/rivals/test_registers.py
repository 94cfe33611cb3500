"""Test-time registers on planted outliers: the neurons that write them are found, and write to the register instead."""

import json

import pytest
import timm
import torch
from torch import nn
from torchvision.utils import save_image

import timm_dvt
from tests.helpers import small_datasets
from tests.helpers.small_datasets import small_vit
from training.evaluate.features.extractor import Extractor
from training.rivals import registers
from training.rivals.__main__ import main

NEURONS = [(1, 7), (1, 12), (1, 30)]


@torch.no_grad()
def with_outliers(neurons=NEURONS, layer_scale=False):
    """A ViT whose blocks attend, and neurons in one of its blocks that make tokens long where a patch is white."""
    model = small_vit(depth=4, init_values=1.0 if layer_scale else None)
    model.pos_embed.mul_(10)
    model.pos_embed[..., 0] = 0
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            nn.init.normal_(layer.weight, std=0.15)
        block.attn.proj.weight[0] = block.mlp.fc2.weight[0] = 0  # the first channel tells how white a patch is
    model.patch_embed.proj.weight[0] = 8 / (3 * 16**2)
    for place, (block, neuron) in enumerate(NEURONS):
        mlp = model.blocks[block].mlp
        mlp.fc1.weight[neuron], mlp.fc1.bias[neuron] = (10 - 2 * place) * torch.eye(32)[0], -20.0
        mlp.fc2.weight[:, neuron] = (-1) ** place * torch.randn(32) if (block, neuron) in neurons else 0
        # Their neighbors say much, everywhere.
        mlp.fc1.weight[neuron + 1], mlp.fc1.bias[neuron + 1] = 0, 30.0
        mlp.fc2.weight[:, neuron + 1] = 0.06 * torch.randn(32)
    if layer_scale:  # the same function
        model.blocks[0].ls2.gamma /= 1000
        model.blocks[0].mlp.fc2.weight *= 1000
    return model


def squares():
    """Two dark images, each with two white patches, and which patches of 16 these are."""
    images, white = 0.1 * torch.rand(2, 3, 64, 64), torch.zeros(2, 4, 4, dtype=torch.bool)
    for image, y, x in ((0, 0, 1), (0, 2, 3), (1, 1, 1), (1, 3, 0)):
        images[image, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 1
        white[image, y, x] = True
    return images, white.flatten(1)


@torch.no_grad()
def after_blocks(model, images):
    """Tokens after the last block, before the final norm: of patches, and the last of the others."""
    model.norm = nn.Identity()
    tokens = model.forward_features(images)
    return tokens[:, model.num_prefix_tokens :], tokens[:, model.num_prefix_tokens - 1]


@pytest.mark.parametrize("layer_scale", [False, True])
def test_the_planted_neurons_are_found_and_no_other(layer_scale):
    model, (images, _) = with_outliers(layer_scale=layer_scale), squares()
    assert registers.register_neurons(model, [images[:1], images[1:]]) == NEURONS
    assert registers.register_neurons(with_outliers(NEURONS[1:]), [images]) == NEURONS[1:]  # the first writes nothing


def test_outliers_go_to_the_register_and_other_tokens_change_little():
    images, white = squares()
    before, model = after_blocks(with_outliers(), images)[0], with_outliers()
    registers.add_register(model, NEURONS)
    after, register = after_blocks(model, images)
    lengths, was = after.norm(dim=-1), before.norm(dim=-1)
    median = was[~white].median()
    assert was[white].min() > 6 * median and lengths[white].max() < 1.5 * median
    torch.testing.assert_close(register.norm(dim=-1), was.amax(1), rtol=0.1, atol=0)  # the register is the outlier now
    assert ((after - before)[~white].norm(dim=-1) < 0.15 * was[~white]).all()


@torch.no_grad()
def test_each_neuron_says_on_the_register_the_largest_that_it_says_on_any_token():
    hidden = torch.randn(2, 2 + 5, 6)
    shifted = registers.ShiftToRegister(nn.Identity(), [1, 4], prefix=2)(hidden)
    expected = hidden.clone()
    for image in range(2):
        for neuron in (1, 4):
            expected[image, 1, neuron] = max(hidden[image, :, neuron].tolist(), key=abs)
            expected[image, 2:, neuron] = 0
    assert torch.equal(shifted, expected)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}])
def test_a_register_without_neurons_is_one_more_token_of_zeros(more):
    """With attention that is given it, and with nobody's position embedding: the reference is timm's own model."""
    model, images = small_vit(**more), torch.randn(2, 3, 64, 64)
    reference = small_vit(reg_tokens=1, **more)
    prefix = model.num_prefix_tokens
    state = model.state_dict()
    if not more.get("no_embed_class"):
        rows = state["pos_embed"]
        state["pos_embed"] = torch.cat([rows[:, :prefix], torch.zeros(1, 1, 32), rows[:, prefix:]], 1)
    reference.load_state_dict({**state, "reg_token": torch.zeros(1, 1, 32)})
    registers.add_register(model, [])
    torch.testing.assert_close(model.forward_features(images), reference.forward_features(images))


@torch.no_grad()
def test_features_with_a_register_are_read_at_any_size_for_all_evaluations():
    model = small_vit(dynamic_img_size=True)
    registers.add_register(model, [(0, 3), (1, 5)])
    for size in (64, 96):
        images = torch.rand(2, 3, size, size)
        extractor = Extractor(model, size)
        tokens = model.forward_features((images - extractor.reader.mean) / extractor.reader.std)
        found = extractor.backbone(images)
        torch.testing.assert_close(found["raw"].flatten(1, 2), tokens[:, 2:], atol=1e-5, rtol=0)
        torch.testing.assert_close(found["prefix"], tokens[:, :2], atol=1e-5, rtol=0)
    assert extractor.states == ("raw",)


def test_registers_refuse_what_they_are_not_for():
    with pytest.raises(registers.NotForThisModel, match="trained with 4 registers"):
        registers.check(small_vit(reg_tokens=4))
    with pytest.raises(registers.NotForThisModel, match="ResNet"):
        registers.check(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(registers.NotForThisModel, match="3 times as long"):
        registers.register_neurons(small_vit(), [torch.randn(2, 3, 64, 64)])


@pytest.mark.slow
def test_the_row_of_registers_is_of_a_model_without_its_outliers(tmp_path, capsys):
    """Through the command; raw and registers are evaluated with and without the planted neurons."""
    arguments = {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    timm_dvt.save_pretrained(timm_dvt.add_denoiser(with_outliers()), tmp_path / "model", model_args=arguments)
    data = tmp_path / "data"
    small_datasets.folder(data, train=2, val=2)
    for path in data.glob("*/images/**/*.jpg"):
        save_image(squares()[0][0], path)
    out = tmp_path / "out"
    words = [
        "--model",
        f"local-dir:{tmp_path / 'model'}",
        "--images",
        str(data / "train" / "images"),
        "--out",
        str(out),
    ]
    words += ["--views", "32", "--rivals", "registers", "--tasks", f"position:folder:{data}"]
    assert main(words) == 0
    assert "registers: 3 neurons of blocks 1" in capsys.readouterr().out
    rows = json.loads((out / "rivals.json").read_text())["rows"]
    assert rows["registers"]["gains"]["position/folder/share"]["mean"] != 0
