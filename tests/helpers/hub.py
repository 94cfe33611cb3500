"""A stand-in for the Hugging Face Hub on loopback: what the real client asks of it to fetch and to publish models."""

import hashlib
import json
import re
import shutil
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.helpers.hub_requests import Handler


class Hub:
    """Serves `folder`/ORG/REPO/PATH as the repos' main branches until the process ends.

    Attributes:
        requests: what was asked, as "METHOD path"; `ranges` the Range headers among them.
        tokens: a token -> the namespaces it may write to. private: ids of repos that only a token opens.
        renamed: an old repo id -> the new one. kinds: of repos that were made, and a Space's SDK.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "main"
        self.kept = folder / "kept"  # ORG/REPO/REVISION: earlier commits and pull requests
        self.blobs: dict[str, bytes] = {}  # uploaded, by SHA-256
        self.hashes: dict[tuple, str] = {}
        self.reset()
        self.url, self.store_url = (self.serve() for _ in range(2))

    def serve(self) -> str:
        """Start to answer on a free port; returns its address. The second is the store's, which gets no token."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    def reset(self) -> None:
        for path in (self.folder, self.kept):
            shutil.rmtree(path, ignore_errors=True)
        self.blobs.clear()
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.faults: list[list] = []
        self.tokens: dict[str, set[str]] = {}
        self.private: set[str] = set()
        self.kinds: dict[str, tuple] = {}
        self.renamed: dict[str, str] = {}

    def fail(self, request: str, how: int | str, times: int = 1) -> None:
        """Answer the next requests with `request` ("GET /cdn") in them with a status, "cut" or with "wrong" bytes."""
        self.faults.append([request, how, times])

    def fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault[0] in request and fault[2] > 0:
                fault[2] -= 1
                return fault[1]
        return None

    # ---- repos

    def keep(self, repo: str, revision: str | None = None) -> str:
        """Keep the main branch as it is under a revision, by default its commit, which is returned."""
        commit = self.commit(self.folder / repo)
        shutil.copytree(self.folder / repo, self.kept / repo / (revision or commit), dirs_exist_ok=True)
        return commit

    def tree(self, repo: str, revision: str) -> Path | None:
        """The folder of a revision: main, a commit or a pull request."""
        main = self.folder / repo
        if revision == "main" or (re.fullmatch("[0-9a-f]{40}", revision) and revision == self.commit(main)):
            return main
        kept = self.kept / repo / revision
        return kept if kept.is_dir() else None

    def commit(self, tree: Path) -> str:
        """What names a state of a repo: a hash of its content."""
        text = json.dumps([(path, self.sha256(tree / path)) for path in self.files(tree)])
        return hashlib.sha1(text.encode()).hexdigest()

    def sha256(self, path: Path) -> str:
        status = path.stat()
        key = (str(path), status.st_mtime_ns, status.st_size, status.st_ino)
        if key not in self.hashes:
            self.hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self.hashes[key]

    def entry(self, tree: Path, path: str) -> dict:
        """A file as the API describes it."""
        content = (tree / path).read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "oid": oid, "size": len(content)}
        if self.is_large(path):
            entry["lfs"] = {"oid": self.sha256(tree / path), "size": len(content), "pointerSize": 134}
        return entry

    def is_large(self, path: str) -> bool:
        """Whether a file is kept apart from git, behind a redirect."""
        return path.endswith((".safetensors", ".pth", ".bin", ".png", ".jpg"))

    def files(self, tree: Path) -> list[str]:
        return sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
