"""A denoiser is given what the trained final norm gives, wherever timm's pool puts that norm, and whoever loads it."""

import warnings

import numpy as np
import pytest
import timm
import torch
from timm.utils import CheckpointSaver

import timm_dvt
from timm_dvt.variants import DEFAULT_MODEL

SIZE = {"img_size": 112}


@pytest.fixture(scope="module")
def trained():
    return timm.create_model(DEFAULT_MODEL, pretrained=True, **SIZE).eval()


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory):
    """Of the whole model, and of its denoiser alone."""
    base = tmp_path_factory.mktemp("models")
    return {
        "whole": f"local-dir:{timm_dvt.save_pretrained(trained, base / 'whole')}",
        "denoiser": f"local-dir:{timm_dvt.save_pretrained(trained, base / 'denoiser', denoiser_only=True)}",
        "name": DEFAULT_MODEL,
    }


@pytest.mark.parametrize("source", ["name", "whole", "denoiser"])
@pytest.mark.parametrize("more", [{"global_pool": "avg"}, {"global_pool": "max", "num_classes": 10}])
@torch.no_grad()
def test_patches_are_the_same_whatever_is_pooled(source, more, trained, folders):
    """Where it is to have other classes, timm drops what the final norm learned, and puts a new one behind the pool."""
    model = timm.create_model(folders[source], pretrained=True, **SIZE, **more).eval()
    image = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.forward_features(image)[:, 1:], trained.forward_features(image)[:, 1:])
    with model.denoising(False), trained.denoising(False):
        assert torch.equal(model.fc_norm(model.forward_features(image)), trained.forward_features(image))


def test_a_model_with_a_new_norm_behind_its_pool_is_told(folders):
    plain = timm.create_model(
        DEFAULT_MODEL.removesuffix("_dvt"), pretrained=True, num_classes=10, global_pool="avg", **SIZE
    )
    with pytest.warns(UserWarning, match="a new norm behind its pool.*reset_classifier"):
        timm_dvt.load_denoiser(timm_dvt.add_denoiser(plain), folders["denoiser"])


def test_a_model_with_its_own_pool_is_not(tmp_path):
    small = {"depth": 1, "embed_dim": 64, "num_heads": 1}
    beit = timm_dvt.add_denoiser(timm.create_model("beit_base_patch16_224", **small))
    folder = timm_dvt.save_pretrained(beit, tmp_path, model_args=small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dvt.load_denoiser(timm_dvt.add_denoiser(timm.create_model("beit_base_patch16_224", **small)), folder)


def test_blocks_are_named_by_whatever_gives_whole_numbers():
    for layers in ((block for block in (0, 1)), np.array([0, 1]), [np.int64(0), -5]):
        assert list(timm_dvt.add_denoiser(timm.create_model("test_vit"), layers=layers).denoisers()) == [0, 1]


def test_a_head_that_is_left_out_is_told(tmp_path):
    model = timm.create_model(DEFAULT_MODEL, num_classes=3, **SIZE)
    with pytest.warns(UserWarning, match="no weights of the head of 3 classes"):
        timm_dvt.save_pretrained(model, tmp_path, denoiser_only=True)


def test_a_variant_with_another_denoiser_is_saved_as_what_it_is(tmp_path):
    """What the variant's own denoiser has and the other has not is not made again."""
    backbone = timm.create_model(DEFAULT_MODEL.removesuffix("_dvt"), dynamic_img_size=True, **SIZE)
    other = timm_dvt.save_pretrained(timm_dvt.add_denoiser(backbone), tmp_path / "other", denoiser_only=True)
    model = timm_dvt.load_denoiser(timm.create_model(DEFAULT_MODEL, **SIZE), f"local-dir:{other}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_dvt.save_pretrained(model, tmp_path / "saved")
    timm.create_model(f"local-dir:{tmp_path / 'saved'}").load_state_dict(model.state_dict())


def test_checkpoints_of_timms_training_are_read(tmp_path):
    model = timm_dvt.add_denoiser(timm.create_model("test_vit"))
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), None, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    again = timm_dvt.load_denoiser(timm_dvt.add_denoiser(timm.create_model("test_vit")), tmp_path / "last.pth.tar")
    assert all(torch.equal(again.denoiser.state_dict()[key], x) for key, x in model.denoiser.state_dict().items())


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: timm_dvt.add_denoiser(timm.create_model("test_vit"), layers="all"), "layers must be .* got 'all'"),
        (lambda: timm_dvt.add_denoiser(timm.create_model("test_vit"), layers=[0.5]), "layers must be"),
        (lambda: timm_dvt.add_denoiser(timm.create_model("test_vit"), num_heads=-3), "num_heads is -3"),
        (lambda: timm_dvt.add_denoiser(timm.create_model("test_vit"), grid_size=(4,)), "grid_size is"),
        (lambda: timm_dvt.add_denoiser(timm.create_model("test_vit"), pos_embed_out=(0, 2)), "pos_embed_out is"),
        (lambda: timm_dvt.load_denoiser(timm.create_model(DEFAULT_MODEL, **SIZE), {"a": 1}), "a dict: name a file"),
        (lambda: timm_dvt.add_denoiser(timm.create_model("test_vit"), layers=0.5), "layers must be"),
        (lambda: timm_dvt.register("test_vit.r160_in1k", suffix=""), "suffix is ''"),
        (lambda: timm_dvt.register("test_vit.r160_in1k", suffix=None), "suffix is None"),
        (lambda: timm_dvt.register("test_vit.r160_in1k", resolution="224"), "resolution is '224'"),
        (lambda: timm_dvt.register(None), "backbone is None"),
        (lambda: timm_dvt.freeze_backbone(timm.create_model(DEFAULT_MODEL, features_only=True)), "its .model"),
    ],
)
def test_arguments_that_cannot_be_are_one_line(call, said):
    with pytest.raises((ValueError, TypeError, timm_dvt.CheckpointError), match=said) as caught:
        call()
    assert len(str(caught.value)) < 500


def test_what_is_public_is_listed():
    assert {"inspect", "extract", "open_features", "calibrate", "add_denoiser"} <= set(dir(timm_dvt))
    assert all(hasattr(timm_dvt, name) for name in timm_dvt.__all__)
