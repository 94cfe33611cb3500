"""Fetching files of the Hub: checked against the Hub's hashes, and every failure told in one line."""

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from timm.models import get_pretrained_cfg

from timm_dvt.timm_private import get_safe_alternatives, hf_hub_download

WEIGHTS_NAME = "model.safetensors"
PROBE_SECONDS = 5.0
PROBE_LASTS = 60.0  # seconds for which an answer of the Hub is trusted to be followed by others
Files = list[tuple[str, str, str | None]]  # (repo, file, revision)


class WeightsNotFoundError(RuntimeError):
    """Weights that are not on this machine and could not be fetched. One line: which, why, and what to do."""


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
    with without_dead_network() as dead:
        try:
            path = hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir)
        except Exception as e:  # the client raises its own, the network library's and the system's errors
            what = f"{repo}/{filename}" + (f" at {revision}" if revision else "")
            raise WeightsNotFoundError(f"Could not fetch {what}: {explain(dead or e, repo, needed)}") from e
    if not _matches_its_hash(path):
        for name in (path, os.path.realpath(path)):
            Path(name).unlink(missing_ok=True)
        raise WeightsNotFoundError(
            f"{repo}/{filename} in the cache is not what the Hub has (its hash differs); it was deleted, so run this "
            f"again to fetch it anew."
        )
    return path


_answered = -PROBE_LASTS  # when the Hub last answered


@contextmanager
def without_dead_network() -> Iterator[Exception | None]:
    """Where the Hub does not answer, use the cache alone: its client would try for 23 seconds, file by file, aloud.

    Yields:
        What the network said in place of an answer, if it is dead.
    """
    global _answered
    from huggingface_hub import constants, utils

    before, dead = constants.HF_HUB_OFFLINE, None
    # Below huggingface_hub 1.0 a session decides when it is made whether it may use the network.
    renew = getattr(utils, "reset_sessions", lambda: None)
    address = urlsplit(constants.ENDPOINT)
    # Behind a proxy nothing is known of the Hub from here.
    if not before and not getproxies() and time.monotonic() - _answered > PROBE_LASTS:
        try:
            port = address.port or (443 if address.scheme == "https" else 80)
            socket.create_connection((address.hostname or "", port), PROBE_SECONDS).close()
            _answered = time.monotonic()
        except OSError as e:
            dead, constants.HF_HUB_OFFLINE = ConnectionError(str(e)), True
            renew()
    try:
        yield dead
    finally:
        if constants.HF_HUB_OFFLINE != before:
            constants.HF_HUB_OFFLINE = before
            renew()


def _matches_its_hash(path: str) -> bool:
    """Whether a file of the cache is what its name says; the client itself compares sizes only.

    The cache names a content by its SHA-256, a small file's by git's SHA-1. Where the file system has no links, and so
    the file its own name, nothing is known.
    """
    name = os.path.basename(os.path.realpath(path))
    if not re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", name):
        return True
    return name == (sha256(path) if len(name) == 64 else git_hash(path))


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
    """What timm fetches for a backbone: the safetensors twin of the name its config records."""
    cfg = get_pretrained_cfg(backbone)
    if cfg is None or not cfg.hf_hub_id:
        return []
    twins = get_safe_alternatives(cfg.hf_hub_filename or "pytorch_model.bin")
    return [(cfg.hf_hub_id, next(iter(twins), WEIGHTS_NAME), None)]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of a length to print."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
