"""Claims about the folder that processes share: claims die with their owner, and files are whole."""

import errno
import json
import os
import signal

import pytest

from tests.helpers.processes import Python
from timm_dvt import shared_folder
from timm_dvt.shared_folder import OutputError, SettingsDiffer, SharedFolder, read_lines, write_atomically


def run(script: str, *args) -> Python:
    """A Python process with this package's folder module at hand; it says "ready" when it is."""
    script = "import os, sys, time\nfrom timm_dvt.shared_folder import *\n" + script
    return Python("-c", script, *map(str, args))


HOLD = """
with SharedFolder(sys.argv[1]) as folder, folder.claim("cat.png") as mine:
    print("ready" if mine else "refused", flush=True)
    time.sleep(60)
"""


def test_a_claim_excludes_other_processes_and_dies_with_its_owner(tmp_path):
    owner = run(HOLD, tmp_path)
    assert owner.stdout.readline() == "ready\n"
    with SharedFolder(tmp_path) as folder:
        with folder.claim("cat.png") as mine:
            assert not mine
        with folder.claim("dog.png") as mine:
            assert mine
        os.kill(owner.pid, signal.SIGKILL)
        with folder.claim("cat.png", wait=True) as mine:  # no timeout, no guess: the kernel hands it over
            assert mine
    owner.wait()


@pytest.mark.parametrize("name", ["a" * 250, "a" * 251, "é" * 127])
def test_a_file_may_have_a_name_as_long_as_the_file_system_takes(name, tmp_path):
    for data in (b"first", b"second"):
        write_atomically(tmp_path / name, data)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"second"


@pytest.mark.slow
def test_a_claim_is_given_back_when_its_block_ends(tmp_path):
    with SharedFolder(tmp_path) as folder:
        with pytest.raises(KeyError), folder.claim("cat.png"):
            raise KeyError
        other = run(HOLD, tmp_path)
        assert other.stdout.readline() == "ready\n"
        other.kill()
        other.wait()


@pytest.mark.slow
def test_lines_of_many_processes_are_all_there_and_whole(tmp_path):
    script = """
with SharedFolder(sys.argv[1]) as folder:
    for i in range(40):
        folder.append("log.jsonl", {"process": sys.argv[2], "i": i, "text": "x" * (i * 997 % 5000)})
"""
    writers = [run(script, tmp_path, name) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    records, ends = zip(*read_lines(tmp_path / "log.jsonl"))
    assert ends[-1] == (tmp_path / "log.jsonl").stat().st_size
    assert sorted((r["process"], r["i"]) for r in records) == [(name, i) for name in "abc" for i in range(40)]
    assert all(len(r["text"]) == r["i"] * 997 % 5000 for r in records)


def test_a_torn_line_is_not_read_and_is_cut_off_by_the_next_one(tmp_path):
    log = tmp_path / "log.jsonl"
    with SharedFolder(tmp_path) as folder:
        folder.append("log.jsonl", {"i": 0})
        whole = log.read_bytes()
        for torn in (b'{"i": 1, "te', b'{"i": 1}', b"x" * 10_000):
            log.write_bytes(whole + torn)
            assert list(read_lines(log)) == [({"i": 0}, len(whole))]
            folder.append("log.jsonl", {"i": 2})
            assert log.read_bytes() == whole + b'{"i": 2}\n'
            assert list(read_lines(log, len(whole))) == [({"i": 2}, len(whole) + 9)]
    log.write_bytes(b"torn and nothing else")
    with SharedFolder(tmp_path) as folder:
        folder.append("log.jsonl", {"i": 3})
    assert log.read_bytes() == b'{"i": 3}\n'


def test_a_damaged_line_is_left_out_with_a_warning(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"i": 0}\n\0\0\0\n{"i": 1}\n')
    with pytest.warns(UserWarning, match="damaged line of .*log.jsonl"):
        assert [record for record, _ in read_lines(tmp_path / "log.jsonl")] == [{"i": 0}, {"i": 1}]


def test_no_room_is_one_clear_error_and_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "a" / "pair.safetensors"
    write_atomically(target, b"old")
    real_write, written = os.write, []

    def fill_up(descriptor, data):  # the disk takes the first bytes and then is full
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(real_write(descriptor, data[:100]))
        return written[0]

    monkeypatch.setattr(shared_folder.os, "write", fill_up)
    with pytest.raises(OutputError, match=r"no room for .*pair.safetensors \(0.01 MB\): No space left"):
        write_atomically(target, b"x" * 10_000)
    assert os.listdir(target.parent) == ["pair.safetensors"] and target.read_bytes() == b"old"

    with SharedFolder(tmp_path) as folder:
        (tmp_path / "log.jsonl").write_bytes(b'{"i": 0}\n')
        written.clear()
        with pytest.raises(OutputError, match="no room for .*log.jsonl"):
            folder.append("log.jsonl", {"text": "x" * 1000})
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"i": 0}\n'


def test_a_real_limit_on_file_size_gives_the_same_error(tmp_path):
    script = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_atomically(Path(sys.argv[1], "pair"), b"x" * 10_000)
except OutputError as error:
    print(error)
"""
    process = run(script, tmp_path)
    assert "no room for" in process.stdout.read() and process.wait() == 0
    assert os.listdir(tmp_path) == []


def test_an_error_or_an_interrupt_in_the_middle_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared_folder.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "pair", b"x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_said_to_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write .*file/out"):
        SharedFolder(tmp_path / "file" / "out")


def test_other_settings_are_refused_by_name_with_both_values(tmp_path):
    with SharedFolder(tmp_path) as folder:
        folder.settle({"model": "a", "layers": (5,), "linear": {"nodes": 1.25}})
        folder.settle({"linear": {"nodes": 1.25}, "layers": [5], "model": "a"})
        with pytest.raises(SettingsDiffer) as error:
            folder.settle({"model": "b", "layers": [5], "linear": {"nodes": 2.0}, "new": True})
    lines = str(error.value).splitlines()
    assert lines[1:] == [
        '  model: the folder has "a", this run has "b"',
        "  linear.nodes: the folder has 1.25, this run has 2.0",
        "  new: the folder has nothing, this run has true",
    ]
    assert json.loads((tmp_path / "settings.json").read_text())["model"] == "a"
