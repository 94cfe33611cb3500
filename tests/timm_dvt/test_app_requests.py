"""The page without a browser: what its server reads, keeps and answers, whoever asks and however slowly."""

import importlib.util
import io
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from tests.helpers.app_server import (
    BOUNDARY,
    MULTIPART,
    is_look,
    multipart,
    noise,
    save,
    sent,
    shown,
    status,
    until,
)
from timm_dvt.__main__ import main

if not importlib.util.find_spec("gradio"):  # seconds to import, in every process that runs tests
    pytest.skip("needs the extra app", allow_module_level=True)


def png(*size: int) -> bytes:
    file = io.BytesIO()
    noise(*size).save(file, "PNG")
    return file.getvalue()


def left(server) -> list[Path]:
    """What lies in the folders of the page."""
    return [path for folder in server[2].glob("timm_dvt_app_*") for path in folder.iterdir()]


# ---- uploads


def test_an_upload_that_takes_its_time_outlives_those_of_others(server):
    """Sent by halves, with another visitor's upload shown and deleted in between."""
    slow, quick = png(96, 96), png(80, 80)
    host, port = server[0].removeprefix("http://").rstrip("/").split(":")
    body = multipart(slow, "slow.png")
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n"
    head += f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as line:
        line.sendall(head.encode() + body[: len(body) // 2])
        until(lambda: len(left(server)) == 1)
        assert is_look(shown(server[0], sent(server[0], quick), "quick"))
        line.sendall(body[len(body) // 2 :])
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    path = answer.decode().split('"')[1]
    assert is_look(shown(server[0], path, "slow"))
    assert not left(server)


def test_what_is_left_of_an_upload_given_up_half_way_is_deleted_in_time(server):
    (folder,) = server[2].glob("timm_dvt_app_*")
    old, new = folder / "tmp_old", folder / "tmp_new"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (time.time() - 700,) * 2)
    assert is_look(shown(server[0], sent(server[0], png(64, 64)), "later"))
    assert not old.exists() and new.exists()
    new.unlink()


def test_uploads_that_nobody_looks_at_do_not_fill_the_disk(server):
    (folder,) = server[2].glob("timm_dvt_app_*")
    waiting = folder / "a digest" / "waiting.png"
    waiting.parent.mkdir()
    with open(waiting, "wb") as file:
        file.truncate(5 * 10**9)  # takes no room itself
    code, text = status(f"{server[0]}gradio_api/upload", multipart(png(64, 72), "one.png"), MULTIPART)
    assert code == 503 and b"try again" in text
    waiting.unlink()
    waiting.parent.rmdir()
    assert is_look(shown(server[0], sent(server[0], png(64, 72)), "after"))


def test_two_who_send_the_same_file_at_the_same_time_both_see_it(server):
    """It lies in one place, which is named after its content."""
    first, second = sent(server[0], png(72, 64)), sent(server[0], png(72, 64))
    assert first == second
    assert is_look(shown(server[0], first, "one")) and is_look(shown(server[0], second, "two"))


def test_an_upload_that_is_gone_is_told(server):
    path = sent(server[0], png(88, 64))
    Path(path).unlink()
    answer = shown(server[0], path, "gone")
    assert "This upload is no longer here; choose it again." in answer and not is_look(answer)


def test_an_upload_outlives_the_longest_queue():
    """At two minutes for each visitor before."""
    from timm_dvt.viewer import app, uploads

    assert uploads.KEPT >= app.WAITING * 120


def test_an_emptied_number_of_groups_is_four_of_them(server):
    answer = shown(server[0], sent(server[0], png(64, 80)), "none", groups=None)
    assert is_look(answer) and "clusters=4" in answer


def test_whatever_goes_wrong_is_told_and_leaves_the_page_as_it_was(capsys):
    import gradio

    from timm_dvt.viewer import app

    def fail(error):
        raise error

    for error, words in (
        (ValueError("/a/path/of/the/server"), "This went wrong (ValueError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: not enough memory"), "too little memory"),
        (MemoryError(), "too little memory"),
    ):
        ((told, *others),) = app._with_notice(lambda error=error: fail(error), lambda: [gradio.skip()] * 2)
        assert words in told and "/a/path" not in told and others == [gradio.skip()] * 2
        assert type(error).__name__ in capsys.readouterr().err


# ---- against some


def test_no_path_that_a_visitor_names_is_read(server, tmp_path):
    secret = save(noise(64, 64), Path(tempfile.gettempdir()) / f"{tmp_path.name}_secret.png")
    try:
        for path in (secret, Path("setup.cfg").resolve(), "/etc/passwd"):
            assert status(f"{server[0]}gradio_api/file={path}")[0] in (403, 404)
        assert status(f"{server[0]}dvt/..%2F..%2Fsetup.cfg/maps.npy")[0] == 404
        assert status(f"{server[0]}dvt/cat-0/..%2Fsetup.cfg")[0] == 404
        assert not is_look(shown(server[0], str(secret), "a")) and secret.exists()
        assert is_look(shown(server[0], sent(server[0], secret.read_bytes()), "b"))  # the same, of a file that was sent
    finally:
        secret.unlink()


def test_a_port_in_use_is_one_clear_line(server, folder, capsys):
    port = server[0].rstrip("/").rsplit(":", 1)[1]
    assert main(["app", "--model", f"local-dir:{folder}", "--port", port]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot serve on 127.0.0.1:{port}" in error


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_one_clear_line_before_anything_slow(host, capsys):
    assert main(["app", "--model", "never-loaded", "--host", host]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and f"cannot serve on {host}" in output.err and "--host" in output.err
    assert not output.out


JSON = {"Content-Type": "application/json"}


RUNS = [f"{how}/{name}" for how in ("run", "api", "call", "call/v2") for name in ("predict", "upload", "reset")]


@pytest.mark.parametrize("path", [*RUNS, "component_server"])
def test_nothing_computes_past_the_queue(path, server):
    body = b'{"fn_index": 0, "data": [null, "x", 6], "session_hash": "a"}'
    assert status(f"{server[0]}gradio_api/{path}", body, JSON)[0] == 404


@pytest.mark.parametrize("path", ["queue/join", "reset", "cancel"])
def test_a_request_that_is_no_upload_is_short(path, server):
    body = b'{"session_hash": "' + b"a" * (1 << 17) + b'"}'
    assert status(f"{server[0]}gradio_api/{path}", body, JSON)[0] == 413
    assert answer(server, path, {"Transfer-Encoding": "chunked"}, b"20000\r\n" + b" " * (1 << 17) + b"\r\n") >= 400


def test_the_files_of_one_request_together_are_no_larger_than_one_may_be(server):
    one = bytes(35 << 20)
    parts = [multipart(one, f"{i}.png").removesuffix(f"--{BOUNDARY}--\r\n".encode()) for i in range(3)]
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    assert answer(server, "upload", MULTIPART | {"Content-Length": str(len(body))}) == 413
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    assert answer(server, "upload", MULTIPART | {"Transfer-Encoding": "chunked"}, chunks) == 413
    assert is_look(shown(server[0], sent(server[0], png(64, 88)), "after"))


def answer(server, path: str, headers: dict, body: bytes = b"") -> int:
    """The code by which a request is answered that may not be read to its end."""
    host, port = server[0].removeprefix("http://").rstrip("/").split(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": host} | headers).items())
    with socket.create_connection((host, int(port)), timeout=60) as line:
        try:
            line.sendall(f"POST /gradio_api/{path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
        except ConnectionError:
            pass
        return int(line.recv(64).split()[1])


@pytest.mark.parametrize(
    "host, code", [("evil.example", 421), ("evil.example:80", 421), ("[", 421), ("localhost", 200)]
)
def test_a_page_for_this_machine_is_not_served_under_another_name(host, code, server):
    assert status(f"{server[0]}config", None, {"Host": host})[0] == code


def test_small_files_without_number_stop_uploads_and_nobody_else(server):
    (folder,) = server[2].glob("timm_dvt_app_*")
    for i in range(1200):
        (folder / f"digest{i}").mkdir()
        (folder / f"digest{i}" / "a.png").write_bytes(b"")
    assert status(f"{server[0]}gradio_api/upload", multipart(png(64, 72), "one.png"), MULTIPART)[0] == 503
    assert status(f"{server[0]}config")[0] == 200
    for waiting in folder.glob("digest*/a.png"):  # as old as those that nobody looks at are when they go
        os.utime(waiting, (time.time() - 4000,) * 2)
    assert is_look(shown(server[0], sent(server[0], png(64, 72)), "after"))
    assert not list(folder.glob("digest*"))


def test_a_folder_that_vanishes_while_it_is_looked_through_is_no_error(tmp_path, monkeypatch):
    from timm_dvt.viewer.uploads import Uploads

    walk = os.walk

    def racing(folder):
        for found in walk(folder):
            for name in found[2]:
                Path(found[0], name).unlink()
            yield found

    (tmp_path / "digest").mkdir()
    (tmp_path / "digest" / "a.png").write_bytes(b"x")
    monkeypatch.setattr(os, "walk", racing)
    assert not Uploads(tmp_path).are_too_many()


def test_what_is_computed_already_is_not_computed_again(folder, monkeypatch):
    from timm_dvt.viewer import studio

    made = studio.Studio(f"local-dir:{folder}")
    key = made.compare(noise(64, 64), made.first)
    with monkeypatch.context() as patched, made.lock:  # another visitor's is being computed
        patched.setattr(studio, "patch_tokens", None)
        assert made.compare(noise(64, 64), made.first) == key
    assert made.compare(noise(64, 80), made.first) != key


def test_a_full_queue_says_how_long_it_will_take():
    """In an answer whose words Gradio's page shows; those of its own refusal, a 503, it does not."""
    import asyncio
    from types import SimpleNamespace

    from timm_dvt.viewer import app
    from timm_dvt.viewer.guard import Guard

    waiting, studio = SimpleNamespace(_queue=[0] * app.WAITING), SimpleNamespace(seconds=9.0)
    assert "30 visitors are waiting, about 4 minutes" in app.busy(waiting, studio)
    assert app.busy(SimpleNamespace(_queue=[]), studio) == ""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join", "headers": []}
    guard = Guard(None, None, None, lambda: app.busy(waiting, studio))
    asyncio.run(guard(scope, None, send))
    assert sent[0]["status"] == 429 and "about 4 minutes" in json.loads(sent[1]["body"])["detail"]


def test_a_busy_port_is_told_before_the_model_is_loaded(server, capsys):
    port = server[0].rstrip("/").rsplit(":", 1)[1]
    assert main(["app", "--model", "never-loaded", "--port", port]) == 2
    said = capsys.readouterr()
    assert f"cannot serve on 127.0.0.1:{port}" in said.err and "--port" in said.err and not said.out


def test_nothing_of_gradios_lies_elsewhere_and_its_recordings_are_closed(server):
    assert not (server[2] / "gradio").exists()
    body = multipart(b"no video", "a.mp4").replace(b"name=files", b"name=video")
    assert status(f"{server[0]}gradio_api/process_recording", body, MULTIPART)[0] == 404
