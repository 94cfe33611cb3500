"""Evaluation of stage 1's own outputs: which maps, of which images, and what is said where there are none."""

import json

import pytest
import timm
import torch

import timm_dvt
from tests.helpers import small_datasets
from timm_dvt.image_files import Fingerprint, Source, read_file
from training import denoise_images
from training.evaluate.__main__ import main
from training.evaluate.data.datasets import open_dataset
from training.evaluate.features.extractor import Extractor
from training.evaluate.features.pairs import STATES, PairFeatures
from training.evaluate.position import mic
from training.evaluate.position import share as position
from training.evaluate.tasks import load_task
from training.pairs.folder import PairFolder
from training.report import main as report

WITH_G = tuple(state for state in STATES if state != "view-average")
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
def test_tab_5_from_two_commands(model, data, tmp_path, capsys, monkeypatch):
    pairs, out = tmp_path / "pairs", tmp_path / "out"
    for part in ("train", "val"):
        options = ["--images", str(data / part / "images"), "--out", str(pairs), "--input-size", "80", "--views", "9"]
        assert denoise_images.main(["--model", model, *options]) == 0
    words = ["--model", model, "--data", str(data), "--out", str(out), "--pairs", str(pairs)]
    words += ["--set", "query_size=16", "neighbors=3"]
    assert evaluate("knn-seg", *words) == 0
    header = capsys.readouterr().out.splitlines()
    assert any(line.split() == [*WITH_G, "difference"] for line in header)
    (result,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert result["images"] == {"train": 8, "val": 4}
    states = result["states"]
    assert len({states[state]["mIoU"]["mean"] for state in WITH_G}) > 2 and states["raw-G"] == states["F+residual"]
    assert evaluate("knn-seg", *words[:-5], *words[-3:]) == 0 and report([str(out)]) == 0
    rows = [line.split(" | ") for line in (out / "report.md").read_text().splitlines() if "measured" in line]
    assert [row[1] for row in rows] == ["raw", "denoised", *[state for state in STATES if state in states]]
    with monkeypatch.context() as patch:
        patch.setattr("training.evaluate.__main__.kinds_of", lambda dataset, where: ["masks", "boxes"])
        patch.setattr(load_task("linear-seg"), "KIND", "none")
        assert evaluate("all", *words) == 0  # what is of pairs
    assert evaluate("detection", *words[:-3]) == 2 and "--pairs is for knn-seg" in capsys.readouterr().err


def write(folder, files, grid=8, first=0, **settings):
    """Pairs of image files, of random maps; returns those of each file."""
    written = {}
    with PairFolder(folder, {"grid": grid, "channels": 64, "layers": [1], **settings}, "full") as pairs:
        for i, path in enumerate(files, first):
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
    wanted = {"raw": raw, "F": semantics, "F+residual": semantics + residual, "raw-G": raw - artifacts, "G": artifacts}
    wanted["mean"] = semantics + residual / 2
    assert features.states == WITH_G and set(wanted) == set(WITH_G)
    for state in WITH_G:
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
    write(tmp_path / "weights", [split.images[0]], weights="0" * 64, model="vit_x", pretrained=False, seed=7)
    with pytest.raises(ValueError, match="weights of 'vit_x', random ones of --seed 7, which are not those of --model"):
        PairFeatures(tmp_path / "weights", split, extractor)


def test_a_second_folder_solved_without_g_adds_the_view_average(model, data, tmp_path, capsys):
    images = open_dataset("stamps", data, "images")["val"].images
    write(tmp_path / "with", images)
    averages = write(tmp_path / "without", images, first=50, linear={"artifacts": False})
    out = tmp_path / "out"
    words = ["position", "--model", model, "--data", str(data), "--out", str(out), "--pairs", str(tmp_path / "with")]
    assert evaluate(*words, str(tmp_path / "without")) == 0
    assert any(line.split() == [*STATES, "difference"] for line in capsys.readouterr().out.splitlines())
    (result,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    maps = torch.stack([averages[path.name]["clean"] for path in images])
    want = 100 * position.position_share(maps)
    assert result["states"]["view-average"]["share"]["mean"] == pytest.approx(want, abs=1e-3)
    write(tmp_path / "fewer", images[:2], linear={"artifacts": False})
    assert evaluate(*words, str(tmp_path / "fewer")) == 2 and "of different images" in capsys.readouterr().err
    assert evaluate(*words, str(tmp_path / "with")) == 2 and "holds what a folder before it" in capsys.readouterr().err


@pytest.mark.parametrize("task, number", [("linear-seg", "mIoU"), ("mic", "mic"), ("position", "share")])
def test_each_task_of_pairs_has_all_rows(task, number, model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(mic, "position_mic", lambda maps: float(maps.std()))  # which takes seconds a map
    splits = open_dataset("stamps", data, "masks")
    write(tmp_path / "pairs", [*splits["train"].images, *splits["val"].images])
    words = [task, "--model", model, "--data", str(data), "--out", str(tmp_path / "out")]
    quick = {"linear-seg": ["steps=2", "label_size=8"], "mic": ["images=1", "shuffled=0"], "position": ["images=4"]}
    assert evaluate(*words, "--pairs", str(tmp_path / "pairs"), "--set", *quick[task]) == 0
    (result,) = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert all(number in result["states"][state] for state in WITH_G)
