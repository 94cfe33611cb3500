"""The page of `timm-dvt app` over a small model, started as a person starts it, and what its own script asks of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

import timm_dvt

PATIENCE = 60  # seconds until a test gives up waiting; a busy machine is no failure
BOUNDARY = "the-end-of-a-part"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def small_folder(path: Path) -> Path:
    """A small denoised model, as a folder that timm loads."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "img_size": 96, "dynamic_img_size": True}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    torch.nn.init.normal_(model.denoiser.pos_embed)
    return timm_dvt.save_pretrained(model, path, model_args=arguments)


@contextmanager
def serving(folder: Path, temporary: Path) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """The address of a page, its process and the folder that it makes its temporary ones in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "timm_dvt", "app", "--model", f"local-dir:{folder}", "--port", str(port)]
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    printed = [process.stdout.readline(), process.stdout.readline()]
    assert f"the page is at http://127.0.0.1:{port}/" in printed[1], printed + process.stdout.readlines()
    yield f"http://127.0.0.1:{port}/", process, temporary
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert not [*temporary.glob("gradio*"), *temporary.glob("timm_dvt_*")], "it left a folder behind"


def until(holds: Callable[[], Any], what: str = "") -> Any:
    """The first true value of a condition; the condition may fail while the page is drawn anew."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := holds():
                return found
        except WebDriverException:
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited {PATIENCE} s in vain {what}")


def save(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def noise(*size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def status(address: str, body: bytes | None = None, headers: dict | None = None) -> tuple[int, bytes]:
    """The code and the content of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers or {})) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def multipart(content: bytes, name: str) -> bytes:
    """The body of a request that sends a file."""
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=files; filename={name}\r\n\r\n"
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def sent(address: str, content: bytes, name: str = "a.png") -> str:
    """The path of a file that was sent to the page."""
    (path,) = json.loads(status(f"{address}gradio_api/upload", multipart(content, name), MULTIPART)[1])
    return path


def shown(address: str, path: str, session: str, groups: int | None = 4) -> str:
    """What the page answers when it is asked, as its own script asks, to show the file of a path."""
    config = json.loads(status(f"{address}config")[1])
    (event,) = [e for e in config["dependencies"] if e["targets"][0][1] == "upload"]
    components = {c["id"]: c["props"] for c in config["components"]}
    variant, clusters = event["inputs"][1:3]
    assert components[clusters]["value"] == 4
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, components[variant]["value"], groups, None]
    join = {"fn_index": event["id"], "session_hash": session, "data": data}
    status(f"{address}gradio_api/queue/join", json.dumps(join).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=PATIENCE) as answer:
        (line,) = [line for line in answer if b"process_completed" in line]
    return line.decode()


def is_look(answer: str) -> bool:
    """Whether an answer of `shown` has pictures."""
    return '"success":true' in answer and "data:image" in answer
