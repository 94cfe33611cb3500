"""The command: what it plans, shares, resumes and sets beside what is published, on tiny data sets in real layouts."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import processes, small_datasets
from tests.helpers.photographs import write_pictures
from timm_dvt.publish.published import DINOV2
from timm_dvt.shared_folder import SharedFolder
from training.evaluate.results import heading
from training.reproduce import main
from training.reproduction import jobs, making
from training.reproduction.jobs import Job, Runner
from training.reproduction.published import select
from training.stage2.denoisers import make_denoisers

ARGS = {"img_size": 64, "patch_size": 8, "depth": 1, "embed_dim": 64, "num_heads": 1, "num_classes": 0}
QUICK = "linear-seg.steps=3 linear-seg.label_size=16 depth.steps=3 depth.bins=8".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_datasets.saved_model(tmp_path_factory.mktemp("model"), ARGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """VOC, ADE, NYU and COCO, and no ImageNet."""
    base = tmp_path_factory.mktemp("data")
    for name in ("voc", "ade20k", "nyu", "coco"):
        getattr(small_datasets, name)(base / name, train=16, val=6)
    return base


def words(model, data, out, *more, protocol="fast"):
    command = ["--models", model, "--data", str(data), "--out", str(out), "--protocol", protocol, "--repeats", "2"]
    settings = QUICK if protocol == "fast" else small_datasets.REPOSITORY
    return [*command, "--evaluate=--device=cpu", "--set", *settings, *more]


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands run here; what was run is listed."""
    ran = []

    def run(command, **more):
        ran.append(command[3])
        return processes.in_this_process(command, **more)

    monkeypatch.setattr(jobs.subprocess, "run", run)
    return ran


def option(command, name):
    return command[command.index(name) + 1]


def numbers(out):
    """All results of a folder, by job."""
    records = {path.name: json.loads(path.read_text()) for path in (out / "jobs").glob("*.json")}
    return {name: record["result"]["states"] for name, record in records.items() if "result" in record}


