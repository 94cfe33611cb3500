"""Fetching files of the Hub: checked against the Hub's hashes, and every failure told in one line.

Which repo and file a variant is made of stands in `variants.py`.
"""

import hashlib
import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg

from timm_dvt.errors import WeightsNotFoundError, first_line, printable
from timm_dvt.timm_private import download_cached_file, get_safe_alternatives, hf_hub_download, hf_split

WEIGHTS_NAME, TIMMS_WEIGHTS_NAME = "model.safetensors", "pytorch_model.bin"
PROBE_SECONDS = 5.0
PROBE_LASTS = 60.0  # seconds for which an answer of the Hub is trusted to be followed by others
DEAD_LASTS = 10.0  # and a dead network to stay dead: a load asks for several files
Files = list[tuple[str, str, str | None]]  # (repo, file, revision)


def fetch(
    repo: str,
    filename: str,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    needed: Files | None = None,
) -> str:
    """The path of a hub repo's file in the local cache, downloaded if need be, its content checked.

    Args:
        needed: all files that the caller is going to need, for an error without a network to name; default this one.

    Raises:
        WeightsNotFoundError: it is neither on this machine nor can it be had, or is not what the Hub says it is.
    """
    needed = needed or [(repo, filename, revision)]
    dead = dead_network()
    try:
        path = hf_hub_download(
            repo, filename, revision=revision, cache_dir=cache_dir, local_files_only=dead is not None
        )
    except Exception as e:  # the client raises its own, the network library's and the system's errors
        what = f"{repo}/{filename}" + (f" at {revision}" if revision else "")
        raise WeightsNotFoundError(f"Could not fetch {what}: {explain(dead or e, repo, needed)}") from e
    if not _matches_its_hash(path):
        blob = os.path.realpath(path)
        for name in (path, blob):
            Path(name).unlink(missing_ok=True)
        raise WeightsNotFoundError(
            f"{repo}/{filename} in the cache is not what the Hub has (its hash differs from "
            f"{printable(os.path.basename(blob))[:64]}); it was deleted, so run this again to fetch a new copy."
        )
    return path


def fetch_backbone(
    backbone: str, cache_dir: str | os.PathLike | None = None, needed: Files | None = None
) -> str | None:
    """The path of a timm model's own weights, by `fetch`; None where timm has them from elsewhere than the Hub.

    Raises:
        WeightsNotFoundError: as `fetch`.
    """
    files = backbone_files(backbone)
    unanswered: WeightsNotFoundError | None = None
    for file in files:
        try:
            return fetch(*file, cache_dir, needed or files[:1])
        except WeightsNotFoundError as e:
            if not isinstance(e.__cause__, EntryNotFoundError):
                raise
            if unanswered is None and isinstance(e.__cause__, LocalEntryNotFoundError):  # of the cache, not of the Hub
                unanswered = e
            if file == files[-1]:
                raise (unanswered or e)
    return None


_probed: tuple[float, Exception | None] = (-PROBE_LASTS, None)  # when the Hub was last asked, and what came of it


def dead_network() -> Exception | None:
    """What the network says in place of an answer of the Hub, if it is dead: then the cache alone is of use.

    The client would try for 23 seconds, file by file, aloud. None also where that is not known: behind a proxy, or
    where the client itself is told to stay offline.
    """
    global _probed
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return None
    if time.monotonic() - _probed[0] > (DEAD_LASTS if _probed[1] else PROBE_LASTS):
        dead = None
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), PROBE_SECONDS).close()
        except OSError as e:
            dead = ConnectionError(str(e))
        _probed = (time.monotonic(), dead)
    return _probed[1]


def _matches_its_hash(path: str) -> bool:
    """Whether a file of the cache is what its name says; the client itself compares sizes only.

    The cache names a content by its SHA-256, a small file's by git's SHA-1: by whatever the server calls its hash, so a
    name that is none is no proof. Where the file system has no links, and so the file its own name, nothing is known.
    """
    blob = Path(os.path.realpath(path))
    if blob.parent.name != "blobs":
        return True
    return blob.name.lower() == (sha256(path) if len(blob.name) == 64 else git_hash(path))


def sha256(path: str | os.PathLike) -> str:
    """By what the Hub names a large file."""
    return _digest(path, hashlib.sha256())


