"""The repository's protocols, end to end on tiny datasets."""

import json
import shutil

import pytest
from safetensors import safe_open

import training.loop.run as loop
from tests.helpers import small_datasets
from training.evaluate import probe
from training.evaluate.__main__ import main
from training.evaluate.data.datasets import open_dataset
from training.evaluate.segmentation import repository as linear_seg
from training.evaluate.tasks import tasks_of
from training.loop.checkpoints import save_checkpoint

ARGS = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_datasets.saved_model(tmp_path_factory.mktemp("model"), ARGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_datasets.written(("voc", "nyu", "folder"), tmp_path_factory.mktemp, train=8, val=4)


def words_for(task, dataset, model, data, out):
    words = [task, "--protocol", "repository", "--dataset", dataset, "--data", str(data[dataset]), "--out", str(out)]
    return [*words, "--model", model, "--device", "cpu", "--set", *small_datasets.REPOSITORY]


def result_in(out):
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "task, dataset, number",
    [
        ("linear-seg", "voc", "mIoU"),
        ("linear-seg", "folder", "mIoU"),
        ("depth", "nyu", "delta1"),
        ("detection", "voc", "mAP_11"),
        ("detection", "folder", "mAP_11"),
    ],
)
def test_each_protocol_runs_raw_and_denoised(task, dataset, number, model, data, tmp_path):
    assert main(words_for(task, dataset, model, data, tmp_path)) == 0
    result = result_in(tmp_path)
    assert result["protocol"] == "repository" and set(result["states"]) == {"raw", "denoised"}
    raw, denoised = (result["states"][state][number]["mean"] for state in ("raw", "denoised"))
    assert result["difference"][number]["mean"] == pytest.approx(denoised - raw)
    if task == "linear-seg":
        state = result["states"]["raw"]
        assert state["mIoU"]["mean"] > 25 and state["IoU/background" if dataset == "folder" else "IoU/aeroplane"]
        assert state["mIoU"]["mean"] >= state["mIoU/last"]["mean"]
    if task == "depth":
        assert raw > 50 and result["states"]["raw"]["best_step"]["mean"] in (8, 16, 20)
    assert not list((tmp_path / "parts").glob("*.validations")) and not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["knn-seg", "--dataset", "voc", "--protocol", "repository"], "repository is for depth, detection, linear-seg"),
        (["linear-seg", "--dataset", "voc", "--protocol", "repository", "--pairs", "x"], "goes with --protocol fast"),
        (["linear-seg", "--dataset", "voc", "--protocol", "repository", "--set", "trainaug=True"], "trainaug.txt"),
        (["linear-seg", "--dataset", "folder", "--protocol", "repository", "--set", "trainaug=True"], "of dataset voc"),
        (
            ["linear-seg", "--dataset", "voc", "--protocol", "repository", "--set", "label_size=9"],
            "has the settings steps",
        ),
    ],
)
def test_what_the_protocol_cannot_do_is_named(words, message, model, data, tmp_path, capsys):
    where = ["--data", str(data[words[2]]), "--model", model, "--out", str(tmp_path)]
    assert main([*words, *where]) == 2
    assert message in capsys.readouterr().err


def test_the_protocols_help_is_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {task} --protocol repository: steps=" in text for task in tasks_of("repository"))


def test_voc_is_trained_on_train_unless_trainaug_is_asked_for(tmp_path):
    small_datasets.voc(tmp_path, train=4, val=2)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("2012_Segmentation_train_001\n")
    shutil.copytree(base / "SegmentationClass", base / "SegmentationClassAug")
    lengths = [len(open_dataset("voc", tmp_path, "masks", asked)["train"]) for asked in (False, True, None)]
    assert lengths == [4, 1, 1]
    assert linear_seg.Settings().trainaug is False


@pytest.mark.slow
@pytest.mark.parametrize("task, dataset, at, step", [("linear-seg", "folder", 5 + 4, 18), ("depth", "nyu", 4 + 3, 12)])
def test_a_stopped_run_ends_as_one_that_was_not(task, dataset, at, step, model, data, tmp_path, monkeypatch):
    """Stopped in the second state's training, between two checkpoints and after a validation."""
    saved = []

    def stopping(*args):
        saved.append(args)
        if len(saved) == at:
            raise KeyboardInterrupt
        save_checkpoint(*args)

    monkeypatch.setattr(probe, "CHECKPOINT_EVERY", 6)
    words = words_for(task, dataset, model, data, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", stopping)
        assert main(words) == 130
    parts = tmp_path / "stopped" / "parts"
    assert len(list(parts.glob("*.json"))) == 1 and len(list(parts.glob("*.validations"))) == 1
    with safe_open(next(parts.glob("*.safetensors")), "pt") as checkpoint:
        assert json.loads(checkpoint.metadata()["run"])["step"] == step
    assert main(words) == 0
    assert main(words_for(task, dataset, model, data, tmp_path / "whole")) == 0
    stopped, whole = (result_in(tmp_path / name)["states"] for name in ("stopped", "whole"))
    assert stopped == whole
