"""A W&B server in this process, for the unmodified SDK (wandb 0.31): HTTP, streams, files and faults.

`wandb_operations` answers GraphQL, `wandb_store` remembers. It shows that our use of the client is right, not
how W&B's own server behaves. What it does not know it refuses by name, and records in `unknown`.
"""

import json
import math
import re
import socket
import sys
import threading
import time
from base64 import b64encode
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from wandb_operations import ENTITY, OPERATIONS, Json, common_names
from wandb_store import Refused, Run, Store, md5

API_KEY = "0" * 40


class WandbServer(Store):
    """The server, and all that it was sent, which a stop does not lose.

    with WandbServer() as server:
        subprocess.run([...], env=os.environ | server.environment())
        assert server.runs["tester", "project", "id"].history == [...]
    """

    def __init__(self) -> None:
        super().__init__()
        self.unknown: list[str] = []
        """Operations and addresses that nothing here answers."""
        self.failures: list[str] = []
        """Requests that could not be handled: mistakes in the server, or in the client."""
        self.operations: list[str] = []
        """The names of the GraphQL operations that were handled, in order."""
        self.lock = threading.RLock()
        self._port = 0
        self._http: HttpServer | None = None
        self._status: int | None = None
        self._fails_until = -math.inf

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """What sends the SDK here, makes it transmit and retry every second, and end some day."""
        clients = ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
        waits = [f"WANDB__{client}_RETRY_WAIT_{end}_SECONDS" for client in clients for end in ("MIN", "MAX")]
        # Whole seconds: the SDK cuts fractions off, and takes 0 for its default, which is long.
        pace = dict.fromkeys(["WANDB__FILE_STREAM_TRANSMIT_INTERVAL", *waits], "1")
        place = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_ENTITY": ENTITY}
        rest = {"WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false", "WANDB_FINISH_TIMEOUT": "120"}
        return place | pace | rest

    def start(self) -> None:
        """Listen; after a stop, on the same port as before."""
        if self._http is not None:
            return
        self._http = HttpServer(("127.0.0.1", self._port), Handler)
        self._http.wandb = self
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Be gone: refuse connections, cut the open ones."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def __enter__(self) -> "WandbServer":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def fail(self, seconds: float, *, status: int | None = 500) -> None:
        """Answer everything with `status`, or with None hang up without an answer, for so long."""
        self._status, self._fails_until = status, time.monotonic() + seconds

    def recover(self) -> None:
        """End every fault: a failure, a stop."""
        self._fails_until = -math.inf
        self.start()

    @property
    def fault(self) -> tuple[int | None, bytes] | None:
        """The answer to everything at the moment, if there is one."""
        return (self._status, b"out of order") if time.monotonic() < self._fails_until else None

    def execute(self, query: str, variables: Json) -> Json:
        """Answer a GraphQL request."""
        name = re.search(r"\b(?:query|mutation)\s+(\w+)", query)[1]
        self.operations.append(name)
        if name not in OPERATIONS:
            self.unknown.append(name)
            return {"errors": [{"message": f"the test server does not know the operation {name}"}]}
        try:
            data = OPERATIONS[name](self, common_names(variables))
        except Refused as refusal:
            return {"errors": [{"message": str(refusal)}]}
        except Exception as error:
            self.failures.append(f"{name}({variables}): {error!r}")
            return {"errors": [{"message": f"{name}: {error!r}"}]}
        if alias := re.search(r"\bresult:\s*(\w+)", query):
            data["result"] = data[alias[1]]
        return {"data": data}

    def stream(self, run: Run, body: Json) -> Json:
        """Take in the next lines of a run's files. Lines that were sent before change nothing."""
        kept = {
            "wandb-history.jsonl": run.history,
            "wandb-events.jsonl": run.events,
            "output.log": run.output,
        }
        for name, chunk in body.get("files", {}).items():
            start, lines = chunk["offset"], chunk["content"]
            if name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
                continue
            if start > len(kept[name]):
                self.failures.append(f"{run.key}: {len(kept[name])} lines of {name} go on with {start}")
            kept[name][start : start + len(lines)] = lines if name == "output.log" else map(json.loads, lines)
        run.preempting |= bool(body.get("preempting"))
        exit_code = body["exitcode"] if body.get("complete") else None
        run.state = {None: "running", 0: "finished"}.get(exit_code, "failed")
        return {"stopped": False}

    def storage_url(self, path: str) -> str:
        return f"{self.url}/storage/{quote(path)}"


class HttpServer(ThreadingHTTPServer):
    """Cuts its open connections when it is closed."""

    wandb: WandbServer
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self.connections):
            with suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients come and go
            self.wandb.failures.append(repr(sys.exception()))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        wandb, body = self.server.wandb, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with wandb.lock:
            status, content = wandb.fault or self.respond(wandb, body)
        if status is None:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{md5(content)}"')  # the digest of an http reference
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def respond(self, wandb: WandbServer, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer; a request that cannot be handled is not sent again."""
        try:
            return self.route(wandb, body)
        except Exception as error:
            wandb.failures.append(f"{self.command} {self.path}: {error!r}")
            return 400, repr(error).encode()

    def route(self, wandb: WandbServer, body: bytes) -> tuple[int, bytes]:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/storage/"):
            return self.store(*wandb.folder(path.removeprefix("/storage/")), body)
        if self.headers.get("Authorization") != "Basic " + b64encode(f"api:{API_KEY}".encode()).decode():
            return 401, b"the API key is wrong"
        if path == "/graphql":
            request = json.loads(body)
            return 200, json.dumps(wandb.execute(request["query"], request.get("variables") or {})).encode()
        if stream := re.fullmatch("/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path):
            return 200, json.dumps(wandb.stream(wandb.runs[stream.groups()], json.loads(body))).encode()
        wandb.unknown.append(f"{self.command} {path}")
        return 404, b"the test server does not know this address"

    def store(self, folder: dict[str, bytes], name: str, body: bytes) -> tuple[int, bytes]:
        if self.command != "PUT":
            return (200, folder[name]) if name in folder else (404, b"")
        if self.headers.get("Content-MD5", md5(body)) != md5(body):
            return 400, b"the checksum is wrong"
        folder[name] = body
        return 200, b""
