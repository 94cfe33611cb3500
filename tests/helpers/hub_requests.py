"""What the stand-in for the Hub answers to each request of the real client's, to fetch and to publish models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from tests.helpers.hub import Hub


class Handler(BaseHTTPRequestHandler):
    """One connection. A method that serves a route takes what its pattern's groups hold."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def serve(self) -> None:
        self.body = self.read_body()
        self.query = parse_qs(urlsplit(self.path).query)
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        if "Range" in self.headers:
            self.hub.ranges.append(self.headers["Range"])
        self.broken = self.hub.fault(request)
        if isinstance(self.broken, int):
            return self.send(self.broken, headers={"Retry-After": "0"} if self.broken == 429 else {})
        for pattern, route in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                return route(self, *match.groups())
        self.send(404)

    do_HEAD = do_GET = do_POST = do_PUT = serve

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, content: object = b"", headers: dict | None = None) -> None:
        """Answer; what is not bytes goes out as JSON."""
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"} | (headers or {})
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.broken == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        if self.broken == "wrong":
            content = bytes(byte ^ 1 for byte in content)
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass

    # ---- who may do what

    @property
    def namespaces(self) -> set[str] | None:
        """Where the request's token may write; None without a valid token."""
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def readable(self, repo: str, revision: str = "main") -> Path | None:
        """The revision's folder, or None after an answer that says what is wrong with it."""
        hidden = repo in self.hub.private and self.namespaces is None
        if hidden or not (self.hub.folder / repo).is_dir():
            # The Hub does not tell a stranger whether a repo is private or not there.
            self.send(401 if self.namespaces is None else 404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        tree = self.hub.tree(repo, revision)
        if tree is None:
            self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        return tree

    def writable(self, repo: str) -> bool:
        if self.namespaces is None:
            self.send(401, {"error": "Invalid username or password."})
        elif repo.split("/")[0] not in self.namespaces:
            self.send(403, {"error": "You do not have the rights."}, {"X-Error-Message": "You don't have the rights"})
        else:
            return True
        return False

    # ---- fetching

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if repo in self.hub.renamed:
            return self.send(307, headers={"Location": f"/{self.hub.renamed[repo]}/resolve/{revision}/{path}"})
        tree = self.readable(repo, revision)
        if tree is None:
            return
        commit = {"X-Repo-Commit": self.hub.commit(tree)}
        if not (tree / path).is_file():
            return self.send(404, headers=commit | {"X-Error-Code": "EntryNotFound"})
        entry = self.hub.entry(tree, path)
        if "lfs" in entry:
            sha, size = entry["lfs"]["oid"], entry["size"]
            linked = {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(size)}
            self.hub.blobs[sha] = (tree / path).read_bytes()
            return self.send(302, headers=commit | linked | {"Location": f"{self.hub.store_url}/cdn/{sha}"})
        self.send_file((tree / path).read_bytes(), commit | {"ETag": f'"{entry["oid"]}"'})

    def cdn(self, sha: str) -> None:
        if "Authorization" in self.headers:
            return self.send(400, {"error": "a token left the Hub"})
        self.send_file(self.hub.blobs[sha], {"ETag": f'"{sha}"'})

    def send_file(self, content: bytes, headers: dict) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, content, headers)
        start = int(wanted[1])
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206, content[start:], headers | {"Content-Range": span})

    def info(self, repo: str, revision: str | None) -> None:
        tree = self.readable(repo, revision or "main")
        if tree is None:
            return
        siblings = []
        for path in self.hub.files(tree):
            entry = self.hub.entry(tree, path)
            sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        private = repo in self.hub.private
        answer = {"_id": "0", "id": repo, "modelId": repo, "sha": self.hub.commit(tree), "private": private}
        self.send(200, answer | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def list_tree(self, repo: str, revision: str) -> None:
        tree = self.readable(repo, revision)
        if tree is not None:
            self.send(200, [self.hub.entry(tree, path) for path in self.hub.files(tree)])

    # ---- publishing

    def who(self) -> None:
        if self.namespaces is None:
            return self.send(401, {"error": "Invalid username or password."})
        self.send(200, {"type": "user", "name": min(self.namespaces, default="nobody"), "orgs": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted['organization'] or min(self.namespaces or {'nobody'})}/{wanted['name']}"
        if not self.writable(repo):
            return
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if (self.hub.folder / repo).is_dir():
            return self.send(409, answer | {"error": "You already created this model repo"})
        (self.hub.folder / repo).mkdir(parents=True)
        self.hub.kinds[repo] = (wanted.get("type") or "model", wanted.get("sdk"))
        (self.hub.folder / repo / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repo)
        self.send(200, answer)

    def validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        fields = yaml.safe_load(header[1]) if header else {}
        bad = [{"message": f'"{key}" must be a string'} for key in ("license",) if not isinstance(fields.get(key), str)]
        self.send(400 if bad else 200, {"errors": bad, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if not self.writable(repo) or (tree := self.readable(repo, revision)) is None:
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            entry = self.hub.entry(tree, path) if (tree / path).is_file() else {}
            oid = entry.get("lfs", entry).get("oid")
            mode = "lfs" if self.hub.is_large(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answer})

    def batch(self, repo: str) -> None:
        if not self.writable(repo):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.store_url}/lfs/{wanted['oid']}"}
            missing = wanted["oid"] not in self.hub.blobs
            objects.append(wanted | ({"actions": {"upload": upload}} if missing else {}))
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, sha: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha:
            return self.send(400, {"error": "The content is not what its hash says."})
        self.hub.blobs[sha] = self.body
        self.send(200)

    def commit(self, repo: str, revision: str) -> None:
        if not self.writable(repo) or self.readable(repo, revision) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        values = [line["value"] for line in lines if line["key"] in ("file", "lfsFile")]
        if lines[0]["key"] != "header" or any(".." in v["path"] or v["path"].startswith("/") for v in values):
            return self.send(400, {"error": "malformed commit"})
        if any("oid" in value and value["oid"] not in self.hub.blobs for value in values):
            return self.send(400, {"error": "a file of this commit was never uploaded"})
        self.hub.keep(repo)
        tree = self.hub.folder / repo
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/main"}
        if self.query.get("create_pr") == ["1"]:
            self.hub.keep(repo, "refs/pr/1")
            tree = self.hub.kept / repo / "refs/pr/1"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        for value in values:
            (tree / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            content = self.hub.blobs[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
            (tree / value["path"]).unlink(missing_ok=True)
            (tree / value["path"]).write_bytes(content)
        self.send(200, answer | {"commitOid": self.hub.commit(tree)})


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable]] = [
    (rf"(?:GET|HEAD) /{REPO}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
    (r"(?:GET|HEAD) /cdn/([0-9a-f]{64})", Handler.cdn),
    (rf"GET /api/(?:models|spaces)/{REPO}(?:/revision/(.+))?", Handler.info),
    (rf"GET /api/(?:models|spaces)/{REPO}/tree/(.+)", Handler.list_tree),
    (r"GET /api/whoami-v2", Handler.who),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/(?:models|spaces)/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"POST /(?:spaces/)?{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/([0-9a-f]{64})", Handler.store),
    (rf"POST /api/(?:models|spaces)/{REPO}/commit/(.+)", Handler.commit),
]