@pytest.mark.slow
def test_numbers_that_can_be_had_stand_beside_reasons_for_the_others(model, data, tmp_path, in_this_process, capsys):
    out = tmp_path / "out"
    assert main(words(model, data, out, "--tables", "1", "2", "4", "5")) == 1  # Tab. 1 lacks ImageNet, Tab. 5 --train
    assert in_this_process == ["linear-seg", "linear-seg", "depth", "discovery", "discovery"]
    table, page = (out / "RESULTS.md").read_text(), (out / "reproduction.html").read_text()
    (record,) = (json.loads(p.read_text()) for p in (out / "jobs").glob("depth_*.json"))
    summary = record["result"]["states"]["denoised"]["delta1"]
    for text in (f"{summary['mean']:.2f}*", f"± {summary['std']:.2f} (2)", "there is no folder", "needs --train"):
        assert text in table and text in page
    assert "18 of 25 numbers" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*")}
    assert main(words(model, data, out, "--tables", "1", "2", "4", "5")) == 1
    assert len(in_this_process) == 5  # nothing is run again
    assert before == {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*")}


@pytest.mark.slow
def test_the_repositorys_protocols_end_in_the_table(model, data, tmp_path, in_this_process):
    out = tmp_path / "out"
    assert (
        main(words(model, data, out, "--tables", "2", "3", "--repeats", "1", "--limit", "6", protocol="repository"))
        == 0
    )
    assert in_this_process == ["linear-seg", "linear-seg", "depth", "detection"]
    records = [json.loads(path.read_text())["result"] for path in (out / "jobs").glob("*.json")]
    assert {record["protocol"] for record in records} == {"repository"}
    lines = [line.split(" | ") for line in (out / "RESULTS.md").read_text().splitlines() if "| not published |" in line]
    table = {(state, number): ours for _, state, number, _, ours, *_ in lines}
    expected = {
        (state, heading((record["task"], record["dataset"], number))): summary["mean"]
        for record in records
        for state, numbers in record["states"].items()
        for number, summary in numbers.items()
    }
    assert len(table) == 2 * 7
    for key, ours in table.items():
        assert float(ours.rstrip("*")) == pytest.approx(expected[key], abs=6e-3)


def test_parts_do_all_of_the_work_between_them(data, tmp_path, monkeypatch):
    ran = []

    def run(command, **more):
        ran.append(command)
        found = {"mean": 1.0, "std": 0.0, "values": [1.0]}
        states = {state: dict.fromkeys(("mIoU", "mAcc", "delta1", "AbsRel"), found) for state in ("raw", "denoised")}
        return SimpleNamespace(
            returncode=0, stdout=json.dumps({"states": states, "limit": None, "changed": []}).encode()
        )

    monkeypatch.setattr(jobs.subprocess, "run", run)
    for number in (1, 2):
        code = main(words("m", data, tmp_path / "parts", "--tables", "2", "--part", f"{number}/2"))
        assert (len(ran), code) == ((2, 1), (3, 0))[number - 1]
    assert main(words("m", data, tmp_path / "parts", "--tables", "2")) == 0
    assert len(ran) == 3


@pytest.mark.slow
def test_the_plan_says_what_is_missing_and_how_long_the_rest_takes(model, data, tmp_path, in_this_process, capsys):
    out = tmp_path / "out"
    arguments = words(model, data, out, "--tables", "1", "2", "4", "5")
    assert main([*arguments, "--plan"]) == 0
    said = capsys.readouterr().out
    assert not list(out.glob("jobs/*")) and in_this_process == []
    lines = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    tasks = {name.split("_")[0]: line for name, line in lines.items()}
    assert "there is no folder" in tasks["mic"]
    assert all("about" in tasks[task] for task in ("linear-seg", "depth", "discovery"))
    assert "6 jobs, 1 of them without data or weights" in said and "needs --train" in said
    main([*words(model, data, out, "--tables", "4")])
    capsys.readouterr()
    main([*arguments, "--plan"])
    assert capsys.readouterr().out.count(": done") == 2


@pytest.mark.slow
def test_half_of_a_data_set_is_said_in_the_plan(model, data, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(data, half)
    shutil.rmtree(half / "voc" / "VOCdevkit" / "VOC2007")
    (half / "nyu" / "val_room" / "rgb_00003.jpg").unlink()
    shutil.rmtree(half / "coco")
    assert main(words(model, half, tmp_path / "out", "--tables", "2", "3", "4", "--plan")) == 0
    said = capsys.readouterr().out
    assert f"there is no file {half}/nyu/val_room/rgb_00003.jpg" in said
    assert f"there is no folder {half}/voc/VOCdevkit/VOC2007" in said  # Table 3's
    assert re.search(r"discovery_voc_.*about .*, but for CorLoc/voc2007: no images", said)
    assert "6 jobs, 3 of them without data or weights; the others take about" in said


def test_weights_that_are_missing_are_said_in_the_plan(data, tmp_path, capsys):
    assert main(words("local-dir:nowhere", data, tmp_path / "out", "--tables", "4", "--plan")) == 0
    assert capsys.readouterr().out.count("missing: cannot create 'local-dir:nowhere'") == 2


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data", "nowhere"], "--data must be a folder of data sets"),
        (["--models", "nobody_s_model", "--tables", "README"], "say nothing of --models nobody_s_model"),
    ],
)
def test_what_cannot_be_is_refused(more, message, data, tmp_path, capsys):
    assert main([*words("m", data, tmp_path / "out"), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_job_that_fails_is_not_tried_by_others_and_again_in_the_next_run(tmp_path, monkeypatch):
    calls = []

    def run(command, stdout, stderr, **more):
        calls.append(command)
        stderr.write(b"50%|....\rerror: the loss diverged\n")
        return SimpleNamespace(returncode=1, stdout=b"")

    monkeypatch.setattr(jobs.subprocess, "run", run)
    job = Job("a", ("training.evaluate", "mic"), row=select(["1"], [DINOV2])[0])
    after = Job("b", ("training.evaluate", "mic"), needs=(job,))
    with SharedFolder(tmp_path) as folder:
        first, second = Runner(folder), Runner(folder)
        first.run([job])
        second.run([job, after])
        assert len(calls) == 1
        assert second.failure(after) == "a: the loss diverged"
        time.sleep(0.01)
        Runner(folder).run([job])
    assert len(calls) == 2


# ---- killed and shared


@pytest.mark.slow
def test_killed_and_continued_in_two_processes_it_gives_what_an_uninterrupted_run_gives(
    model, data, tmp_path, in_this_process, one_thread
):
    command = {name: words(model, data, tmp_path / name, "--tables", "2", "4") for name in ("whole", "broken")}
    start = time.monotonic()
    assert main(command["whole"]) == 0
    whole = time.monotonic() - start
    broken, killed, moments = tmp_path / "broken", 0, random.Random(0)

    def parts() -> int:
        return len(list(broken.glob("results/parts/*")))

    for turn in range(10):
        had = parts()
        children = [processes.reproducing(command["broken"]) for _ in range(2)]
        until = time.monotonic() + whole
        while turn % 2 and parts() == had and time.monotonic() < until:  # every other time something was done
            time.sleep(0.01)
        time.sleep(moments.uniform(0, whole / 40))
        for child in children:
            child.kill()
            child.join()
            killed += child.exitcode == -signal.SIGKILL
    begun = parts()
    for child in [processes.reproducing(command["broken"]) for _ in range(2)]:
        child.join()
        assert child.exitcode == 0
    assert killed > 10 and begun
    assert len(numbers(broken)) == 5 and numbers(broken) == numbers(tmp_path / "whole")
    assert (broken / "RESULTS.md").read_text() == (tmp_path / "whole" / "RESULTS.md").read_text()


def test_what_a_killed_process_had_started_dies_with_it(tmp_path):
    """As long as it lived, it would write to a folder where another process does its work again."""
    pid = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    job = Job("asleep", ("timeit", "-n1", "-r1", code))

    def work():
        with SharedFolder(tmp_path) as folder:
            Runner(folder).run([job])

    child = processes.forked(work)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while Path("/proc", pid.read_text()).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_denoisers_are_made_first_by_a_recipe_and_table_5_is_of_maps_that_are_made(
    model, data, tmp_path, in_this_process, monkeypatch, capsys
):
    monkeypatch.setattr(making, "STEPS_TIMED", 2)
    more = ["--tables", "5", "2", "--train", "paper", "--limit", "2", "--stage2=--epochs=1 --batch-size=2 --device=cpu"]
    more += ["--stage1=--views=4 --field-steps=4 --input-size=96 --device=cpu"]
    assert main([*words(model, data, tmp_path / "out", *more), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "pairs_model" in said and "missing" not in said and "about" in said
    assert in_this_process == []
    assert main(words(model, data, tmp_path / "out", *more)) == 0
    table = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "view-average" in table and "| not run" not in table
    assert len(list((tmp_path / "out" / "denoisers").iterdir())) == 1
    lists = (tmp_path / "out" / "lists" / "train-limit-2.txt").read_text()
    val = Path(data, "voc/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").read_text().split()
    assert len(lists.splitlines()) == 2 and not any(name in lists for name in val)


def test_what_a_trial_makes_is_no_part_of_the_whole(tmp_path):
    """Nor is what is made of images of one's own."""
    folders = set()
    for more in ({}, {"limit": 4}, {"images": "photographs"}):
        job = jobs.job_of(select(["2"], [DINOV2])[0], jobs.Options(tmp_path, tmp_path, recipe="paper", **more))
        (denoiser,) = job.needs
        (pairs,) = denoiser.needs
        folders |= {option(made.command, "--out") for made in (denoiser, pairs)} | {
            made.name for made in (denoiser, pairs)
        }
        assert option(denoiser.command, "--pairs") == option(pairs.command, "--out")
    assert len(folders) == 12


def test_a_plan_times_the_denoisers_that_stage_2_trains_on_the_grid_that_stage_1_gives(model, tmp_path, monkeypatch):
    timed = []

    def make(pairs, arch, blocks, seed):
        made = make_denoisers(pairs, arch, blocks, seed)
        timed.extend((layer, pairs.grid, blocks) for layer in made)
        return made

    monkeypatch.setattr(making, "make_denoisers", make)
    images = ("--images", str(write_pictures(tmp_path / "photos", 2)))
    stage2 = ("training.train_denoiser", "--model", model, "--blocks", "2", "--batch-size", "2", "--device", "cpu")
    for more, grid in (((), (37, 37)), (("--input-size", "40"), (5, 5))):
        stage1 = Job("stage1", ("training.denoise_images", "--model", model, *images, *more))
        assert making.seconds_to_make(Job("stage2", stage2, (stage1,))) > 0
        assert timed.pop() == (0, grid, 2) and not timed


def test_a_job_is_done_of_its_own_data_wherever_they_lie_now(tmp_path):
    def job(data):
        return jobs.job_of(select(["4"], [DINOV2])[0], jobs.Options(data, tmp_path / "out"))

    first, other = tmp_path / "first", tmp_path / "other"
    for folder in (first, other):
        (folder / "voc").mkdir(parents=True)
    with SharedFolder(tmp_path / "out") as folder:
        runner, done = Runner(folder), job(first)
        assert not runner.done(done)
        path = tmp_path / "out" / "jobs" / f"{done.name}.json"
        path.parent.mkdir()
        path.write_text(json.dumps({"command": done.command, "result": {}}))
        assert runner.done(done) and not runner.done(job(other))
        first.rename(tmp_path / "moved")
        assert runner.done(job(tmp_path / "moved"))
