"""Claims about `timm-dvt extract` killed, shared, or out of room: every image's maps are there once and whole."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import namedtuple

import pytest

import timm_dvt
from tests.helpers.photographs import MODEL, write_broken, write_pictures
from tests.helpers.processes import start, torchrun
from timm_dvt import shared_folder
from timm_dvt.__main__ import main

OPTIONS = ["--model", MODEL, "--no-pretrained", "--size", "64", "--device", "cpu"]
FORK = multiprocessing.get_context("fork")  # so that libraries are imported once
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three broken files among images that make 20 shards of 16 images."""
    folder = write_pictures(tmp_path_factory.mktemp("photographs"), 317)
    write_broken(folder)
    return folder


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """The files of a run that was left alone."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["extract", str(photographs), "--out", str(out), *OPTIONS]) == 0
    return contents(out)


def finished(out):
    """Bytes of the index, which grow with each shard."""
    return (out / "index.jsonl").stat().st_size if (out / "index.jsonl").exists() else 0


def contents(out):
    """All files; the index sorted, because its lines are in the order of finishing."""
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    files["index.jsonl"] = b"".join(sorted(files["index.jsonl"].splitlines(keepends=True)))
    return files


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_equals_an_uninterrupted_run(photographs, whole, tmp_path):
    out, moments, killed = tmp_path / "out", random.Random(0), 0
    for _ in range(20):
        process = FORK.Process(target=main, args=(["extract", str(photographs), "--out", str(out), *OPTIONS],))
        before = finished(out)
        process.start()
        while process.is_alive() and finished(out) == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if finished(out):
            features = timm_dvt.open_features(out)
            assert all(features[name].shape == (4, 4, 64) for name in features)
    assert killed >= 5
    assert main(["extract", str(photographs), "--out", str(out), *OPTIONS]) == 0
    assert contents(out) == whole


@pytest.mark.slow
def test_two_processes_and_torchrun_share_the_work(photographs, whole, tmp_path):
    command = ("timm_dvt", "extract", str(photographs), *OPTIONS, "--out")
    several = [start(*command, str(tmp_path / "two")) for _ in range(2)]
    several.append(torchrun(29641, *command, str(tmp_path / "torchrun")))
    said = [process.communicate() for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], said
    assert contents(tmp_path / "two") == contents(tmp_path / "torchrun") == whole
    assert said[2][0].count("left out text.jpg") == 1  # one process speaks


def test_parts_make_the_whole_in_any_order(photographs, whole, tmp_path, capsys):
    for part in ("3/3", "1/3", "2/3"):
        assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS, "--part", part]) == 0
        if part == "3/3":
            assert "of 320; the rest is left to other parts" in capsys.readouterr().out
            assert 80 <= len(timm_dvt.open_features(tmp_path)) <= 96
    assert contents(tmp_path) == whole


def test_a_full_disk_is_one_clear_line_and_the_same_command_continues(
    photographs, whole, tmp_path, monkeypatch, capsys
):
    write, room = os.write, [200_000]

    def limited(descriptor, data):
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(data)
        return write(descriptor, data)

    monkeypatch.setattr(shared_folder.os, "write", limited)
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS]) == 2
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "the same command continues" in said
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp")) and 0 < len(timm_dvt.open_features(tmp_path)) < 317
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS]) == 0
    assert contents(tmp_path) == whole


def test_what_the_disk_has_no_room_for_is_not_begun(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10_000))
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS]) == 2
    assert "655 KB are needed and 10 KB are free; take fewer images, --pca K or" in capsys.readouterr().err
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS, "--dtype", "float32"]) == 2
    assert "take fewer images, --dtype float16, --pca K or" in capsys.readouterr().err
    assert not (tmp_path / "index.jsonl").exists()
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS, "--pca", "1000"]) == 2
    monkeypatch.undo()
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS, "--pca", "1000"]) == 2
    assert "--pca 1000: features of 64 channels have not so many components" in capsys.readouterr().err
    assert main(["extract", str(photographs), "--out", str(tmp_path), *OPTIONS, "--pca", "2"]) == 0  # nothing is bound