def git_hash(path: str | os.PathLike) -> str:
    """By what the Hub names a small file."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % os.path.getsize(path)))


def _digest(path: str | os.PathLike, digest) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def explain(error: BaseException, repo: str, needed: Files | None = None) -> str:
    """What went wrong with a request to the Hub about a repo, and what to do about it, in one line.

    Args:
        needed: the files to fetch beforehand where there is no network.
    """
    from huggingface_hub import errors

    cause: BaseException = error
    while isinstance(cause, (errors.LocalEntryNotFoundError, RuntimeError)) and cause.__cause__ is not None:
        cause = cause.__cause__  # the client found nothing in the cache after this, or could not upload because of it
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return f"{repo} is gated; accept its terms at https://huggingface.co/{repo}, then log in: hf auth login"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"there is no such repo as {repo}, or it is private; check the name, and for a private one log in "
            f"(hf auth login; huggingface-cli login below huggingface_hub 1.0) or set HF_TOKEN"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{repo} has no such revision; those it has are at https://huggingface.co/{repo}/commits/main"
    if isinstance(cause, errors.EntryNotFoundError) and not isinstance(cause, errors.LocalEntryNotFoundError):
        return f"{repo} has no such file; those it has are at https://huggingface.co/{repo}/tree/main"
    if status == 401 or isinstance(cause, errors.LocalTokenNotFoundError):
        return "this needs a token that the Hub knows; log in (hf auth login) or set HF_TOKEN"
    if status == 403:
        return f"the token may not do this in {repo}; make one that may at https://huggingface.co/settings/tokens"
    if status == 429:
        return "the Hub was asked too often (429); wait some minutes, then run this again"
    if status is not None and status >= 500:
        return f"the Hub has trouble of its own ({status}); run this again later"
    said = f"{type(cause).__name__}: {first_line(cause)}"
    if status is not None or getattr(cause, "errno", None) or not is_fetch_error(cause):
        return said
    if not needed:
        return f"no network, or none that reaches the Hub ({said})"
    fetching = " && ".join(f"hf download {r} {f}" + (f" --revision {v}" if v else "") for r, f, v in needed)
    return (
        f"no network, or none that reaches the Hub ({said}); where there is one, run: {fetching} "
        f"(huggingface_hub below 1.0: huggingface-cli download), and the files are read from the cache"
    )


def is_fetch_error(error: BaseException) -> bool:
    """Whether an error comes from fetching a file, rather than from what is in it."""
    from huggingface_hub.errors import HfHubHTTPError

    library = type(error).__module__.split(".")[0]
    return isinstance(error, (OSError, HfHubHTTPError)) or library in ("httpx", "httpx2", "requests")


def backbone_files(backbone: str) -> Files:
    """What timm looks for on the Hub for a backbone, in this order: safetensors, then what its config names.

    Args:
        backbone: a name of timm's, or hf-hub:REPO.
    """
    scheme, _, hub_id = backbone.partition(":")
    cfg = None if hub_id else get_pretrained_cfg(scheme)
    if cfg is not None:
        hub_id = cfg.hf_hub_id or ""
    if not hub_id:
        return []
    name = (cfg and cfg.hf_hub_filename) or TIMMS_WEIGHTS_NAME
    repo, revision = hf_split(hub_id)
    return [(repo, filename, revision) for filename in (*get_safe_alternatives(name), name)]


def hub_file(cfg: dict) -> tuple[str, str, str | None] | None:
    """The repo, file and revision that a pretrained_cfg names."""
    if not cfg.get("hf_hub_id"):
        return None
    repo, revision = hf_split(cfg["hf_hub_id"])
    # What a repo's own config.json says of a file is not heeded: its weights are safetensors by this name.
    filename = None if cfg.get("source") == "hf-hub" else cfg.get("hf_hub_filename")
    return repo, filename or WEIGHTS_NAME, revision


def locate(cfg: dict, backbone: str, whole: bool = False, cache_dir: str | os.PathLike | None = None) -> str:
    """The path of the weights that a pretrained_cfg names, fetched from the Hub if need be.

    Args:
        backbone: the backbone's timm name. whole: whether the file holds its weights too.

    Raises:
        WeightsNotFoundError: there are none, or they cannot be fetched.
    """
    if cfg.get("source") != "hf-hub" and cfg.get("file"):
        return str(cfg["file"])
    weights_file = hub_file(cfg)
    if weights_file:
        return fetch(*weights_file, cache_dir, needed=[weights_file, *([] if whole else backbone_files(backbone)[:1])])
    if cfg.get("url"):
        return download_cached_file(cfg["url"], check_hash=False, cache_dir=cache_dir)
    raise WeightsNotFoundError(
        f"No denoiser has been published for {backbone}. Create the model with pretrained=False and train one, or pass "
        f"pretrained_cfg_overlay=dict(file='PATH') with a denoiser of your own."
    )


def weights_file_of(folder: str) -> str:
    """The path of a saved model's weights: ours, or those of timm's `save_for_hf` by its defaults."""
    ours, timms = (os.path.join(folder, name) for name in (WEIGHTS_NAME, TIMMS_WEIGHTS_NAME))
    return timms if os.path.exists(timms) and not os.path.exists(ours) else ours
