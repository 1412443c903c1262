"""`clip-lightning app INDEX` or `app MODEL FOLDER`: a page on which pictures are found."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, NoReturn

from clip_lightning.arguments import Parser
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder

if TYPE_CHECKING:
    from clip_lightning.search.index import ImageIndex

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def run(args: list[str]) -> None:
    """Run `app` with the words of the command line, the command first."""
    about = (inspect.getdoc(app) or "").partition("\n\nArgs")[0]
    parser = Parser(prog="clip-lightning app", description=about)
    parser.add_argument(
        "source", type=str, help="an index of clip-lightning index; or a model, before its pictures"
    )
    parser.add_argument(
        "pictures", type=str, nargs="?", help="a folder of pictures or a data set, to index first"
    )
    parser.add_function_arguments(app, as_group=False, skip={"source", "pictures"})
    words = ["--open=true" if word == "--open" else word for word in args[1:]]
    app(**vars(parser.parse_args(words)))


def app(
    source: str,
    pictures: str | None = None,
    *,
    out: Path | None = None,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    open: bool = False,
) -> None:
    """Search pictures on a page of this machine, until Ctrl-C: by sentence, by picture, and with labels.

    clip-lightning app INDEX shows what clip-lightning index wrote; clip-lightning app MODEL FOLDER indexes
    the folder first, or brings its index up to date. Nothing is loaded from elsewhere. A tab shows the run
    that made the model, if the model still lies in its folder.

    Args:
        source: an index, or a model.
        pictures: a folder of pictures or a data set.
        out: folder of the index that MODEL FOLDER makes; if not given, one in the cache, which is named.
        model: where the index's model is, if it has moved since.
        host: address to listen at; at 0.0.0.0 whoever can reach this machine can search, without a login.
        port: to listen at; 7860, or the next one that is free, if not given.
        open: open the page in the browser.
    """
    if pictures is None and out is not None:
        raise UserError("--out is where MODEL FOLDER puts its index; give both, or leave --out out")
    _check_gradio()
    _check_address(host, port)
    signal.signal(signal.SIGTERM, _leave)
    index = _loaded(source, model) if pictures is None else _built(source, pictures, out, model)
    name = model if pictures is None else source
    with serving(index, name, host=host, port=port) as url:
        print(f"{len(index):,} pictures at {url} (Ctrl-C ends it)", file=sys.stderr)
        if open:
            webbrowser.open(url)
        Event().wait()


@contextmanager
def serving(
    index: ImageIndex,
    model: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[str]:
    """Serve the page of an index, in threads, as long as the context lasts; gives its URL.

    Args:
        index: whose model is loaded now.
        model: where it is, if that is not what the index says; the run that made it is shown.
        host: address to listen at; says so on stderr if others can reach it.
        port: 7860 or the next free one if None.

    Raises:
        UserError: the port is taken, the address is not this machine's, or the model is not there.
    """
    local = _is_loopback(host)
    if not local:
        print(f"--host {host}: whoever can reach this machine can search; there is no login", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory(prefix="clip-lightning-app-") as uploads,
        _gradio_settings(uploads, host),
    ):
        from starlette.middleware import Middleware

        from clip_lightning.search.answers import Answers
        from clip_lightning.search.guard import Guard
        from clip_lightning.search.page import build_page
        from clip_lightning.search.run_record import read_run
        from clip_lightning.search.server import close, launch

        record = read_run(model or index.manifest.model)
        page = build_page(Answers(index), record)
        guard = Middleware(
            Guard,
            uploads=Path(uploads),
            hosts=_LOOPBACK | {host} if local else frozenset(),
            files=record.files if record else {},
        )
        try:
            yield launch(page, guard, host, port)
        finally:
            close(page)


def _loaded(source: str, model: str | None) -> ImageIndex:
    if not (Path(source) / "current").is_file() and (Path(source) / "model.safetensors").is_file():
        raise UserError(
            f"{source} is a model; give the folder of pictures after it: clip-lightning app {source} FOLDER"
        )
    from clip_lightning.search.index import ImageIndex

    return ImageIndex.load(source, model)


def _built(source: str, pictures: str, out: Path | None, model: str | None) -> ImageIndex:
    if model is not None:
        raise UserError("--model is for an index; the first word names the model already")
    from clip_lightning.search.build import Options, build_index
    from clip_lightning.search.index import ImageIndex

    out = out or _cache_of(source, pictures)
    print(f"the index of {pictures} is kept in {out}", file=sys.stderr)
    report = build_index(source, Path(pictures), out, Options())
    print(report.summary(), file=sys.stderr)
    return ImageIndex.load(out, source)


def _cache_of(model: str, pictures: str) -> Path:
    """One folder for each model and each place of pictures."""
    places = [os.path.abspath(name) if os.path.exists(name) else name for name in (model, pictures)]
    digest = hashlib.sha256("\n".join(places).encode()).hexdigest()[:16]
    return cache_folder("indexes") / f"{Path(pictures).resolve().name}-{digest}"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_address(host: str, port: int | None) -> None:
    """Before anything that takes time."""
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port {port}: expected 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"--port {port} is taken; give another, or none for one that is free"
                ) from error
            raise UserError(
                f"--host {host}{f' --port {port}' if port else ''} cannot be listened at: "
                f"{error.strerror or error}; expected an address of this machine"
            ) from error


def _check_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'clip-lightning[app]'")


@contextmanager
def _gradio_settings(uploads: str, host: str) -> Iterator[None]:
    """What Gradio reads from the environment, some of it when it is imported."""
    # it asks its own server whether it is there, and a proxy would not know
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", host]))
    settings = {"NO_PROXY": direct, "no_proxy": direct, "GRADIO_TEMP_DIR": uploads}
    settings |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_NUM_WORKERS": "0"}
    # FastAPI exports what it measures to where these would say
    settings |= {f"OTEL_{signal}_EXPORTER": "none" for signal in ("TRACES", "METRICS", "LOGS")}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _leave(*_: object) -> NoReturn:
    sys.exit(143)
