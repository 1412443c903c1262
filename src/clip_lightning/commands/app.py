"""`clip-lightning app INDEX` or `app MODEL FOLDER`: a page that searches images."""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import signal
import socket
import sys
import webbrowser
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from clip_lightning.arguments import Parser
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder


def run(args: list[str]) -> None:
    """Run `app` with the arguments of the command line, the command first."""
    about = (inspect.getdoc(app) or "").partition("\n\nArgs")[0]
    parser = Parser(prog="clip-lightning app", description=about)
    parser.add_argument("source", type=str, help="an index, or a model if a folder of images follows")
    parser.add_argument("images", type=str, nargs="?", help="a folder of images or a data set to index first")
    parser.add_function_arguments(app, as_group=False, skip={"source", "images"})
    app(**vars(parser.parse_args(["--open=true" if each == "--open" else each for each in args[1:]])))


def app(
    source: str,
    images: str | None = None,
    *,
    out: Path | None = None,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: str = "",
    root_path: str = "",
    open: bool = False,
) -> None:
    """Search images on a page of this machine, until Ctrl-C: by sentence, by image, and with labels.

    clip-lightning app INDEX shows an index that clip-lightning index wrote; clip-lightning app MODEL FOLDER
    indexes the folder first, or updates its index. Nothing is loaded from other machines. The page also shows
    the run that trained the model, if the model is still in its run's folder.

    Args:
        source: an index, or a model.
        images: a folder of images or a data set.
        out: folder of the index that MODEL FOLDER makes; by default one in the cache, which is printed.
        model: the index's model, if it has moved since the index was built.
        host: address to listen at; at 0.0.0.0 everybody who reaches this machine can search, without a login.
        port: port to listen at; by default 7860, or the next one that is free.
        allowed_hosts: names, with commas between, by which a browser may address the page, such as that of a
            reverse proxy. The names of this machine itself are always allowed; if --host is an address that
            other machines reach, all names are, unless some are given here.
        root_path: path of the page behind a reverse proxy, such as /photos.
        open: open the page in the browser.
    """
    if images is None and out is not None:
        raise UserError("--out is where MODEL FOLDER puts its index; give both, or leave --out out")
    if images is None and (Path(source) / "model.safetensors").is_file():
        raise UserError(f"{source} is a model; give its images, too: clip-lightning app {source} FOLDER")
    if images is not None and model is not None:
        raise UserError("--model is for an index; the first argument names the model already")
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UserError("the page needs Starlette and Uvicorn: pip install starlette uvicorn")
    path = "".join(f"/{part}" for part in root_path.split("/") if part)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _listen(host, port) as listener:
        from clip_lightning.search.build import Options, build_index
        from clip_lightning.search.index import ImageIndex
        from clip_lightning.search.page import page_server

        if images is not None:
            out = out or _cache_of(source, images)
            print(f"the index of {images} is kept in {out}", file=sys.stderr)
            print(build_index(source, Path(images), out, Options()).summary(), file=sys.stderr)
            source, model = str(out), source
        index = ImageIndex.load(source, model)
        server = page_server(index, model or index.manifest.model, _names(host, allowed_hosts), path)
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}{path}/"
        print(f"{len(index):,} images at {url} (Ctrl-C ends it)", file=sys.stderr)
        if open:
            webbrowser.open(url)
        server.run(sockets=[listener])


def _listen(host: str, port: int | None) -> socket.socket:
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port {port}: expected 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for free in [port] if port else range(7860, 7960):
        try:
            return socket.create_server((host, free), family=family)
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise UserError(f"--host {host}: expected an address of this machine ({error})") from error
    raise UserError(f"--port {port or '7860 to 7959'} is taken; give another, or none for one that is free")


def _names(host: str, allowed: str) -> frozenset[str] | None:
    """Return the names that a browser may address the page by; None if any will do."""
    names = {name.strip().lower() for name in allowed.split(",")} - {""}
    try:
        is_local = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local:
        print(f"--host {host}: other machines can search, too; there is no login", file=sys.stderr)
    return frozenset({"localhost", "127.0.0.1", "::1", host} | names) if is_local or names else None


def _cache_of(model: str, images: str) -> Path:
    """Return a folder for this model and these images."""
    places = [os.path.abspath(name) if os.path.exists(name) else name for name in (model, images)]
    digest = hashlib.sha256("\n".join(places).encode()).hexdigest()[:16]
    return cache_folder("indexes") / f"{Path(images).resolve().name}-{digest}"
