"""Frozen features: the states are the model's own, and the cache is whole, keyed and resumed."""

import numpy as np
import pytest
import timm
import torch

import timm_dvt
from tests.helpers import small_datasets
from timm_dvt.reading import LayerReader
from training.common.backbone import FeatureReader
from training.evaluate.data.datasets import open_dataset
from training.evaluate.detection import fast as detection
from training.evaluate.features.cached import SHARD, Features
from training.evaluate.features.extractor import Extractor
from training.evaluate.features.live import LiveFeatures
from training.evaluate.position.blank import token_reader
from training.evaluate.run import Run


def model(name="vit_tiny_patch16_224", **kwargs):
    torch.manual_seed(0)
    backbone = timm.create_model(name, img_size=64, depth=2, num_classes=0, **kwargs)
    return timm_dvt.add_denoiser(backbone).eval()


@pytest.fixture
def split(tmp_path):
    small_datasets.stamps(tmp_path / "stamps", train=SHARD + 6, val=2)
    return open_dataset("stamps", tmp_path / "stamps", "masks")["train"]


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_base_patch16_clip_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_states_are_the_models_own_in_one_pass(name):
    twin = model(name) if "patch16" in name else model(name, dynamic_img_size=True)
    size = 64 if "patch16" in name else 56
    images = torch.rand(2, 3, size, size)
    extractor = Extractor(twin, size)
    found = extractor.backbone(images)
    found["denoised"] = extractor.denoise(found["raw"], images)
    normed = (images - extractor.reader.mean) / extractor.reader.std
    twin.set_input_size(img_size=size)
    for state, on in (("denoised", True), ("raw", False)):
        with twin.denoising(on), torch.no_grad():
            tokens = twin.forward_features(normed)
        if twin.norm_after_pool and not on:
            tokens = twin.fc_norm(tokens)
        want = tokens[:, twin.num_prefix_tokens :]
        assert torch.allclose(found[state].flatten(1, 2), want, atol=1e-4), state
    if not twin.norm_after_pool:
        assert torch.allclose(found["prefix"], tokens[:, : twin.num_prefix_tokens], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("xcit_nano_12_p16_224", {"depth": 1}),
        ("volo_d1_224", {}),
        ("vitamin_small_224", {}),
        ("vit_small_r26_s32_224", {"depth": 1}),
        ("mixer_s32_224", {}),
    ],
)
def test_every_class_has_its_states_whatever_embeds_its_patches(name, few):
    twin = timm_dvt.add_denoiser(timm.create_model(name, num_classes=0, device="meta", **few))
    extractor = Extractor(twin)
    reader = extractor.reader
    assert reader.input_size == 224 and reader.patch * reader.grid == 224
    assert extractor.denoise(torch.empty(1, reader.grid, reader.grid, reader.channels), None).is_meta
    read = token_reader(extractor, (224, 224))  # of the pages that make_denoiser writes
    assert {len(tokens) for tokens in read(torch.rand(3, 224, 224)).values()} == {reader.grid**2}


def test_the_backbone_runs_once_over_an_image(split, tmp_path):
    extractor = Extractor(model())
    features = Features(extractor, split, tmp_path / "cache")
    features.extract()
    for key in features.keys.values():
        assert len(list((tmp_path / "cache" / key).glob("*.safetensors"))) == 2
    direct = extractor.backbone(features.images([3, SHARD + 1]))
    direct["denoised"] = extractor.denoise(direct["raw"], None)
    again = Features(extractor, split, tmp_path / "cache")
    extractor.backbone = extractor.denoise = None  # from here on only the cache can answer
    for state in ("raw", "denoised"):
        assert torch.allclose(again.maps([3, SHARD + 1], state), direct[state], atol=4e-3)  # half precision
    assert torch.allclose(again.class_tokens([3]), direct["prefix"][:1, 0], atol=4e-3)
    assert torch.equal(again.maps([5], "artifacts"), again.maps([5], "raw") - again.maps([5], "denoised"))


def test_a_killed_extraction_goes_on_with_the_missing_shard(split, tmp_path):
    extractor = Extractor(model())
    features = Features(extractor, split, tmp_path)
    features.extract()
    first, second = sorted((tmp_path / features.keys["raw"]).glob("*.safetensors"))
    kept, want = first.stat().st_mtime_ns, features.maps([SHARD], "raw")
    second.unlink()
    again = Features(extractor, split, tmp_path)
    again.extract()
    assert first.stat().st_mtime_ns == kept and torch.equal(again.maps([SHARD], "raw"), want)


