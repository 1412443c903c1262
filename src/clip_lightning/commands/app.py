"""`clip-lightning app INDEX` and `app MODEL FOLDER` serve a page that searches images."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import webbrowser
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from clip_lightning.arguments import Parser
from clip_lightning.commands import MODEL
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder
from clip_lightning.terminal import note


def run(args: list[str]) -> None:
    """Run `app` with the arguments of the command line, of which the first is the command itself."""
    parser = Parser.of_function("app", app, skip={"source", "images"})
    parser.add_argument("source", type=str, help=f"an index; or, if IMAGES follow, a model: {MODEL}")
    parser.add_argument("images", type=str, nargs="?", help="a folder of images or a data set to index first")
    app(**vars(parser.parse_args(args[1:])))


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
    """Search images by sentence, by image or with labels, on a page that this machine serves until Ctrl-C.

    `clip-lightning app INDEX` serves an index that `clip-lightning index` wrote. `clip-lightning app MODEL
    FOLDER` first indexes the folder or updates its index. The page loads nothing from other machines.

    Args:
        out: folder for the index that MODEL FOLDER builds; by default a folder in the cache, which is
            printed.
        model: location of the index's model if it has moved since the index was built.
        host: address to listen on; with 0.0.0.0, everyone who can reach this machine can search without a
            login.
        port: port to listen on; by default 7860 or the next free port.
        allowed_hosts: host names, separated by commas, under which browsers may open the page, for example
            the name of a reverse proxy. This machine's own names are always allowed. If other machines can
            reach --host, all names are allowed unless you give some here.
        root_path: path of the page behind a reverse proxy, for example /photos.
        open: open the page in the browser.
    """
    if (images is None and out is not None) or (images is not None and model is not None):
        raise UserError("--out is only for `app MODEL FOLDER`, and --model only for `app INDEX`; omit it")
    if images is None and (Path(source) / "model.safetensors").is_file():
        raise UserError(f"{source} is a model; also give a folder: clip-lightning app {source} FOLDER")
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise UserError("the page needs Starlette and Uvicorn; run `pip install starlette uvicorn`")
    path = f"/{root_path.strip('/')}".rstrip("/")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _listen(host, port) as listener:
        from clip_lightning.commands.embed import summary
        from clip_lightning.search.build import build_index
        from clip_lightning.search.folder import Options, digest
        from clip_lightning.search.index import ImageIndex
        from clip_lightning.search.page import page_server

        if images is not None:
            places = [os.path.abspath(name) if os.path.exists(name) else name for name in (source, images)]
            name = f"{Path(images).resolve().name}-{digest([os.fsencode(' '.join(places))])}"
            out = out or cache_folder("indexes") / name
            note(f"the index of {images} is stored in {out}")
            note(summary(build_index(source, Path(images), out, Options())))
            source, model = str(out), source
        index = ImageIndex.load(source, model)
        address, bound, *_ = listener.getsockname()
        allowed = _names(host, address, allowed_hosts)
        server = page_server(index, allowed, path)
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound}{path}/"
        note(f"serving {len(index):,} images at {url} (press Ctrl-C to stop)")
        if open:
            webbrowser.open(url)
        server.run(sockets=[listener])


def _listen(host: str, port: int | None) -> socket.socket:
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"--port {port}: expected a number from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for free in [port] if port else range(7860, 7960):
        try:
            return socket.create_server((host, free), family=family)
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE:
                raise UserError(f"--host {host}: expected an address of this machine ({error})") from error
    raise UserError(f"--port {port or '7860 to 7959'} is in use; give another port, or omit --port")


def _names(host: str, address: str, allowed: str) -> frozenset[str] | None:
    """Return the host names under which browsers may open the page, or None if all are allowed."""
    names = {name.strip().lower() for name in allowed.split(",")} - {""}
    is_local = ip_address(address).is_loopback
    if not is_local:
        note(f"--host {host}: other machines can search as well, without a login")
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()} | names) if is_local or names else None
