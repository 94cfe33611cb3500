"""The real huggingface_hub client and its command lines against the stand-in hub: all that a download can meet."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import venv
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

import timm_dvt
from tests.helpers.fabricated import BACKBONE, publish_tiny
from timm_dvt import timm_private
from timm_dvt.__main__ import main
from timm_dvt.loading import create_model
from timm_dvt.weights.fetching import fetch

REPO = "someone/tiny"
NO_NETWORK = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small denoised model as a folder."""
    torch.manual_seed(0)
    arguments = {"depth": 1, "img_size": 64, "dynamic_img_size": True}
    model = timm_dvt.add_denoiser(timm.create_model("vit_tiny_patch16_224", **arguments))
    return timm_dvt.save_pretrained(model, tmp_path_factory.mktemp("saved"), model_args=arguments)


@pytest.fixture
def repo(hub, saved):
    """The folder as a repo of the hub."""
    (hub.folder / REPO).mkdir(parents=True)
    for path in saved.iterdir():
        (hub.folder / REPO / path.name).write_bytes(path.read_bytes())
    return hub.folder / REPO


@pytest.fixture(scope="session")
def huggingface_cli(tmp_path_factory):
    """huggingface-cli, which exists below huggingface_hub 1.0 alone: $HUGGINGFACE_CLI, or installed for this."""
    if "HUGGINGFACE_CLI" in os.environ:
        return [os.environ["HUGGINGFACE_CLI"]]
    folder = tmp_path_factory.mktemp("old") / "venv"
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "huggingface_hub<1.0"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("huggingface_hub<1.0 cannot be installed here")
    return [str(folder / "bin" / "huggingface-cli")]


@pytest.fixture
def client(request):
    """The command line of either generation of the client."""
    if request.param == "hf":
        if int(huggingface_hub.__version__.split(".")[0]) < 1:
            pytest.skip("hf came with huggingface_hub 1.0")
        return [str(Path(sys.executable).with_name("hf"))]
    return request.getfixturevalue("huggingface_cli")


both = pytest.mark.parametrize("client", ["hf", pytest.param("huggingface-cli", marks=pytest.mark.slow)], indirect=True)


def run(client, *arguments, **environment):
    return subprocess.run(
        [*client, *map(str, arguments)], env={**os.environ, **environment}, capture_output=True, text=True
    )