@pytest.mark.parametrize("flat_gate", [True, False])
@pytest.mark.parametrize("filled_at", [1, 2])
def test_a_cache_that_another_process_fills_while_one_reads_changes_nothing(flat_gate, filled_at, split, tmp_path):
    twin = model()
    twin.denoiser.flat_below = torch.tensor(0.01) if flat_gate else None
    extractor, asked = Extractor(twin), []
    features, other = (Features(extractor, split, tmp_path) for _ in range(2))
    want = Features(extractor, split, None).class_tokens([1])
    missing = features._missing

    def then_filled(state):
        found = missing(state)
        asked.append(state)
        if len(asked) == filled_at:
            other.extract()
        return found

    features._missing = then_filled
    both = features.maps([1], "artifacts"), features.class_tokens([1])
    assert torch.allclose(both[0], Features(extractor, split, None).maps([1], "artifacts"), atol=4e-3)
    assert torch.allclose(both[1], want, atol=4e-3)


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_patches_without_texture_are_leveled_wherever_features_are_read_as_the_model_does_it(cached, tmp_path):
    torch.manual_seed(0)
    twin = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), flat_gate=True).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pixels[:, :48] = 77
    small_datasets.save(tmp_path / "val/images/0.png", pixels)
    split = open_dataset("folder", tmp_path, "images")["val"]
    extractor = Extractor(twin)
    normed = (split.image(0)[None] - extractor.reader.mean) / extractor.reader.std
    want = twin.forward_features(normed)[0, 1:]
    features = Features(extractor, split, tmp_path / "cache" if cached else None)
    features.extract()
    read = {
        "features": features.maps([0], "denoised")[0].flatten(0, 1),
        "live": LiveFeatures(extractor)(normed, "denoised")[0].flatten(1, 2)[0],
        "blank": token_reader(extractor, (64, 64))(split.image(0))["denoised"],
        "inspect": LayerReader(twin, twin.layout, [0], 1, (64, 64))(normed)["features, denoised"][0].flatten(0, 1),
    }
    for name, tokens in read.items():
        assert torch.allclose(tokens, want, atol=4e-3), name
    twin.denoiser.flat_below = None
    assert (twin.forward_features(normed)[0, 1:] - want).abs().max() > 0.05


def test_the_key_changes_with_everything_that_matters(split):
    def keys(twin, images=split, **options):
        return Features(Extractor(twin, **options), images, None).keys

    base = keys(model())
    assert keys(model()) == base
    other = model()
    other.denoiser.pos_embed.data += 1
    assert keys(other)["raw"] == base["raw"] and keys(other)["denoised"] != base["denoised"]
    other = model()
    other.norm.weight.data += 1
    changed = [keys(other), keys(model(), input_size=80), keys(model(), dtype="bfloat16")]
    changed.append(keys(model(), split.limit(5)))
    small_datasets.save(split.images[0], small_datasets.Scene(77).image)
    for found in (*changed, keys(model())):
        assert found["raw"] != base["raw"] and found["denoised"] != base["denoised"]


def test_another_denoiser_of_the_same_backbone_finds_its_features_done(split, tmp_path):
    Features(Extractor(model()), split, tmp_path).extract()
    other = model()
    other.denoiser.pos_embed.data += 1
    extractor = Extractor(other)
    extractor.backbone = None  # nothing may run it again
    features = Features(extractor, split, tmp_path)
    before_extract = features.maps([4], "denoised")
    features.extract()
    assert torch.equal(features.maps([4], "denoised"), before_extract)
    assert torch.equal(before_extract, extractor.denoise(features.maps([4], "raw"), None).half().float())


def test_a_full_disk_is_found_out_before_the_work(split, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ValueError, match="--cache off"):
        Features(Extractor(model()), split, tmp_path).extract()


@pytest.mark.parametrize("cached", ["raw", "denoised", "nothing"])
def test_maps_are_on_the_device_of_the_model_wherever_they_come_from(cached, split, tmp_path):
    extractor = Extractor(model())
    features = Features(extractor, split.limit(2), tmp_path / "cache")
    if cached == "raw":  # as left by an evaluation of the backbone alone
        features._extract("raw", tmp_path / "cache" / features.keys["raw"])
    elif cached == "denoised":
        features.extract()
    extractor.model.to("meta")  # any device that is not the CPU's
    extractor.reader = FeatureReader(extractor.model, input_size=64)
    features._half = lambda found, indices: found.half()  # which looks at values
    for state in ("raw", "denoised", "artifacts"):
        assert features.maps([0, 1], state).device.type == "meta", state
    assert features.class_tokens([1]).device.type == "meta"


@pytest.mark.parametrize("fixed_pe", ["both", "none"])
@pytest.mark.parametrize("embedding", ["sincos", "artifacts"])
def test_a_detector_gets_maps_and_positions_on_its_device(fixed_pe, embedding, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    class Stub(torch.nn.Module):
        def forward(self, maps, targets):
            assert {maps.device.type, *(x.device.type for target in targets for x in target.values())} == {"meta"}
            raise Stop

    small_datasets.stamps(tmp_path / "stamps", train=4, val=2)
    splits = open_dataset("stamps", tmp_path / "stamps", "boxes")
    extractor = Extractor(model())
    data = {part: Features(extractor, split, tmp_path / "cache") for part, split in splits.items()}
    monkeypatch.setattr(detection, "Detector", lambda *_: Stub())

    def first_loss(head, loss, *_):
        extractor.reader.device = torch.device("meta")
        loss([0, 1])

    monkeypatch.setattr(detection, "train", first_loss)
    settings = detection.Settings(fixed_pe=fixed_pe, embedding=embedding)
    with pytest.raises(Stop):
        detection.run(data, settings, Run("denoised", device=torch.device("meta")))
