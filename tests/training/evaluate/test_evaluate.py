"""Every task, end to end through the command line, on tiny datasets in their real layouts."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

import timm_dvt
from tests.helpers import processes, small_datasets
from training.evaluate.__main__ import main
from training.evaluate.data.datasets import DATASETS, open_dataset
from training.evaluate.detection import fast as detection
from training.evaluate.features.cached import Features
from training.evaluate.features.extractor import Extractor
from training.evaluate.results import read_rows
from training.evaluate.tasks import TASKS, load_task, tasks_of

ARGS = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 0}
QUICK = [
    "linear-seg.steps=80",
    "linear-seg.warmup=5",
    "linear-seg.label_size=16",
    "linear-seg.lr=0.01",
    "knn-seg.query_size=16",
    "knn-seg.neighbors=5",
    "mic.images=1",
    "mic.shuffled=1",
    "position.images=8",
    "blank.sizes=(64,)",
    "depth.steps=80",
    "depth.warmup=10",
    "depth.bins=32",
    "attentive-probe.epochs=10",
    "attentive-probe.batch_size=6",
    "attentive-probe.warmup=1",
    "detection.steps=4",
    "detection.batch_size=4",
    "detection.lr=0.002",
    "detection.warmup=1",
    "detection.width=16",
    "detection.hidden=32",
    "detection.proposals=32",
    "detection.candidates=50",
]
# task, dataset, number, what chance gives at most (for errors: at least). None: nothing to learn there.
RUNS = [
    ("mic", "voc", "mic", None),
    ("one-sided", "voc", "wrong", None),
    ("position", "ade20k", "share", None),
    ("blank", "voc", "ratio", None),
    ("knn-seg", "voc", "mIoU", 25.0),
    ("linear-seg", "voc", "mIoU", 25.0),
    ("knn-seg", "ade20k", "mIoU", 25.0),
    ("knn-seg", "camvid", "mIoU", 25.0),
    ("linear-seg", "folder", "mIoU", 25.0),
    ("depth", "nyu", "delta1", 60.0),
    ("depth", "folder", "delta1", 60.0),
    ("discovery", "voc", "CorLoc/voc2007", None),
    ("discovery", "coco", "CorLoc/coco20k", None),
    ("discovery", "folder", "CorLoc/folder", None),
    ("detection", "voc", "mAP", None),  # what it learns: test_evaluate_metrics.py
    ("detection", "coco", "mAP", None),
    ("attentive-probe", "imagefolder", "top1", 50.0),
    ("propagation", "davis", "J&F", 50.0),
    ("correspondence", "spair", "PCK/point", None),
    ("correspondence", "pfpascal", "PCK/image", None),
]
SLOW = {"mic"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small ViT of random weights with a denoiser, saved as a folder."""
    return small_datasets.saved_model(tmp_path_factory.mktemp("model"), ARGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of all datasets, by name."""
    return small_datasets.written(DATASETS, tmp_path_factory.mktemp, train=24, val=12)


def evaluate(task, dataset, model, data, out, *more):
    words = [task, "--dataset", dataset, "--data", str(data[dataset]), "--model", model, "--out", str(out)]
    assert main([*words, "--device", "cpu", "--set", *QUICK, *more]) == 0
    return {result["task"]: result for result in map(json.loads, (p.read_text() for p in out.glob("*.json")))}


def test_each_task_is_tested_on_a_dataset_that_has_what_it_needs():
    assert {task for task, *_ in RUNS} == set(TASKS)
    for task, dataset, *_ in RUNS:
        assert load_task(task).KIND in DATASETS[dataset].kinds


@pytest.mark.parametrize(
    "task, dataset, number, chance",
    [pytest.param(*run, marks=pytest.mark.slow) if run[0] in SLOW else run for run in RUNS],
)
def test_task_runs_raw_and_denoised_and_beats_chance(task, dataset, number, chance, model, data, tmp_path, capsys):
    result = evaluate(task, dataset, model, data, tmp_path)[task]
    raw, denoised = (result["states"][state][number]["mean"] for state in ("raw", "denoised"))
    assert result["difference"][number]["mean"] == pytest.approx(denoised - raw)
    if chance is not None:
        assert raw > chance and denoised > chance, (raw, denoised)
    header = capsys.readouterr().out.splitlines()[1].split()
    assert header[:2] == ["raw", "denoised"] and header[-1] == "difference"


@pytest.mark.slow
def test_all_runs_what_the_stamps_have_annotations_for(model, data, tmp_path):
    results = evaluate("all", "stamps", model, data, tmp_path, "--limit", "8")
    assert set(results) == {name for name in TASKS if load_task(name).KIND not in ("depth", "videos", "points")}
    assert set(results["mic"]["states"]) == {"raw", "denoised", "artifacts"}
    assert all(set(result["images"].values()) == {8} for result in results.values())


def test_repeats_give_a_spread_and_seeds_are_reproducible(model, data, tmp_path):
    first = evaluate("knn-seg", "stamps", model, data, tmp_path / "a", "--repeats", "3")["knn-seg"]
    again = evaluate("knn-seg", "stamps", model, data, tmp_path / "b", "--seed", "1")["knn-seg"]
    summary = first["states"]["raw"]["mIoU"]
    assert len(set(summary["values"])) > 1 and summary["std"] > 0
    assert again["states"]["raw"]["mIoU"]["values"] == [summary["values"][1]]


def test_raw_features_are_evaluated_once_for_all_denoisers_of_a_backbone(model, data, tmp_path):
    other = timm.create_model(model, pretrained=True)
    other.denoiser.pos_embed.data += 1
    timm_dvt.save_pretrained(other, tmp_path / "other", model_args=ARGS)
    first = evaluate("knn-seg", "stamps", model, data, tmp_path / "out")["knn-seg"]
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 2
    evaluate("knn-seg", "stamps", f"local-dir:{tmp_path / 'other'}", data, tmp_path / "out")
    assert len(list((tmp_path / "out" / "parts").glob("*.json"))) == 3
    results = [json.loads(path.read_text())["states"]["raw"] for path in (tmp_path / "out").glob("*.json")]
    assert results == [first["states"]["raw"]] * 2


@pytest.mark.parametrize(
    "task, kind, number",
    [("knn-seg", "masks", "mIoU"), ("depth", "depths", "RMSE"), ("discovery", "boxes", "CorLoc/folder")],
)
def test_corrected_annotations_are_evaluated_anew(task, kind, number, model, data, tmp_path):
    """Features are those of the images, and are not extracted again."""
    where = shutil.copytree(data["folder"], tmp_path / "folder")
    first = evaluate(task, "folder", model, {"folder": where}, tmp_path / "out")[task]
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.safetensors")}
    for path in where.rglob(f"val/{kind}/**/*.png"):
        Image.fromarray(np.array(Image.open(path))[::-1].copy()).save(path)
    for path in where.rglob("val/boxes*.json"):
        text = re.sub(r'"bbox": \[[^]]*\]', '"bbox": [0, 0, 9, 9]', path.read_text())
        path.write_text(text)
    evaluate(task, "folder", model, {"folder": where}, tmp_path / "out")
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(results) == 2 and first in results
    assert len({result["states"]["raw"][number]["mean"] for result in results}) == 2
    assert features == {path: path.stat().st_mtime_ns for path in features}


def test_all_goes_on_where_one_task_cannot_be(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.evaluate.__main__.kinds_of", lambda dataset, where: ["images", "masks"])
    for name in set(tasks_of("fast")) - {"position", "knn-seg"}:
        monkeypatch.setattr(load_task(name), "KIND", "none")
    words = ["all", "--dataset", "stamps", "--data", str(data["stamps"]), "--model", model, "--out", str(tmp_path)]
    assert main([*words, "--limit", "1", "--set", "knn-seg.bank_share=1.0"]) == 2  # position is told by several images
    assert "error: left out position: " in capsys.readouterr().err
    (result,) = tmp_path.glob("*.json")
    assert result.name.startswith("knn-seg")


def test_all_goes_on_where_annotations_of_one_kind_cannot_be(model, data, tmp_path, monkeypatch, capsys):
    where = shutil.copytree(data["folder"], tmp_path / "folder")
    for path in where.rglob("masks/**/*.png"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    for path in where.rglob("depths/**/*.png"):
        Image.fromarray(3 * np.array(Image.open(path))).save(path)
    for name in set(tasks_of("fast")) - {"knn-seg", "depth"}:
        monkeypatch.setattr(load_task(name), "KIND", "none")
    words = ["all", "--dataset", "folder", "--data", str(where), "--model", model, "--out", str(tmp_path / "out")]
    quick = ["depth.steps=3", "depth.warmup=1", "depth.least=11", "depth.most=30"]  # which are valid together
    assert main([*words, "--set", *quick]) == 2
    assert "error: left out knn-seg: " in capsys.readouterr().err
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["changed"] == quick


def test_a_bank_without_a_label_is_told(model, data, tmp_path, capsys):
    where = shutil.copytree(data["stamps"], tmp_path / "stamps")
    masks = sorted((where / "train" / "masks").iterdir())
    for path in masks[1:]:
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(path)
    words = ["knn-seg", "--dataset", "stamps", "--data", str(where), "--model", model, "--out", str(tmp_path / "out")]
    assert main([*words, "--repeats", "4", "--set", "bank_share=0.05"]) == 2
    assert "in the bank of seed" in capsys.readouterr().err


def test_the_report_tells_sizes_and_tags_apart(model, data, tmp_path):
    random = ("--no-pretrained", "--seed", "1")
    for more in ((), ("--input-size", "32"), ("--tag", "views=4"), ("--dtype", "bfloat16"), random):
        evaluate("knn-seg", "stamps", model, data, tmp_path, *more)
    rows = [row for row in read_rows(tmp_path) if row.state == "raw"]
    wanted = [{}, {"dtype": "bfloat16"}, {"input": "32 px"}, {"views": "4"}, {"weights": "random, seed 1"}]
    assert sorted((row.tags for row in rows), key=str) == sorted(wanted, key=str)


def test_a_setting_with_a_decimal_point_is_a_changed_one(model, data, tmp_path):
    more = ("knn-seg.bank_share=0.5", "--set", "bank_share=0.25", "depth.lr=0.5")
    result = evaluate("knn-seg", "stamps", model, data, tmp_path, *more)["knn-seg"]
    assert result["changed"] == ["knn-seg.query_size=16", "knn-seg.neighbors=5", "bank_share=0.25"]


@pytest.mark.slow
def test_without_a_cache_the_numbers_are_the_same(model, data, tmp_path):
    kept = evaluate("linear-seg", "stamps", model, data, tmp_path / "a")["linear-seg"]
    streamed = evaluate("linear-seg", "stamps", model, data, tmp_path / "b", "--cache", "off")["linear-seg"]
    assert kept["states"] == streamed["states"]
    assert list((tmp_path / "a").rglob("*.safetensors")) and not list((tmp_path / "b").rglob("*.safetensors"))


def test_what_a_detector_may_get_back_is_the_mean_that_the_denoiser_removes(model, data):
    made = timm.create_model(model, pretrained=True).eval()
    split = open_dataset("voc", data["voc"], "boxes")["val"]
    features = Features(Extractor(made), split, None)
    found = detection.mean_artifacts(features)
    mean, std = (torch.tensor(made.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    total = torch.zeros(8, 8, 64, dtype=torch.float64)
    with torch.no_grad():
        for i in range(len(split)):
            image = (features.images([i]) - mean) / std
            made.set_denoise(True)
            on = made.forward_features(image)
            made.set_denoise(False)
            off = made.forward_features(image)
            total += (off - on)[0, made.num_prefix_tokens :].double().unflatten(0, (8, 8))
    assert total.abs().max() > 0.03 * len(split)
    assert torch.allclose(found.double(), total / len(split), atol=2e-3)  # features are kept in half precision


def test_a_detector_gets_back_no_map_of_a_plain_model(data, tmp_path, capsys):
    words = ["detection", "--dataset", "voc", "--data", str(data["voc"]), "--out", str(tmp_path), "--device", "cpu"]
    plain = ["--model", "vit_tiny_patch16_224", "--no-pretrained", "--input-size", "32"]
    assert main([*words, *plain, "--set", "fixed_pe=both", "embedding=artifacts"]) == 2
    assert "embedding=artifacts needs a model with a denoiser" in capsys.readouterr().err


def test_plain_model_has_a_raw_column_alone(data, tmp_path, capsys):
    folder = tmp_path / "plain"
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **ARGS)
    timm.models.save_for_hf(vit, folder, safe_serialization=True, model_args=ARGS)
    result = evaluate("knn-seg", "stamps", f"local-dir:{folder}", data, tmp_path / "out")["knn-seg"]
    assert set(result["states"]) == {"raw"} and result["difference"] == {}
    assert "denoised" not in capsys.readouterr().out


def test_distilled_variant_is_called_so(data, tmp_path):
    words = ["knn-seg", "--dataset", "stamps", "--data", str(data["stamps"]), "--out", str(tmp_path)]
    name = "vit_base_patch16_224.dino_dvt_distilled"
    assert main([*words, "--model", name, "--no-pretrained", "--input-size", "32", "--limit", "2"]) == 0
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert set(result["states"]) == {"distilled"}


def test_a_vit_of_distill_is_called_so_whatever_its_folder_is_called(data, tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", **ARGS)
    timm.models.save_for_hf(vit, tmp_path / "mine", safe_serialization=True, model_args=ARGS)
    (tmp_path / "mine" / "settings.json").write_text('{"task": "stage 3"}')
    result = evaluate("knn-seg", "stamps", f"local-dir:{tmp_path / 'mine'}", data, tmp_path / "out")["knn-seg"]
    assert set(result["states"]) == {"distilled"}


@pytest.mark.slow
def test_killed_run_continues_to_the_same_result(model, data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "training.evaluate",
        "linear-seg",
        "--dataset",
        "stamps",
        "--data",
        str(data["stamps"]),
        "--model",
        model,
        "--device",
        "cpu",
        "--set",
        "steps=60",
        "warmup=5",
        "label_size=16",
    ]
    # Dies without warning in the middle of the training of the second state, with a checkpoint behind it.
    crash = (
        "import os, sys, training.evaluate.probe as probe, training.loop.run as loop\n"
        "from training.evaluate.__main__ import main\n"
        "probe.CHECKPOINT_EVERY = 1\nsave, count = loop.save_checkpoint, [0]\n"
        "def dying(*args):\n    save(*args); count[0] += 1\n    os._exit(9) if count[0] == 90 else None\n"
        "loop.save_checkpoint = dying\nmain(sys.argv[1:])\n"
    )
    out = tmp_path / "killed"
    assert processes.run("-c", crash, *command[3:], "--out", str(out))[0] == 9
    assert not list(out.glob("*.json")) and len(list((out / "parts").glob("*.json"))) == 1
    with safe_open(next((out / "parts").glob("*.safetensors")), "pt") as checkpoint:
        assert json.loads(checkpoint.metadata()["run"])["step"] == 30
    assert main([*command[3:], "--out", str(out)]) == 0
    assert main([*command[3:], "--out", str(tmp_path / "whole")]) == 0
    results = [json.loads(next(folder.glob("*.json")).read_text()) for folder in (out, tmp_path / "whole")]
    assert results[0]["states"] == results[1]["states"]
    assert not list((out / "parts").glob("*.safetensors"))


def test_void_pixels_of_street_scenes_do_not_count(tmp_path):
    small_datasets.camvid(tmp_path, train=3, val=2)
    splits = open_dataset("camvid", tmp_path, "masks")
    assert [len(splits[part]) for part in ("train", "val")] == [3, 2] and len(splits["val"].classes) == 11
    written = small_datasets.scenes("val", 2)[1].mask  # 255 where the file has 11
    assert (splits["val"].annotation(1).numpy() == written).all() and (written == 255).any()


@pytest.mark.parametrize("name", DATASETS)
def test_missing_files_are_an_error_that_shows_the_layout(name, tmp_path):
    for kind in DATASETS[name].kinds:
        with pytest.raises(ValueError, match="Expected layout") as error:
            open_dataset(name, tmp_path, kind)
        assert DATASETS[name].layout in str(error.value)


def test_a_missing_folder_is_told_before_a_model_is_asked_for(tmp_path, capsys):
    words = ["knn-seg", "--model", "no_such_model", "--dataset", "voc", "--data", str(tmp_path / "none")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Expected layout" in error and "no_such_model" not in error


def test_one_missing_folder_is_named(model, data, tmp_path, capsys):
    shutil.copytree(data["ade20k"], tmp_path / "ade")
    shutil.rmtree(tmp_path / "ade" / "ADEChallengeData2016" / "images" / "validation")
    words = ["linear-seg", "--dataset", "ade20k", "--data", str(tmp_path / "ade"), "--model", model]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "images/validation" in message and "Expected layout" in message


def test_one_missing_mask_is_named(model, data, tmp_path, capsys):
    shutil.copytree(data["stamps"], tmp_path / "stamps")
    (tmp_path / "stamps" / "train" / "masks" / "00003.png").unlink()
    words = ["knn-seg", "--dataset", "stamps", "--data", str(tmp_path / "stamps"), "--model", model]
    assert main([*words, "--out", str(tmp_path / "out"), "--set", "bank_share=1.0"]) == 2
    message = capsys.readouterr().err
    assert "masks/00003.png" in message and "Expected layout" in message


@pytest.mark.parametrize(
    "words, message",
    [
        (["knn-seg", "--dataset", "stamps", "--tag", "pairs=3", "--tag", "pairs=4"], "--tag gives pairs twice"),
        (["depth", "--dataset", "voc"], "dataset voc has no depth; those that have: nyu"),
        (["knn-seg", "--dataset", "stamps", "--set", "nearest=3"], "knn-seg has the settings neighbors"),
        (["knn-seg", "--dataset", "stamps", "--set", "neighbors=many"], "'many' is not a value like 20"),
        (["knn-seg", "--dataset", "stamps", "--set", "bank_share=1.5"], "bank_share must be in (0, 1], got 1.5"),
        (["knn-seg", "--dataset", "stamps", "--set", "bank_share=0"], "bank_share=0: must be above 0, got 0"),
        (["knn-seg", "--dataset", "stamps", "--set", "neighbors=None"], "neighbors=None: must be int, like 20"),
        (["knn-seg", "--dataset", "stamps", "--set", "query_size=-3"], "query_size=-3: must be 0 or more, got -3"),
        (["linear-seg", "--dataset", "stamps", "--set", "steps=0"], "steps=0: must be above 0, got 0"),
        (["linear-seg", "--dataset", "stamps", "--set", "weight_decay=-1"], "weight_decay=-1: must be 0 or more"),
        (["blank", "--dataset", "stamps", "--set", "sizes=(64,(0,64))"], "must be above 0, got 0"),
        (["depth", "--dataset", "nyu", "--set", "least=5", "most=1"], "least must be below most, got 5 and 1 m"),
        (["detection", "--dataset", "stamps", "--set", "finest=3"], "finest must be one of (4, 2, 1), got 3"),
        (["detection", "--dataset", "stamps", "--set", "fixed_pe=all"], "fixed_pe must be one of"),
        (["detection", "--dataset", "stamps", "--set", "embedding=learned"], "embedding must be one of"),
    ],
)
def test_bad_requests_are_named(words, message, model, data, tmp_path, capsys):
    where = ["--data", str(data["stamps"]), "--model", model, "--out", str(tmp_path)]
    assert main([*words, *where]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_tasks_settings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {task}: " in text for task in TASKS) and "steps=40000/1500" in text
