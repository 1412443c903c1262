"""The web page of an index, and its JSON API.

Uploads are decoded in memory and never stored. Indexed files are not served directly: images are decoded and
encoded again without their metadata, and only after a search has returned them.
"""

from __future__ import annotations

import asyncio
import re
import sys
from dataclasses import asdict
from functools import lru_cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

import uvicorn
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from torch import Tensor

from clip_lightning.data.images import BrokenImage, decode_bytes, decode_image
from clip_lightning.errors import UserError
from clip_lightning.evaluation.prompts import TEMPLATES
from clip_lightning.model.clip import probabilities
from clip_lightning.reports.pages import PAGES
from clip_lightning.search.index import ImageIndex
from clip_lightning.terminal import one_line

MOST_FOUND = 60
MOST_LABELS = 200
LARGEST_UPLOAD = 20_000_000  # bytes
MOST_PIXELS = 50_000_000  # a small upload may decode to gigabytes
UPLOAD_SECONDS = 60
MOST_UPLOADS = 8  # uploads in memory at the same time; further requests wait before they are read

_DEFAULTS = {"q": "", "k": "12", "image": "", "labels": "", "templates": "simple"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_decoders = BoundedSemaphore(4)  # an image of 100 megapixels takes 300 MB


def page_server(index: ImageIndex, hosts: frozenset[str] | None, root_path: str = "") -> uvicorn.Server:
    """Create the server of an index's page, without starting it.

    Requests may use the `hosts` as names (to prevent DNS rebinding), or any name if it is None, and begin
    with `root_path`.
    """
    page = _Page(index)
    routes: list[BaseRoute] = [
        Route("/", page.answer, methods=["GET", "POST"]),
        Route("/api", page.answer, methods=["GET", "POST"]),
        Route("/image/{id}", lambda request: page.image(request, 1600)),
        Route("/thumbnail/{id}", lambda request: page.image(request, 480)),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
    ]
    if root_path:
        home = RedirectResponse(f"{root_path}/")
        routes = [Route(root_path, lambda _: home), Mount(root_path, routes=routes), *routes]

    async def guard(request: Request, answer: RequestResponseEndpoint) -> Response:
        response = await page.guarded(request, answer, hosts)
        response.headers.update(_HEADERS)
        return response

    config = uvicorn.Config(
        BaseHTTPMiddleware(Router(routes, redirect_slashes=False), guard),
        http="h11",
        h11_max_incomplete_event_size=2**17,  # bytes of a URL, which has the sentence and the labels
        limit_concurrency=200,
        timeout_graceful_shutdown=1,
        log_config=None,
        log_level="critical",
    )
    return uvicorn.Server(config)


class _Page:
    def __init__(self, index: ImageIndex) -> None:
        self.index, self.clip = index, index.clip
        self.lock = Lock()  # fast tokenizers are not thread-safe, and one query uses all cores anyway
        self.paths: dict[str, Path] = {}
        self.uploads = asyncio.Semaphore(MOST_UPLOADS)
        self.template = PAGES.get_template("search/page.html.j2")
        towers = [tower.spec["name"] for tower in (self.clip.image_tower, self.clip.text_tower)]
        # short captions of the data set are the best examples
        texts = [text.rstrip(" .") for image in index.search("a photo", 20)[0] for text in image.captions]
        examples = [text for text in dict.fromkeys(texts) if 0 < len(text) <= 50][:3]
        self.about: dict[str, Any] = {
            "total": f"{len(index):,}",
            "source": Path(index.manifest.source).name,
            "towers": " × ".join(Path(name).name.removeprefix("pypi:") for name in towers),
            "examples": examples or ["a dog running on grass", "people at a table"],
            "most": MOST_FOUND,
        }

    async def guarded(
        self, request: Request, answer: RequestResponseEndpoint, hosts: frozenset[str] | None
    ) -> Response:
        """Answer a request, unless it uses another host name or comes from another website."""
        headers = request.headers
        host, origin, site = headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site")
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        if hosts is not None and name not in hosts:
            return JSONResponse({"error": f"the host name {name} is not allowed; see --allowed_hosts"}, 403)
        # Browsers send Sec-Fetch-Site to HTTPS and to localhost, and Origin with every POST.
        foreign = origin not in (None, f"http://{host}", f"https://{host}")
        is_link = request.method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if not is_link and (foreign if site is None else site not in ("same-origin", "none")):
            return JSONResponse({"error": "requests from other websites are refused"}, 403)
        try:
            return await answer(request)
        except HTTPException as error:
            return self.reply(request, {"error": error.detail}, error.status_code)
        except (UserError, BrokenImage, OSError) as error:
            prefix = "the image cannot be read: " if isinstance(error, BrokenImage) else ""
            return self.reply(request, {"error": one_line(f"{prefix}{error}")}, 400)
        except Exception as error:
            print(one_line(f"clip-lightning app: {type(error).__name__}: {error}")[:300], file=sys.stderr)
            reason = "internal error; see the terminal in which the page was started"
            return self.reply(request, {"error": reason}, 500)

    async def answer(self, request: Request) -> Response:
        query = _DEFAULTS | dict(request.query_params)
        has_query = query["q"].strip() or query["image"] or request.method == "POST"
        if not has_query and request["path"].endswith("/"):
            return self.reply(request, {})
        async with self.uploads:
            upload = await _read_body(request) if request.method == "POST" else None
            return self.reply(request, await run_in_threadpool(self._find, query, upload))

    def reply(self, request: Request, answer: dict[str, Any], status: int = 200) -> Response:
        """Respond with the page, or with JSON to requests for the API."""
        if not request["path"].endswith("/"):
            return JSONResponse(answer, status)
        query = _DEFAULTS | dict(request.query_params)
        return HTMLResponse(self.template.render(self.about, query=query, answer=answer), status)

    def _find(self, query: dict[str, str], image: bytes | None) -> dict[str, Any]:
        """Search for the sentence `q`, or else for the result with the id `image`, or else for the upload."""
        k, sentence = query["k"], " ".join(query["q"].split())
        if k not in map(str, range(1, MOST_FOUND + 1)):
            raise UserError(f"k is {k[:40]!r}; expected a whole number from 1 to {MOST_FOUND}")
        if query["image"] and not sentence:
            image = self._path(query["image"]).read_bytes()
        with self.lock:
            answer: dict[str, Any] = {}
            if sentence:
                found = self.index.search(sentence, int(k))[0]
            elif image is None:
                raise UserError("the query is empty; type a sentence")
            else:
                embedding = self.clip.embed_images(decode_bytes(image, max_pixels=MOST_PIXELS))
                found = self.index.search(embedding, int(k))[0]
                answer = self._classify(embedding, query) if query["labels"] else {}
        by_id = {sha256(bytes(image.path)).hexdigest()[:16]: image for image in found}
        self.paths |= {id: image.path for id, image in by_id.items()}
        results = [asdict(image) | {"path": str(image.path), "id": id} for id, image in by_id.items()]
        return {"results": results} | answer

    def _classify(self, embedding: Tensor, query: dict[str, str]) -> dict[str, Any]:
        """Return the probabilities of comma-separated labels; they are never opened as files."""
        labels = dict.fromkeys(" ".join(label.split()) for label in query["labels"].split(","))
        names, bias = [name for name in labels if name], self.clip.bias
        if not 1 <= len(names) <= MOST_LABELS:
            raise UserError(f"got {len(names)} labels; give 1 to {MOST_LABELS}, separated by commas")
        if (templates := query["templates"]) not in TEMPLATES:
            raise UserError(f"templates {templates!r}: expected {', '.join(TEMPLATES)}")
        similarity = embedding @ self.clip.zero_shot_classifier(names, TEMPLATES[templates]).T
        values = probabilities(similarity, self.clip.scale.item(), bias)[0].tolist()
        ordered = sorted(zip(names, values, strict=True), key=lambda entry: -entry[1])
        # softmax assumes that one of the labels is right, a sigmoid judges each label independently
        return {"reading": "softmax" if bias is None else "sigmoid", "probabilities": dict(ordered)}

    def image(self, request: Request, side: int) -> Response:
        return Response(_jpeg(self._path(request.path_params["id"]), side), media_type="image/jpeg")

    def _path(self, id: str) -> Path:
        if id not in self.paths:
            raise HTTPException(
                404, "this image is not in the results of any search since the page was started"
            )
        return self.paths[id]


async def _read_body(request: Request) -> bytes:
    """Read the body to its end, as clients read no response before; more than the limit is dropped."""
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for part in request.stream():
                content += part if len(content) <= LARGEST_UPLOAD else b""
    except (TimeoutError, ClientDisconnect) as error:
        raise HTTPException(
            408, f"the upload was interrupted, or took more than {UPLOAD_SECONDS} seconds"
        ) from error
    if len(content) > LARGEST_UPLOAD:
        raise HTTPException(413, f"the file is larger than {LARGEST_UPLOAD // 10**6} MB; give a smaller one")
    return bytes(content)


@lru_cache(256)
def _jpeg(path: Path, side: int) -> bytes:
    with _decoders:
        image = Image.fromarray(decode_image(path, pauses=()).permute(1, 2, 0).numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
