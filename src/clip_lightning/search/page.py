"""The page of an index, and the same answers as JSON.

Uploads are decoded in memory and never stored. No indexed file is served as it is: images are decoded and
encoded again, without their metadata, and only after a search has found them.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles

from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.errors import UserError
from clip_lightning.reports.pages import template
from clip_lightning.search.answers import MOST_FOUND, Answers
from clip_lightning.search.index import ImageIndex
from clip_lightning.terminal import one_line

LARGEST_UPLOAD = 20_000_000  # bytes
UPLOAD_SECONDS = 60
MOST_QUESTIONS = 8  # uploads in memory at the same time; other requests wait before they are read

_HERE = Path(__file__).parent
_DEFAULTS = {"q": "", "k": "12", "image": "", "labels": "", "templates": "simple"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_SANDBOX = {
    "Content-Security-Policy": "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
}
_decoders = BoundedSemaphore(4)  # an image of 100 megapixels takes 300 MB


def page_server(
    index: ImageIndex, model: str | Path | None, hosts: frozenset[str] | None, root_path: str = ""
) -> uvicorn.Server:
    """Return the server of an index's page, which is yet to run.

    Args:
        index: its model is loaded now.
        model: where the model was loaded from; the page shows the run that trained it.
        hosts: names that requests may address the server by, against DNS rebinding; any if None.
        root_path: the prefix, such as `/photos`, that a reverse proxy may leave on paths.
    """
    metrics, report = _read_run(model)
    page = _Page(Answers(index), metrics, report is not None)
    routes: list[BaseRoute] = [
        Route("/", page.answer, methods=["GET", "POST"]),
        Route("/api", page.answer, methods=["GET", "POST"]),
        Route("/image/{id}", lambda request: page.image(request, 1600)),
        Route("/thumbnail/{id}", lambda request: page.image(request, 480)),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    if report:
        routes.append(Route("/predictions.html", lambda _: FileResponse(report, headers=_SANDBOX)))
    if root_path:
        home = RedirectResponse(f"{root_path}/")
        routes = [Route(root_path, lambda _: home), Mount(root_path, routes=routes), *routes]

    async def guard(request: Request, answer: RequestResponseEndpoint) -> Response:
        if refusal := _refusal(request, hosts):
            response: Response = JSONResponse({"error": refusal}, 403)
        else:
            try:
                response = await answer(request)
            except HTTPException as error:
                response = page.reply(request, {"error": error.detail}, error.status_code)
            except (UserError, BrokenImage, OSError) as error:
                response = page.reply(request, {"error": one_line(str(error))}, 400)
            except Exception as error:
                print(one_line(f"clip-lightning app: {type(error).__name__}: {error}")[:300], file=sys.stderr)
                reason = "something went wrong; the terminal in which the page was started shows the error"
                response = page.reply(request, {"error": reason}, 500)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    config = uvicorn.Config(
        BaseHTTPMiddleware(Router(routes, redirect_slashes=False), guard),
        http="h11",
        h11_max_incomplete_event_size=2**17,  # a sentence of 10,000 characters fits into a URL
        limit_concurrency=200,
        timeout_graceful_shutdown=1,
        log_config=None,
        log_level="critical",
    )
    return uvicorn.Server(config)


def _refusal(request: Request, hosts: frozenset[str] | None) -> str | None:
    """Say why not, if a request addresses the server by another name, or if another website makes it."""
    headers = request.headers
    host, origin, site = headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if hosts is not None and name not in hosts:
        return f"the page does not answer to the name {name}; see --allowed_hosts"
    # Browsers send Sec-Fetch-Site to HTTPS and to localhost, and Origin with every POST.
    foreign = origin not in (None, f"http://{host}", f"https://{host}")
    is_link = request.method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if not is_link and (foreign if site is None else site not in ("same-origin", "none")):
        return "requests from other websites are refused"
    return None


class _Page:
    def __init__(self, answers: Answers, metrics: dict[str, Any], report: bool) -> None:
        self.answers = answers
        self.found: dict[str, Path] = {}
        self.questions = asyncio.Semaphore(MOST_QUESTIONS)
        self.template = template("page.html.j2", _HERE)
        towers = [tower.spec["name"] for tower in (answers.clip.image_tower, answers.clip.text_tower)]
        self.about: dict[str, Any] = {
            "total": f"{len(answers.index):,}",
            "source": Path(answers.index.manifest.source).name,
            "towers": " × ".join(Path(name).name.removeprefix("pypi:") for name in towers),
            "metrics": metrics,
            "report": report,
            "examples": _examples(answers),
            "most": MOST_FOUND,
        }

    def image(self, request: Request, side: int) -> Response:
        return Response(_jpeg(self._path(request.path_params["id"]), side), media_type="image/jpeg")

    async def answer(self, request: Request) -> Response:
        asked = _DEFAULTS | dict(request.query_params)
        is_question = asked["q"].strip() or asked["image"] or request.method == "POST"
        if not is_question and request["path"].endswith("/"):
            return self.reply(request, {})
        async with self.questions:
            upload = await _read_body(request) if request.method == "POST" else None
            return self.reply(request, await run_in_threadpool(self._find, asked, upload))

    def reply(self, request: Request, answer: dict[str, Any], status: int = 200) -> Response:
        """Answer a browser with the page, and a program with JSON."""
        if not request["path"].endswith("/"):
            return JSONResponse(answer, status)
        asked = _DEFAULTS | dict(request.query_params)
        return HTMLResponse(self.template.render(self.about, asked=asked, answer=answer), status)

    def _find(self, asked: Mapping[str, str], image: bytes | None) -> dict[str, Any]:
        """Search for the sentence `q`, else for the result whose id is `image`, else for the upload."""
        if not re.fullmatch(r"\d{1,9}", asked["k"]):
            raise UserError(f"k is {asked['k'][:40]!r}; expected a whole number from 1 to {MOST_FOUND}")
        k, sentence = int(asked["k"]), asked["q"]
        if asked["image"] and not sentence.strip():
            image = self._path(asked["image"]).read_bytes()
        if image is None or sentence.strip():
            return self._results(self.answers.search(sentence, k))
        answer = self._results(self.answers.search_by_image(image, k))
        if asked["labels"]:
            answer |= self.answers.classify(image, asked["labels"], asked["templates"]).as_dict()
        return answer

    def _results(self, found: Sequence[Any]) -> dict[str, Any]:
        by_id = {sha256(bytes(each.path)).hexdigest()[:16]: each for each in found}
        self.found |= {id: each.path for id, each in by_id.items()}
        return {"results": [each.as_dict() | {"id": id} for id, each in by_id.items()]}

    def _path(self, id: str) -> Path:
        if id not in self.found:
            raise HTTPException(404, "no search has found this image since the page was started")
        return self.found[id]


async def _read_body(request: Request) -> bytes:
    """Read the body; the rest of a large one is dropped, as a client that cannot send it reads no answer."""
    content, size = bytearray(), 0
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                size += len(part)
                content += part if size <= LARGEST_UPLOAD else b""
    except (TimeoutError, ClientDisconnect) as error:
        raise HTTPException(408, f"the upload was cut off, or took {UPLOAD_SECONDS} seconds") from error
    if size > LARGEST_UPLOAD:
        raise HTTPException(413, f"the file has more than {LARGEST_UPLOAD // 10**6} MB")
    return bytes(content)


def _read_run(model: str | Path | None) -> tuple[dict[str, Any], Path | None]:
    """Return the metrics and the predictions of the run whose `model/` this is, if it is in its folder."""
    folder = Path(model).resolve().parent if model and Path(model).is_dir() else None
    if folder is None or not (folder / "config.yaml").is_file():
        return {}, None
    try:
        metrics = dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}, None
    report = folder / "predictions.html"
    is_inside = report.is_file() and report.resolve() == report  # a link may lead out of the folder
    return metrics, report if is_inside else None


def _examples(answers: Answers) -> list[str]:
    """Return some short captions of the data set, which certainly fit it, or what fits most photographs."""
    captions = [text.rstrip(" .") for each in answers.search("a photo", MOST_FOUND) for text in each.captions]
    short = [text for text in dict.fromkeys(captions) if 0 < len(text) <= 50]
    return short[:: max(1, len(short) // 3)][:3] or ["a dog running on grass", "people at a table"]


@lru_cache(256)
def _jpeg(path: Path, side: int) -> bytes:
    with _decoders:
        image = Image.fromarray(decode_image(path).permute(1, 2, 0).numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
