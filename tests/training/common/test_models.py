"""Claims about backbones by name: random weights are seeded, checkpoints told apart, errors helpful."""

import pytest
import timm
import torch

from training.common.models import load_model, pick_device, weights_digest


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
    def offline(name, pretrained):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"(?s)no route to host.*local-dir:FOLDER.*--no-pretrained"):
        load_model("test_vit")
    with pytest.raises(ValueError, match="timm makes no model 'test_vit': no route"):
        load_model("test_vit", pretrained=False)


def test_devices_are_picked_by_name():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"got {wrong!r}"):
            pick_device(wrong)
