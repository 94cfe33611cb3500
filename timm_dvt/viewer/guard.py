"""What the server of the page lets in: requests that the page itself makes, under its own name, of bounded size."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse

from timm_dvt.errors import UserError
from timm_dvt.viewer.uploads import MEGABYTES, Uploads

LARGEST, SHORT = (int(MEGABYTES) << 20) + (1 << 16), 1 << 16  # bytes of a request; all but uploads are short
TOO_LARGE = PlainTextResponse(f"This is too large; the most that is taken is {MEGABYTES} MB.", 413)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'"
)
# What the page sends: others of Gradio's run events past the queue, or write what they are sent into files. Whole
# paths, for those that run an event end in any name.
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"
POSTS = (UPLOAD, JOIN, "/gradio_api/reset", "/gradio_api/cancel")


class Guard:
    """Tells browsers that nothing from elsewhere belongs to this page, and lets in what the page itself sends.

    Args:
        hosts: names under which it may be asked for, or a page from elsewhere could bring a browser to ask here in its
            own name; None for any.
        busy: says what is answered while nobody else can be taken into the queue; nothing while somebody can.
    """

    def __init__(self, app: Any, uploads: Uploads, hosts: set[str] | None, busy: Callable[[], str]):
        self.app, self.uploads, self.hosts, self.busy = app, uploads, hosts, busy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"].rstrip("/")
        uploading = path == UPLOAD
        room = LARGEST if uploading else SHORT
        length = headers.get("content-length", "")
        coming = int(length) if length.isdecimal() and len(length) < 16 else room if uploading else 0
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            return await PlainTextResponse("This page has another name.", 421)(scope, receive, send)
        if scope["method"] not in ("GET", "HEAD") and path not in POSTS:
            return await PlainTextResponse("There is no such page.", 404)(scope, receive, send)
        if path == JOIN and (refusal := self.busy()):
            # Gradio's page shows what a 429 says; of the 503 with which Gradio itself refuses, it does not.
            return await JSONResponse({"detail": refusal}, 429)(scope, receive, send)
        if coming > room:
            return await TOO_LARGE(scope, receive, send)

        async def counted() -> Any:
            nonlocal room
            message = await receive()
            room -= len(message.get("body", b""))
            # Of a request that did not say how large it is, or not the truth, no more is read.
            return message if room >= 0 else {"type": "http.disconnect"}

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            await send(message)

        me = object()
        self.uploads.incoming[me] = coming if uploading else 0
        try:
            if uploading and await asyncio.to_thread(self.uploads.are_too_many):
                text = "Too many uploads are waiting here; try again in some minutes."
                return await PlainTextResponse(text, 503)(scope, receive, send)
            await self.app(scope, counted, guarded)
        except ClientDisconnect:
            if room < 0:
                await TOO_LARGE(scope, receive, send)
        finally:
            del self.uploads.incoming[me]


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def names_of(host: str) -> set[str] | None:
    """What a page that is served on an address may be asked for by; None for any, where it is served on all."""
    return None if host in ("0.0.0.0", "::", "") else {host.strip("[]").lower(), "127.0.0.1", "localhost", "::1"}


def check_address(host: str, port: int | None) -> None:
    """Raise UserError for an address that cannot be served on, before anything slow.

    Of one that is not this machine's Gradio would try a hundred ports, for minutes.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as e:
        raise UserError(
            f"cannot serve on {host}: it is not an address of this machine; leave --host out, or use 0.0.0.0 for all"
        ) from e
    if port is None:
        return
    try:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as servers do: the last one may have just left
            probe.bind((address[0], port, *address[2:]))
    except OSError as e:
        raise UserError(f"cannot serve on {host}:{port}: {e.strerror}; leave --port out for a free one") from e
