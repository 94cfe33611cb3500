"""Claims about a run of stage 2 that is killed, stopped, shared or spoilt: nothing is lost, and processes agree."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.pair_folders import write_pairs
from tests.helpers.processes import Python, in_two, kill_at_random_moments, same, start, weights
from tests.helpers.stage2_runs import command, denoiser_weights, run
from training.loop import run as loop

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = ("--steps", "200", "--checkpoint-every", "7", "--val-every", "50")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


def finish(process: Python) -> int:
    process.communicate()
    return process.returncode


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), pytest.param(10, marks=pytest.mark.sweep)])
def test_killed_at_random_moments_and_run_again_ends_with_the_same_weights(pairs, tmp_path, times):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert finish(start(*command(pairs, whole, *STEPS))) == 0
    killed = kill_at_random_moments(lambda: start(*command(pairs, torn, *STEPS)), torn, times)
    assert killed >= min(times, 3) - 1
    assert finish(start(*command(pairs, torn, *STEPS))) == 0
    assert same(weights(torn), weights(whole))
    numbers = [
        [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in open(out / "log.jsonl")]
        for out in (whole, torn)
    ]
    assert numbers[0] == numbers[1]


def test_stopped_after_any_checkpoint_it_continues_bit_for_bit(pairs, tmp_path, monkeypatch):
    options = ("--steps", "9", "--checkpoint-every", "2")
    assert run(pairs, tmp_path / "whole", *options) == 0
    save = loop.save_checkpoint

    def save_and_die(path, model, optimizer, step):
        save(path, model, optimizer, step)
        raise KeyboardInterrupt

    for _ in (2, 4, 6, 8):
        monkeypatch.setattr(loop, "save_checkpoint", save_and_die)
        assert run(pairs, tmp_path / "out", *options) == 130
        monkeypatch.undo()
    assert run(pairs, tmp_path / "out", *options) == 0
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_a_finished_run_is_not_done_again_and_other_settings_are_refused(pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    log = (tmp_path / "out" / "log.jsonl").read_bytes()
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == log
    before = weights(tmp_path / "out")
    assert run(pairs, tmp_path / "out", "--steps", "2", "--lr", "0.1") == 2
    assert "lr: the folder has 0.0002, this run has 0.1" in capsys.readouterr().err
    assert same(weights(tmp_path / "out"), before)


@pytest.mark.slow
def test_two_processes_at_half_the_batch_end_with_the_weights_of_one(pairs, tmp_path):
    options = ("--steps", "12", "--val-every", "6")
    assert run(pairs, tmp_path / "one", *options) == 0
    codes, said = in_two(29611, *command(pairs, tmp_path / "two", *options, "--batch-size", "2"))
    assert codes == [0, 0], said
    one, both = denoiser_weights(tmp_path / "one"), denoiser_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], both[name], atol=2e-5, rtol=1e-4)


def test_a_diverging_loss_is_an_error_that_names_the_setting_and_keeps_the_checkpoint(pairs, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--steps", "40", "--lr", "3", "--warmup", "30", "--checkpoint-every", "1")
    assert run(pairs, out, *options) == 1
    assert "the loss diverged" in (error := capsys.readouterr().err) and "--lr" in error
    state = load_file(out / "checkpoint.safetensors")
    assert all(value.float().isfinite().all() for value in state.values())
    assert run(pairs, out, *options) == 1


def test_a_damaged_checkpoint_is_named(pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    path = tmp_path / "out" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert run(pairs, tmp_path / "out", "--steps", "2") == 2
    assert "checkpoint.safetensors cannot be continued from" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_last_save_is_one_clear_error(pairs, tmp_path):
    out = tmp_path / "out"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"  # of a checkpoint's 0.6 and 1.7 MB
    code = f"import resource, sys; {limit}; from training import train_denoiser; sys.exit(train_denoiser.main())"
    process = Python("-c", code, *command(pairs, out, "--steps", "2")[1:])
    printed = process.communicate()[1]
    assert process.returncode == 3 and "Traceback" not in printed
    error = printed[printed.index("error: ") :]
    assert "no room for" in error and "model.safetensors" in error and error.count("\n") == 2
    assert not [path for path in out.iterdir() if path.name.startswith(".") and path.name != ".locks"]
    assert run(pairs, out, "--steps", "2") == 0


def test_a_folder_that_is_deleted_while_a_training_runs_is_an_error(pairs, tmp_path, monkeypatch, capsys):
    save = loop.save_checkpoint

    def save_and_delete(path, *args):
        save(path, *args)
        shutil.rmtree(path.parent)

    monkeypatch.setattr(loop, "save_checkpoint", save_and_delete)
    assert run(pairs, tmp_path / "out", "--steps", "2") == 3
    assert "was deleted or replaced while it was written" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{"])
def test_a_checkpoint_whose_settings_are_lost_or_damaged_is_not_continued(content, pairs, tmp_path, capsys):
    assert run(pairs, tmp_path / "out", "--steps", "2") == 0
    settings = tmp_path / "out" / "settings.json"
    settings.unlink() if content is None else settings.write_text(content)
    assert run(pairs, tmp_path / "out", "--steps", "2", "--lr", "0.1") == 2
    assert f"{settings} is {'lost' if content is None else 'damaged'}" in capsys.readouterr().err
