"""A stand-in for the Hugging Face Hub on loopback: serves a folder ORG/REPO/PATH as the real client asks for it."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `folder` until the process ends; `requests` lists what was asked, as 'METHOD path'."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body: bool):
                hub.requests.append(f"{self.command} {self.path}")
                parts = self.path.split("?")[0].strip("/").split("/")  # ORG/REPO/resolve/REVISION/PATH
                org, repo, resolve = (*parts, "", "", "")[:3]
                path = hub.folder.joinpath(org, repo, *parts[4:])
                if resolve != "resolve" or not (hub.folder / org / repo).is_dir():
                    return self.refuse("RepoNotFound")
                if not path.is_file():
                    return self.refuse("EntryNotFound")
                content = path.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def refuse(self, code: str):
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"
