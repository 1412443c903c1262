"""What the page's server lets through: an ASGI middleware before Gradio's own routes.

Gradio serves more than this page needs: other sites through a proxy, files of the working folder's cache,
downloads of any address that a request names in place of an uploaded picture. Here a request passes only if
it is on the list, and names no file but one that was uploaded to this page. What changes something (POST) has
to come from this page or from a program: a browser sends it for pages of other sites too, without asking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_JSON = 1_000_000  # bytes
UPLOAD = "/gradio_api/upload"
MOST_PER_UPLOAD = 32_000_000  # bytes of a request; Gradio bounds the files in it to 20 MB each and to 1000
FILES_PER_UPLOAD = 1000
MOST_UPLOADED = 1_000_000_000  # bytes that are there at a time, and files
MOST_FILES = 20_000

_READ = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.+)"
    r"|/gradio_api/(info/?|openapi\.json|startup-events|app_id/?|heartbeat/\w+|queue/(data|status)|upload_progress"
    r"|call/\w+/\w+|file=.+)"
)
_WRITE = re.compile(r"/gradio_api/(upload|queue/join|cancel|reset/?|call/(v2/)?\w+/?)")
_HEADERS = {
    # Gradio's page has scripts and styles in it, and compiles templates; what it loads is all from here
    b"content-security-policy": b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "
    b"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
_LONE_PAGE = {
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses what the page does not need, in a line of plain text.

    Args:
        app: what the rest is handed to.
        uploads: the folder of this page's uploads, the only one that files are served from.
        hosts: names under which this machine may be addressed; any if empty. A page on the internet that has
            its own name point here is refused.
        files: path of a request → a file that is served there, and may not run scripts.
    """

    def __init__(
        self, app: ASGIApp, *, uploads: Path, hosts: frozenset[str], files: Mapping[str, Path]
    ) -> None:
        self.app = app
        self.uploads = uploads.resolve()
        self.hosts, self.files = hosts, files
        self._arriving: list[int] = []  # bytes of the uploads that are not stored yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        answer = self._answer(scope)
        if answer is None and scope["method"] == "POST" and scope["path"] == UPLOAD:
            await self._take_upload(scope, receive, send)
            return
        if answer is None and scope["method"] == "POST":
            body = await _read(receive)
            answer = self._refused_body(body)
            receive = _replayed(body, receive)
        if answer is None:
            await self.app(scope, receive, _with_headers(send))
        else:
            await answer(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
        if self.hosts and _host(scope) not in self.hosts:
            return _refuse(
                403, "this page answers to the name localhost; clip-lightning app --host opens it to others"
            )
        if not reads and _is_of_another_site(scope):
            return _refuse(403, "another site's page sends this; only this page and programs may")
        if reads and path in self.files and self.files[path].is_file():
            return FileResponse(self.files[path], headers=_LONE_PAGE)
        listed = _READ if reads else _WRITE if scope["method"] in ("POST", "OPTIONS") else None
        if listed is None or not listed.fullmatch(path):
            return _refuse(404, "there is nothing here")
        if path.startswith("/gradio_api/file=") and not self._uploaded(path.partition("=")[2]):
            return _refuse(403, "only pictures that were uploaded to this page are served")
        return None

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand an upload on, if there is room for it beside what is stored and what arrives meanwhile."""
        headers = dict(scope["headers"])
        given = headers.get(b"content-length", b"").decode("latin-1")
        if not given.isdecimal() or b"transfer-encoding" in headers:
            await _refuse(411, "expected a Content-Length")(scope, receive, send)
            return
        length = int(given)
        if length > MOST_PER_UPLOAD:
            message = f"{length:,} bytes are above the maximum allowed size of {MOST_PER_UPLOAD:,}"
            await _refuse(413, message)(scope, receive, send)
            return
        self._arriving.append(length)
        try:
            stored = [_size(file) for file in self.uploads.rglob("*")]
            count = len(stored) + FILES_PER_UPLOAD * len(self._arriving)
            if sum(stored) + sum(self._arriving) > MOST_UPLOADED or count > MOST_FILES:
                message = "this page holds too many uploads; they are deleted after about an hour"
                await _refuse(507, message)(scope, receive, send)
            else:
                await self.app(scope, receive, _with_headers(send))
        finally:
            self._arriving.remove(length)

    def _refused_body(self, body: bytes | None) -> Response | None:
        if body is None:
            return _refuse(413, f"more than {MOST_JSON:,} bytes")
        try:
            named = list(_paths(json.loads(body))) if body else []
        except (ValueError, RecursionError):
            return _refuse(400, "expected JSON")
        if not all(self._uploaded(path) for path in named):
            return _refuse(403, "only pictures that were uploaded to this page can be used; upload it first")
        return None

    def _uploaded(self, path: Any) -> bool:
        try:
            file = Path(path)
            return file.is_absolute() and file.resolve().is_relative_to(self.uploads) and file.is_file()
        except (OSError, ValueError, TypeError, RuntimeError):  # a name that is too long, with NUL, no name
            return False


def _paths(value: Any) -> Iterator[Any]:
    """All that stands under the name `path`, at any depth."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        inner: Iterable[Any] = value.values()
    else:
        inner = value if isinstance(value, list) else ()
    for each in inner:
        yield from _paths(each)


def _is_of_another_site(scope: Scope) -> bool:
    """Return whether a browser sends this request for a page that is not ours; programs say nothing of it."""
    headers = dict(scope["headers"])
    if site := headers.get(b"sec-fetch-site"):
        return site not in (b"same-origin", b"none")
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it has just been deleted
        return 0


def _host(scope: Scope) -> str:
    """What the request calls this machine, without the port."""
    given = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    return given.partition("]")[0] + "]" if given.startswith("[") else given.partition(":")[0]


def _refuse(status: int, reason: str) -> Response:
    return PlainTextResponse(reason, status)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it is too long."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_JSON:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes | None, receive: Receive) -> Receive:
    """Gives the body that was read already, and then what comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body or b"", "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS.items()]
        await send(message)

    return add
