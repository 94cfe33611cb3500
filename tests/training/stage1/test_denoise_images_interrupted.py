"""Claims about the command for many images when it is killed, shared or out of room: it does them all, once."""

import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers.processes import Python, start, torchrun
from tests.helpers.stage1_runs import SLOW, contents, draw_images, read_lines, run
from timm_dvt import shared_folder
from timm_dvt.errors import UserError
from training import denoise_images
from training.pairs.folder import read_index, read_settings
from training.stage1 import images as stage1_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture()
def images(tmp_path):
    return draw_images(tmp_path / "images")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Options for six images and a broken one, and what one process, left alone, makes of them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (draw_images(folder / "images") / "broken.png").write_bytes(b"no image")
    options = [*SLOW, "--images", str(folder / "images")]
    process = start("training.denoise_images", *options, "--out", str(folder / "out"))
    process.communicate()
    assert process.returncode == 1
    return options, contents(folder / "out")


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_equals_an_uninterrupted_run(uninterrupted, tmp_path):
    options, wanted_contents = uninterrupted
    out = tmp_path / "killed"
    for wanted in (1, 3):
        process = start("training.denoise_images", *options, "--out", str(out))
        while process.poll() is None and len(list(out.rglob("*.safetensors"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it finished before it could be killed"
        assert wanted <= len(list(out.rglob("*.safetensors"))) < 6
        process.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert denoise_images.main([*options, "--out", str(out)]) == 1
    assert contents(out) == wanted_contents
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())  # none was done again


@pytest.mark.sweep
def test_two_processes_killed_again_and_again_lose_nothing_and_do_nothing_twice(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(images / f"{i}.png")
    options = [*SLOW, "--images", str(images)]
    assert denoise_images.main([*options, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    for wanted in range(5, 50, 5):
        processes = [start("training.denoise_images", *options, "--out", str(out)) for _ in range(2)]
        while len(list(out.rglob("*.safetensors"))) < wanted:
            time.sleep(0.002)
        for process in processes:
            time.sleep(generator.uniform(0, 0.3))
            process.kill()
            process.communicate()
    assert denoise_images.main([*options, "--out", str(out)]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_between_a_pair_and_its_line_the_pair_is_kept(images, tmp_path):
    assert run(images, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "index.jsonl").unlink()
    torn = next((tmp_path / "out").rglob("*.safetensors"))
    torn.rename(torn.with_name(f".{torn.name}.tmp"))  # and one killed while it was written
    torn.with_name(f".{torn.name}.tmp").write_bytes(b"half")
    assert run(images, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_processes_started_by_hand_share_a_folder_and_do_each_image_once(uninterrupted, tmp_path):
    options, wanted_contents = uninterrupted
    out = tmp_path / "shared"
    processes = [start("training.denoise_images", *options, "--out", str(out)) for _ in range(2)]
    assert [process.wait() for process in processes] == [1, 1], [p.stderr.read() for p in processes]
    assert len(read_lines(out / "index.jsonl")) == 6  # an image done twice would have two lines
    assert contents(out) == wanted_contents


def test_an_image_whose_process_died_is_taken_over(images, tmp_path):
    out = tmp_path / "out"
    script = """
import os, sys, time
from pathlib import Path
from timm_dvt.shared_folder import SharedFolder
with SharedFolder(sys.argv[1]) as folder, folder.claim("a/0.png"):
    print("claimed", flush=True)
    while len(list(Path(sys.argv[1]).rglob("*.safetensors"))) < 5:  # the five other images'
        time.sleep(0.05)
    os.kill(os.getpid(), 9)
"""
    owner = Python("-c", script, str(out))
    assert owner.stdout.readline() == "claimed\n"
    assert run(images, out) == 0
    assert owner.wait() == -signal.SIGKILL
    assert [entry.image for entry in read_index(out)][-1] == "a/0.png" and len(read_index(out)) == 6


@pytest.mark.slow
def test_torchrun_does_the_same_with_one_progress_bar(uninterrupted, tmp_path):
    options, wanted_contents = uninterrupted
    out = tmp_path / "shared"
    process = torchrun(29631, "tests.helpers.bars_at_once", "training.denoise_images", *options, "--out", str(out))
    messages = process.communicate()[1]
    assert process.returncode == 1, messages
    assert len(read_lines(out / "index.jsonl")) == 6
    assert contents(out) == wanted_contents
    # One bar: it begins where the other process has got to by then.
    assert len(re.findall(r"\d\.\d/7 images \[00:00<\?", messages)) == 1 and "images/s" in messages
    assert messages.count("broken.png") == 1


def test_a_full_disk_is_one_clear_error_and_leaves_no_half_file(images, tmp_path, monkeypatch, capsys):
    write, room = os.write, [80_000]

    def limited(descriptor, data):
        if len(data) > room[0]:
            raise OSError(28, "No space left on device")
        room[0] -= len(data)
        return write(descriptor, data)

    monkeypatch.setattr(shared_folder.os, "write", limited)
    assert run(images, tmp_path / "out") == 3
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 and "Traceback" not in said and "same command" in said
    monkeypatch.undo()
    assert 0 < len(read_index(tmp_path / "out")) < 6
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert run(images, tmp_path / "out") == 0
    assert run(images, tmp_path / "whole") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_is_deleted_while_it_is_filled_is_an_error_and_is_not_begun_again(
    images, tmp_path, monkeypatch, capsys
):
    solve, left = stage1_images.decompose, [2, 6]

    def solve_and_delete(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(tmp_path / "out")
        return solve(*args, **options)

    monkeypatch.setattr(stage1_images, "decompose", solve_and_delete)
    for left[0] in (1, 6):
        assert run(images, tmp_path / "out") == 3
        assert "out was deleted or replaced while it was written" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("error", "code"), [(UserError("not so"), 2), (KeyboardInterrupt(), 130)])
def test_what_stops_it_while_it_is_at_work_is_one_line(error, code, images, tmp_path, monkeypatch, capsys):
    def stop(*args, **options):
        raise error

    monkeypatch.setattr(denoise_images, "denoise_images", stop)
    assert run(images, tmp_path / "out") == code
    assert capsys.readouterr().err.startswith("error: ")


def test_other_settings_are_refused_where_settings_json_is_lost_too(images, tmp_path, capsys):
    assert run(images, tmp_path / "out") == 0
    before = read_settings(tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    assert run(images, tmp_path / "out", "--views", "25") == 2
    assert "views: the folder has 24, this run has 25" in capsys.readouterr().err
    assert run(images, tmp_path / "out") == 0 and read_settings(tmp_path / "out") == before