def weights(folder: Path) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.fixture
def naps(monkeypatch):
    """The client's waits between two tries, not waited."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


# ---- the command lines


@both
def test_the_command_line_downloads_a_repo_that_then_loads(client, hub, repo, saved, tmp_path):
    result = run(client, "download", REPO, "--local-dir", tmp_path / "got")
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path / "got") == weights(saved)
    images = torch.randn(1, 3, 64, 64)
    ours, theirs = (
        timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(images)
        for folder in (saved, tmp_path / "got")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@both
def test_the_command_line_fills_the_cache_that_create_model_reads_offline(client, hub, tmp_path):
    name = publish_tiny(hub)
    home = tmp_path / "home"
    for repo, file in (
        ("jjiaweiyang/DVT", f"voc_denoised/{BACKBONE}.pth"),
        (f"timm/{BACKBONE}", "model.safetensors"),
    ):
        assert run(client, "download", repo, file, HF_HOME=str(home)).returncode == 0
    code = (
        f"import timm_dvt, timm; timm_dvt.register({BACKBONE!r}, 'dvt_small', resolution=96, "
        f"hub_id='jjiaweiyang/DVT', hub_file='voc_denoised/{BACKBONE}.pth'); "
        f"print(float(timm.create_model({name!r}, pretrained=True).denoiser.pos_embed.detach().sum()))"
    )
    offline = run([sys.executable, "-c", code], HF_HOME=str(home), **NO_NETWORK)
    want = float(timm.create_model(name, pretrained=True, cache_dir=tmp_path / "c").denoiser.pos_embed.detach().sum())
    assert offline.returncode == 0 and float(offline.stdout) == want


@pytest.fixture
def large(hub):
    """A file of more than two of the 10 MiB chunks that the client writes at a time."""
    content = torch.randint(256, (24 << 20,), dtype=torch.uint8).numpy().tobytes()
    (hub.folder / "someone" / "large").mkdir(parents=True)
    (hub.folder / "someone" / "large" / "model.safetensors").write_bytes(content)
    return content


@both
def test_a_connection_cut_in_the_middle_is_resumed_from_there(client, hub, large, tmp_path):
    hub.fail("GET /cdn", "cut")
    for _ in range(2):  # below 1.0 the client leaves a second try to the person
        result = run(client, "download", "someone/large", "model.safetensors", "--local-dir", tmp_path)
        if result.returncode == 0:
            break
    assert result.returncode == 0, result.stderr
    assert weights(tmp_path) == large
    assert len(hub.ranges) == 1 and 10 << 20 <= start(hub.ranges[0]) <= 12 << 20


def start(span: str) -> int:
    return int(span.removeprefix("bytes=").removesuffix("-"))


@both
def test_a_private_repo_needs_a_token(client, hub, repo, tmp_path):
    hub.private.add(REPO)
    hub.tokens["hf_reader"] = set()
    refused = run(client, "download", REPO, "--local-dir", tmp_path / "no")
    assert refused.returncode != 0 and "authenticated" in refused.stderr + refused.stdout
    assert not (tmp_path / "no" / "model.safetensors").exists()
    assert run(client, "download", REPO, "--local-dir", tmp_path / "got", HF_TOKEN="hf_reader").returncode == 0
    assert weights(tmp_path / "got") == weights(repo)


@both
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(client, status, hub, repo, saved, tmp_path):
    hub.fail("HEAD /someone", status)
    result = run(client, "download", REPO, "config.json", "--local-dir", tmp_path / "got")
    if result.returncode:  # below 1.0 the client leaves a second try to the person
        result = run(client, "download", REPO, "config.json", "--local-dir", tmp_path / "got")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "got" / "config.json").read_bytes() == (saved / "config.json").read_bytes()


# ---- the client in the process, as timm uses it


def load(tmp_path, revision=""):
    return timm.create_model(f"hf-hub:{REPO}{revision}", pretrained=True, cache_dir=tmp_path).eval()


def test_a_second_load_downloads_nothing(hub, repo, tmp_path):
    first = load(tmp_path)
    hub.requests.clear()
    second = load(tmp_path)
    assert not [request for request in hub.requests if request.startswith("GET")]
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(first.forward_features(images), second.forward_features(images))


def test_a_renamed_repo_is_followed(hub, repo, tmp_path):
    hub.renamed["former/name"] = REPO
    model = timm.create_model("hf-hub:former/name", pretrained=True, cache_dir=tmp_path)
    assert isinstance(model, timm_dvt.Denoised)


def test_a_pinned_revision_stays_what_it_was(hub, repo, saved, tmp_path):
    old = hub.keep(REPO)
    other = timm.create_model(f"local-dir:{saved}", pretrained=True)
    with torch.no_grad():
        other.denoiser.pos_embed.add_(1)
    timm_dvt.save_pretrained(other, repo)
    before = timm.create_model(f"local-dir:{saved}", pretrained=True).denoiser.pos_embed
    assert torch.equal(load(tmp_path, f"@{old}").denoiser.pos_embed, before)
    assert torch.equal(load(tmp_path).denoiser.pos_embed, other.denoiser.pos_embed)


def test_a_fetch_is_resumed_after_two_cuts(hub, large, tmp_path, naps):
    hub.fail("GET /cdn", "cut", times=2)
    assert Path(fetch("someone/large", "model.safetensors", None, tmp_path)).read_bytes() == large
    assert [start(span) >= 10 << 20 for span in hub.ranges] == [True, True]


def failure(tmp_path, filename="model.safetensors", revision=None, repo=REPO) -> str:
    with pytest.raises(timm_dvt.WeightsNotFoundError) as caught:
        fetch(repo, filename, revision, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_bytes_are_found_out_and_not_kept(hub, repo, saved, tmp_path):
    hub.fail("GET /cdn", "wrong")
    assert "its hash differs" in failure(tmp_path)
    assert Path(fetch(REPO, "model.safetensors", None, tmp_path)).read_bytes() == weights(saved)


def test_wrong_bytes_of_a_small_file_are_found_out(hub, repo, tmp_path):
    hub.fail("GET /someone/tiny/resolve", "wrong")
    assert "its hash differs" in failure(tmp_path, "config.json")


def test_a_file_that_was_changed_in_the_cache_is_found_out(hub, repo, saved, tmp_path):
    path = Path(fetch(REPO, "model.safetensors", None, tmp_path))
    path.resolve().write_bytes(b"\0" * 100)
    assert "its hash differs" in failure(tmp_path)
    assert Path(fetch(REPO, "model.safetensors", None, tmp_path)).read_bytes() == weights(saved)


def test_each_failure_is_one_line_that_says_what_to_do(hub, repo, tmp_path, naps):
    assert "no such file" in failure(tmp_path, "other.safetensors")
    assert "no such revision" in failure(tmp_path, revision="no-branch")
    assert "no such repo as no/repo, or it is private" in failure(tmp_path, repo="no/repo")
    hub.private.add(REPO)
    assert "hf auth login" in failure(tmp_path)
    hub.private.clear()
    hub.fail("HEAD /someone", 429, times=99)
    assert "asked too often (429); wait some minutes" in failure(tmp_path)
    hub.faults.clear()
    hub.fail("HEAD /someone", 503, times=99)
    assert "trouble of its own (503); run this again later" in failure(tmp_path)
    hub.faults.clear()
    hub.fail("GET /cdn", 500, times=99)
    assert "(500)" in failure(tmp_path)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_trouble_is_waited_for(status, hub, repo, tmp_path, naps):
    hub.fail("HEAD /someone", status, times=2)
    assert isinstance(load(tmp_path), timm_dvt.Denoised)


@pytest.mark.slow
def test_without_network_a_cached_repo_loads_and_another_says_how(hub, repo, tmp_path):
    load(tmp_path)
    code = "import sys, timm, timm_dvt; timm.create_model(sys.argv[1], pretrained=True, cache_dir=sys.argv[2])"
    assert run([sys.executable, "-c", code], f"hf-hub:{REPO}", tmp_path, **NO_NETWORK).returncode == 0
    name = "vit_base_patch16_224.mae_dvt"
    error = run([sys.executable, "-c", code], name, tmp_path, **NO_NETWORK).stderr.strip().splitlines()[-1]
    assert "no network" in error and f"hf download jjiaweiyang/DVT voc_denoised/{name[:-4]}.pth && " in error


@pytest.mark.slow
def test_a_fetch_shows_a_person_its_rate_and_what_is_left(repo, tmp_path):
    """Bars are drawn on terminals only, so this gives it one."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # 24 lines of 120 columns
    code = f"from timm_dvt.weights.fetching import fetch; fetch({REPO!r}, 'model.safetensors')"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment |= {"HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], stderr=end, env=environment, check=True)
    os.close(end)
    shown = ""
    with open(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):  # how a terminal's end is told
        while part := file.read(1 << 12):
            shown += part.decode(errors="replace")
    assert re.search(r"100%.*MB?.*\[\d\d:\d\d<\d\d:\d\d, .*B/s", shown)


# ---- what timm would fetch itself, and a dead network


@pytest.mark.parametrize("how", ["variant", "by name", "by repo"])
def test_a_byte_of_the_backbone_that_changed_on_the_way_is_found_out_and_not_kept(how, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = publish_tiny(hub)
    repo = f"timm/{BACKBONE}"
    timm_private.save_config_for_hf(timm.create_model(BACKBONE), hub.folder / repo / "config.json")
    make = partial(create_model, {"variant": name, "by name": BACKBONE, "by repo": f"hf-hub:{repo}"}[how], True)
    if how == "variant":
        fetch("jjiaweiyang/DVT", f"voc_denoised/{BACKBONE}.pth")  # is here: the next fetch is the backbone's
    hub.fail("GET /cdn", "wrong")
    with pytest.raises(timm_dvt.WeightsNotFoundError, match=f"{repo}/model.safetensors.*its hash differs"):
        make()
    made = make()
    want = safetensors.torch.load_file(hub.folder / repo / "model.safetensors")["cls_token"]
    assert torch.equal(made.cls_token, want)


@pytest.mark.parametrize("etag", ["upper", "none", "short"])
def test_an_etag_that_is_no_hash_proves_nothing(etag, hub, repo, tmp_path, monkeypatch):
    from tests.helpers.hub_requests import Handler

    def lie(self, name, value, _send=Handler.send_header):
        names = {
            "upper": value.upper(),
            "none": '"v1.2"',
            "short": value[:33] + '"' if value[:1] == '"' else value[:33],
        }
        _send(self, name, names[etag] if name.lower() in ("etag", "x-linked-etag") else value)

    monkeypatch.setattr(Handler, "send_header", lie)
    if etag == "upper":
        assert Path(fetch(REPO, "model.safetensors", None, tmp_path)).is_file()
        hub.fail("GET /cdn", "wrong")
        assert "its hash differs" in failure(tmp_path / "other")
    else:
        assert "its hash differs" in failure(tmp_path)


def test_a_dead_network_is_told_at_once_and_changes_no_setting_in_any_thread(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("timm_dvt.weights.fetching._probed", (-1e9, None))
    seen, download = [], timm_dvt.weights.fetching.hf_hub_download

    def look(*args, **kwargs):
        seen.append((huggingface_hub.constants.HF_HUB_OFFLINE, kwargs["local_files_only"]))
        return download(*args, **kwargs)

    monkeypatch.setattr("timm_dvt.weights.fetching.hf_hub_download", look)
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(failure(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(False, True)] * 4 and not huggingface_hub.constants.HF_HUB_OFFLINE
    assert len(said) == 4 and all("no network" in text and "HF_HUB_OFFLINE" not in text for text in said)


def test_a_repo_in_the_cache_is_loaded_by_its_name_on_a_dead_network(hub, repo, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    want = create_model(f"hf-hub:{REPO}", True).denoiser.pos_embed
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("timm_dvt.weights.fetching._probed", (-1e9, None))
    assert torch.equal(create_model(f"hf-hub:{REPO}", True).denoiser.pos_embed, want)
    with pytest.raises(timm_dvt.WeightsNotFoundError, match="no network.*hf download no/repo config.json"):
        create_model("hf-hub:no/repo", True)


def test_a_plain_repo_of_timms_default_file_is_loaded_on_a_dead_network_too(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    small = {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": 32}
    timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **small),
        hub.folder / "me/bin",
        safe_serialization=False,
        model_args=small,
    )
    want = create_model("hf-hub:me/bin", True).pos_embed
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("timm_dvt.weights.fetching._probed", (-1e9, None))
    assert torch.equal(create_model("hf-hub:me/bin", True).pos_embed, want)


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--model", "vit_smal_patch14_dinov2.lvd142m_dvt"],
        ["calibrate", "--model", "vit_smal_patch14_dinov2.lvd142m", "--out", "OUT"],
        ["convert", "--model", "vit_smal_patch14_dinov2.lvd142m_dvt", "--out", "OUT"],
        ["push", "vit_smal_patch14_dinov2.lvd142m_dvt", "--repo", "me/x"],
    ],
    ids=lambda command: command[0],
)
def test_a_typo_of_a_models_name_is_answered_by_those_most_like_it(command, tmp_path, capsys):
    assert main([str(tmp_path / "out") if word == "OUT" else word for word in command]) == 2
    assert re.search("did you mean .*vit_small_patch14_dinov2.lvd142m", capsys.readouterr().err)
