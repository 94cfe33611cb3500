"""Claims about what stage 2 refuses: bad pairs, pairs of another model, settings that cannot be."""

from pathlib import Path

import pytest
import torch

from tests.helpers.pair_folders import change_pair, pair_path, write_pairs
from tests.helpers.stage2_runs import run
from training import train_denoiser

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


def damage(pairs: Path, how: str) -> None:
    path = pair_path(pairs, 3)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "garbage":
        path.write_bytes(b"\xff" * 1000)
    elif how == "missing":
        path.unlink()
    elif how == "other grid":
        change_pair(path, raw=torch.zeros(5, 5, 64).half(), clean=torch.zeros(5, 5, 64).half())
    elif how == "mixed within":
        change_pair(path, raw=torch.zeros(5, 5, 64).half())
    elif how == "nan":
        change_pair(path, clean=torch.full((4, 4, 64), float("nan")).half())
    elif how == "infinity":
        change_pair(path, raw=torch.full((4, 4, 64), float("inf")).half())
    elif how == "no index":
        (pairs / "index.jsonl").unlink()
    elif how == "empty index":
        (pairs / "index.jsonl").write_bytes(b"")
    elif how == "damaged index":
        (pairs / "index.jsonl").write_text('{"image": "cat.png"}\n')
    elif how == "no settings":
        (pairs / "settings.json").unlink()
    elif how == "broken settings":
        (pairs / "settings.json").write_text("{")


THIRD = pair_path(Path("pairs"), 3).name
BAD_PAIRS = {
    "truncated": THIRD,
    "garbage": THIRD,
    "missing": THIRD,
    "other grid": THIRD,
    "mixed within": THIRD,
    "nan": THIRD,
    "infinity": THIRD,
    "no index": "index.jsonl",
    "empty index": "index.jsonl",
    "damaged index": "delete it and run the same python -m training.denoise_images again",
    "no settings": "settings.json",
    "broken settings": "settings.json",
}


@pytest.mark.parametrize("start_from", ["static", "random"])
@pytest.mark.parametrize("how", BAD_PAIRS)
def test_bad_pairs_are_named(how, start_from, tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", 6)
    damage(pairs, how)
    assert run(pairs, tmp_path / "out", "--steps", "6", "--val-fraction", "0", "--start", start_from) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and BAD_PAIRS[how] in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_pairs_of_another_model_weights_layer_or_width_are_refused(tmp_path, capsys):
    pairs = write_pairs(tmp_path / "pairs", 2)
    out = tmp_path / "out"

    def error(*options: str) -> str:
        assert train_denoiser.main(["--pairs", str(pairs), "--out", str(out), "--no-pretrained", *options]) == 2
        return capsys.readouterr().err

    assert "model 'test_vit', not with --model test_vit2" in error("--model", "test_vit2")
    assert "hold block 5" in error("--model", "test_vit", "--layers", "3")
    assert "layers [3, 4]: the pairs" in error("--model", "test_vit", "--layers", "3,4")
    wide = write_pairs(tmp_path / "wide", 2, model="vit_tiny_patch16_224")
    pairs = wide
    assert "64 channels, but --model vit_tiny_patch16_224 has 192" in error("--model", "vit_tiny_patch16_224")
    pairs = write_pairs(tmp_path / "weights", 2, weights="0" * 64)
    assert "whose weights are not those of --model test_vit" in error("--model", "test_vit")
    pairs = tmp_path / "nowhere"
    assert "nowhere holds no pairs" in error("--model", "test_vit")
    assert "no_such_model" in error("--model", "no_such_model", "--pairs", str(wide))
    assert "not to ResNet" in error("--model", "resnet18", "--pairs", str(wide))


@pytest.mark.parametrize(
    "options",
    [
        ("--val-fraction", "1"),
        ("--warmup", "9", "--steps", "3"),
        ("--whole", "1.5"),
        ("--device", "nonsense"),
        ("--init", "nowhere"),
        ("--arch", "static", "--init", "x"),
        ("--arch", "static", "--steps", "5"),
        ("--arch", "static", "--epochs", "5", "--recipe", "repository"),
        ("--arch", "static", "--whole", "1"),
        ("--arch", "conv3x3", "--blocks", "2"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", *options) == 2
    assert options[0].strip("-").split("-")[0] in capsys.readouterr().err


def test_an_init_that_does_not_fit_can_be_put_right_in_the_same_folder(pairs, tmp_path, capsys):
    static, out = tmp_path / "static", tmp_path / "out"
    assert run(pairs, static, "--arch", "static") == 0
    assert run(pairs, out, "--steps", "3", "--init", str(static)) == 2
    assert "see --arch and --blocks" in capsys.readouterr().err
    assert run(pairs, out, "--steps", "3") == 0
    assert run(pairs, out, "--steps", "3", "--arch", "conv1x1") == 2  # trained by now
