"""Evaluation of stage 1's own outputs: which maps, of which images, and what is said where there are none."""

import json

import pytest
import timm
import torch

import timm_dvt
from tests import small_datasets
from training import denoise_images
from training.common.images import Fingerprint, Source, read_file
from training.evaluate.__main__ import main
from training.evaluate.datasets import open_dataset
from training.evaluate.features import Extractor
from training.evaluate.pair_features import STATES, PairFeatures
from training.pairs.folder import PairFolder

ARGS = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vit = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **ARGS))
    timm_dvt.save_pretrained(vit, folder, model_args=ARGS)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    small_datasets.stamps(folder, train=8, val=4)
    return folder


def evaluate(*words: str) -> int:
    return main([*words, "--dataset", "stamps", "--device", "cpu"])


@pytest.mark.filterwarnings("ignore:only .* different crops", "ignore:no view shows", "ignore:F and G are hardly")
def test_tab_5_from_two_commands(model, data, tmp_path, capsys):
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    for part in ("train", "val"):
        options = ["--images", str(data / part / "images"), "--out", str(pairs), "--input-size", "64", "--views", "9"]
        assert denoise_images.main(["--model", model, *options]) == 0
    words = ["--model", model, "--data", str(data), "--out", str(out), "--pairs", str(pairs)]
    words += ["--set", "query_size=16", "neighbours=3"]
    assert evaluate("knn-seg", *words) == 0
    header = capsys.readouterr().out.splitlines()
    assert any(line.split() == [*STATES, "difference"] for line in header)
    (result,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert result["images"] == {"train": 8, "val": 4}
    assert len({result["states"][state]["mIoU"]["mean"] for state in STATES}) > 2
    assert evaluate("detection", *words[:-3]) == 2 and "--pairs is for knn-seg" in capsys.readouterr().err


def write(folder, files, grid=8):
    """Pairs of image files, of random maps; returns those of each file."""
    written = {}
    with PairFolder(folder, {"grid": grid, "channels": 64, "layers": [1]}, "full") as pairs:
        for i, path in enumerate(files):
            draw = torch.Generator().manual_seed(i)
            maps = {part: torch.randn(grid, grid, 64, generator=draw) for part in ("raw", "clean", "artifacts")}
            content = Fingerprint(read_file(path)[1].sha256, 0, 0)
            pairs.save(Source(path.name, path.parent), content, {1: maps}, {})
            written[path.name] = maps
    return written


def test_states_are_sums_of_the_maps_of_the_right_image(model, data, tmp_path):
    split = open_dataset("stamps", data, "masks")["train"]
    extractor = Extractor(timm.create_model(model, pretrained=True))
    written = write(tmp_path, [split.images[6], split.images[2]])
    features = PairFeatures(tmp_path, split, extractor)
    assert [path.name for path in features.split.images] == ["00002.png", "00006.png"]
    assert torch.equal(features.split.annotation(1), split.annotation(6))
    maps = written["00006.png"]
    raw, semantics, artifacts = (maps[part].double() for part in ("raw", "clean", "artifacts"))
    residual = raw - semantics - artifacts
    wanted = {"raw": raw, "F": semantics, "raw-G": semantics + residual, "G": artifacts}
    wanted["mean"] = semantics + residual / 2
    for state in STATES:
        torch.testing.assert_close(features.maps([1], state)[0].double(), wanted[state], atol=1e-5, rtol=0)


def test_pairs_that_do_not_fit_are_named(model, data, tmp_path):
    split = open_dataset("stamps", data, "masks")["val"]
    extractor = Extractor(timm.create_model(model, pretrained=True))
    with pytest.raises(ValueError, match="holds no pairs"):
        PairFeatures(tmp_path / "none", split, extractor)
    write(tmp_path / "other", [data / "train" / "images" / "00000.png"])
    with pytest.raises(ValueError, match="no pair of an image of stamps val: run training.denoise_images"):
        PairFeatures(tmp_path / "other", split, extractor)
    write(tmp_path / "size", [split.images[0]], grid=4)
    with pytest.raises(ValueError, match="4 x 4 patches and 64 channels, the model gives 8 x 8"):
        PairFeatures(tmp_path / "size", split, extractor)
