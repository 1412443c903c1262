"""Archives by URL: a server with faults, archives that are made to do harm, kills and rivals."""

import base64
import gzip
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clip_lightning.data import sources
from clip_lightning.data.formats import read_captions
from clip_lightning.data.shards import storage
from clip_lightning.data.sources import Archive
from clip_lightning.errors import UserError

Fetch = Callable[[bytes], Path]
Patch = pytest.MonkeyPatch
FILES = {
    "captions.csv": b"image,caption,split\na.jpg,one,train\nb.jpg,two,test\n",
    "images/a.jpg": os.urandom(300_000),  # so that it is sent in many pieces
    "images/b.jpg": b"\xff\xd8",
}


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(files: dict[str, bytes], how: str = "gz") -> bytes:
    return tar_of(*((name, content) for name, content in files.items()), how=how)


def tar_of(*members: tuple[Any, ...], how: str = "") -> bytes:
    """A tar of (name, content), or of (name, type, target)."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{how}") as archive:
        for name, kind, *target in members:
            info, content = tarfile.TarInfo(name), b"" if target else kind
            info.size, info.mode = len(content), 0o6777
            if target:
                info.type, info.linkname = kind, target[0]
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def unix_zip(name: str, kind: int, content: str, **others: bytes) -> bytes:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(info, content)
        for other, bytes_ in others.items():
            archive.writestr(other, bytes_)
    return data.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fetch(url: str, data: bytes) -> Path:
    archive = Archive.parse(f"{url}#sha256={digest(data)}")
    archive.fetch()
    return archive.folder()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    """An empty cache folder, and no waiting between attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    return tmp_path / "cache" / "clip-lightning" / "data"


@pytest.fixture
def local(tmp_path: Path) -> Fetch:
    """Fetches these bytes as a file of this machine."""

    def fetch_file(data: bytes) -> Path:
        archive = tmp_path / "my data"
        archive.write_bytes(data)
        return fetch(archive.as_uri(), data)

    return fetch_file


class Server(ThreadingHTTPServer):
    """Serves `data` under any path, and does at each request what `faults` says next.

    `status 503` and the like; `cut N`: hangs up after N bytes; `wait`: sends the first half and then nothing;
    `to URL`: redirects there.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.faults: list[str] = []
        self.credentials: list[str | None] = []
        self.may_end = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        fault, _, value = (self.server.faults.pop(0) if self.server.faults else "").partition(" ")
        self.server.credentials.append(self.headers.get("Authorization"))
        if fault == "status":
            return self.send_error(int(value))
        self.send_response(302 if fault == "to" else 200)
        size = ("Content-Length", str(len(self.server.data)))
        self.send_header(*(("Location", value) if fault == "to" else size))
        self.end_headers()
        if fault == "wait":
            self.wfile.write(self.server.data[: len(self.server.data) // 2])
            self.server.may_end.wait(30)
        elif fault != "to":
            self.wfile.write(self.server.data[: int(value)] if fault == "cut" else self.server.data)
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass  # the client was killed

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(zipped(FILES)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.may_end.set()
        server.shutdown()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_are_unpacked_and_read(kind: str, server: Server, cache: Path):
    around = {f"./pets/{name}": data for name, data in FILES.items()}  # a folder that is taken off
    files = around | {"__MACOSX/pets/._captions.csv": b"\0", "._pets": b"\0"}
    data = zipped(files) if kind == "zip" else tarred(files, kind.removeprefix("tar").removeprefix("."))
    server.data = data
    folder = fetch(server.url, data)
    assert folder == cache / digest(data)[:16] and content(folder) == FILES
    images = read_captions(folder).images
    assert [(image.path.name, image.captions, image.split) for image in images] == [
        ("a.jpg", ("one",), "train"),
        ("b.jpg", ("two",), "test"),
    ]
    assert fetch(server.url, data) == folder
    assert len(server.credentials) == 1, "it was asked for again"
    assert {path.name for path in cache.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_a_local_archive_is_not_moved(tmp_path: Path, local: Fetch):
    assert content(local(zipped(FILES))) == FILES
    archive = tmp_path / "my data"
    with pytest.raises(UserError, match="has the SHA-256"):
        fetch(archive.as_uri(), b"another")
    assert archive.exists()
    with pytest.raises(UserError, match=r"--data\.root file:.*nothing\.zip does not exist"):
        fetch((tmp_path / "nothing.zip").as_uri(), b"")


@pytest.mark.parametrize(
    "url",
    [
        "https://a.example/x.zip?key=secret",
        "https://a.example/x.zip#sha256=abc",
        f"https://me:secret@a.example/x.zip?key=secret#sha256={'0' * 63}",
        f"file://other/x.zip#sha256={'0' * 64}",
        f"https:///x.zip#sha256={'0' * 64}",
        f"https://me:secret/@a.example/x.zip#sha256={'0' * 64}",
        f"https://[a.example/x.zip?key=secret#sha256={'0' * 64}",
    ],
)
def test_an_invalid_url_is_one_line_without_credentials(url: str):
    with pytest.raises(UserError, match=r"--data\.root .*expected https://.*#sha256=HEX") as raised:
        Archive.parse(url)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


@pytest.mark.parametrize("faults", [["status 503", "cut 1000", "wait"], ["cut 0"]])
def test_a_broken_or_stalled_download_is_retried(faults: list[str], server: Server, monkeypatch: Patch):
    monkeypatch.setattr(storage, "SILENCE", 0.5)
    server.faults = [*faults]
    assert content(fetch(server.url, server.data)) == FILES
    assert len(server.credentials) == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "requests", "reason"),
    [
        ("", 1, f"http://127.* has the SHA-256 [0-9a-f]*, expected {digest(b'another')}"),
        ("status 404", 1, "http://127.* does not exist"),
        ("status 500", 4, "http://127.* cannot be read: 500"),
        ("cut 1000", 4, "http://127.* cannot be read: .*payload"),
        ("gone", 0, "http://127.* cannot be read: Cannot connect"),
    ],
)
def test_failed_downloads_leave_no_files(fault: str, requests: int, reason: str, server: Server, cache: Path):
    server.faults = [fault] * 4
    if fault == "gone":
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match=reason) as raised:
        fetch(server.url.replace("://", "://me:secret@"), server.data if fault else b"another")
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
    assert len(server.credentials) == requests
    assert {path.suffix for path in cache.iterdir()} == {".lock"}


def test_credentials_are_sent_only_to_their_server(server: Server):
    with Server(server.data) as other:
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.faults = ["to /moved", f"to {other.url.replace('127.0.0.1', 'localhost')}"]
        assert content(fetch(server.url.replace("://", "://me:a%40secret@"), server.data)) == FILES
        other.shutdown()
    assert server.credentials == [f"Basic {base64.b64encode(b'me:a@secret').decode()}"] * 2
    assert other.credentials == [None]


def encrypted_zip() -> bytes:
    data = bytearray(zipped({"a.jpg": b"x"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    return bytes(data)


def header_bomb() -> bytes:
    """A header that claims to have 4 MB, in 4 KB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 22
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 22), 1)


def deep_links() -> list[tuple[Any, ...]]:
    """Names too long for the system to resolve, by which links have led out of the folder (CVE-2025-4517)."""
    long, place, members = "d" * 247, "", []
    for letter in "abcdefghijklmnop":
        members += [(f"{place}{long}", tarfile.DIRTYPE, ""), (f"{place}{letter}", tarfile.SYMTYPE, long)]
        place += f"{letter}/"
    last = f"{place}{'l' * 254}"
    members += [(last, tarfile.SYMTYPE, "../" * 16), ("out", tarfile.SYMTYPE, f"{last}/../escaped")]
    return [*members, ("out", b"x")]


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
ELSEWHERE = "a link to something else than its files"
TARS: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "..": ([("../escaped", b"x")], "would be extracted"),
    "link out": ([("out", LINK, "/etc/passwd")], "'out' to '/etc/passwd'"),
    "link up": ([("a/out", LINK, "../../x")], "to '../x'"),
    "hard link out": ([("out", HARD, "/etc/passwd")], "'out' to '/etc/passwd'"),
    "hard link up": ([("a/out", HARD, "../x")], "to '../x'"),
    "link to nothing": ([("a", LINK, "b")], ELSEWHERE),
    "link to a folder": ([("d/x", b"x"), ("a", LINK, "d")], ELSEWHERE),
    "link to itself": ([("a", LINK, "a")], ELSEWHERE),
    "through a link": ([("d", LINK, "/tmp"), ("d/escaped", b"x")], ELSEWHERE),
    "over a link": ([("d", LINK, "/tmp/escaped"), ("d", b"x")], ELSEWHERE),
    "deep links": (deep_links(), ELSEWHERE),
    "device": ([("null", tarfile.CHRTYPE, "")], "special file"),
    "pipe": ([("pipe", tarfile.FIFOTYPE, "")], "special file"),
}
HARMFUL: dict[str, tuple[bytes, str]] = {
    **{f"tar {name}": (tar_of(*members), message) for name, (members, message) in TARS.items()},
    "zip link": (unix_zip("out", stat.S_IFLNK, "/etc/passwd"), "the link 'out'"),
    "zip through a link": (unix_zip("d", stat.S_IFLNK, "/tmp", **{"d/escaped": b"x"}), "the link 'd'"),
    "zip file and folder": (zipped({"a": b"x", "a/b": b"y"}), "unsafe .*Not a directory"),
    "zip bomb": (zipped({"zeros": bytes(3_000_000)}), "unpacks to more than"),
    "zip nameless": (unix_zip("", stat.S_IFREG, "x"), "the archive is broken"),
    "zip of many": (zipped({str(i): b"" for i in range(600)}), "unpacks to more than"),
    "zip encrypted": (encrypted_zip(), "broken .*encrypted"),
    "zip damaged": (unix_zip("a.jpg", 0, "picture").replace(b"picture", b"pasture", 1), "broken .*CRC"),
    "zip cut": (zipped(FILES)[:1000], "broken"),
    "tar bomb": (tarred({"zeros": bytes(3_000_000)}), "unpacks to more than"),
    "tar header bomb": (header_bomb(), "broken|empty"),
    "tar.gz cut": (tarred(FILES)[:1000], "broken"),
    "tar.bz2 damaged": (tarred(FILES, "bz2")[:80] + bytes(400), "broken"),
    "tar.xz damaged": (tarred(FILES, "xz")[:80] + bytes(400), "broken"),
    "no archive": (b"<html>Please log in</html>" * 100, "broken"),
    "nothing": (b"", "broken"),
    "empty zip": (zipped({}), "is empty"),
}


@pytest.mark.parametrize("attack", HARMFUL)
def test_harmful_archives(attack: str, tmp_path: Path, local: Fetch, cache: Path, monkeypatch: Patch):
    monkeypatch.setattr(sources, "ALWAYS_ALLOWED", 2_000_000)
    data, message = HARMFUL[attack]
    with pytest.raises(UserError, match=rf"--data\.root .*{message}") as raised:
        local(data)
    assert "\n" not in str(raised.value)
    assert {path.suffix for path in cache.iterdir()} == {".lock"}, "something of it was kept"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "my data"}
    assert not list(Path("/tmp").glob("escaped*")) and not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("name", ["../escaped", "a/../../escaped", "/tmp/escaped", "..\\escaped"])
def test_names_in_a_zip_stay_within_the_folder(name: str, tmp_path: Path, local: Fetch):
    folder = local(unix_zip(name, stat.S_IFREG, "x", other=b"x"))
    (escaped,) = tmp_path.rglob("*escaped")
    assert escaped.is_relative_to(folder) and not Path("/tmp/escaped").exists()


def test_links_within_an_archive_become_files(local: Fetch):
    links = ("train/1.jpg", LINK, "all/../../all/a.jpg"), ("h", HARD, "./all/a.jpg")
    folder = local(tar_of(*links, ("all/a.jpg", b"picture")))
    assert content(folder) == dict.fromkeys(("train/1.jpg", "all/a.jpg", "h"), b"picture")
    assert not any(path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID) for path in folder.rglob("*"))


FETCH = """
import sys
from clip_lightning.data import sources
if "stop" in sys.argv:
    unpack = sources.unpack
    def stop(*arguments):  # everything is written but not yet in place
        unpacked = unpack(*arguments)
        print("unpacked", flush=True)
        sys.stdin.read()
        return unpacked
    sources.unpack = stop
print("begun", flush=True)
source = sources.Archive.parse(sys.argv[1])
source.fetch()
print(source.folder())
"""


def fetching(server: Server, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, f"{server.url}#sha256={digest(server.data)}", *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    for word in ("begun", *("unpacked" for _ in words)):
        assert process.stdout.readline() == f"{word}\n"
    return process


def test_concurrent_processes_download_once_and_a_killed_one_leaves_no_folder(server: Server, cache: Path):
    with fetching(server, "stop") as killed:
        killed.send_signal(signal.SIGKILL)
    folder = cache / digest(server.data)[:16]
    assert not folder.exists()
    first = fetching(server, "stop")
    second = fetching(server)
    time.sleep(0.1)  # until it waits, or, if it does not, downloads
    first.communicate(timeout=60)
    printed, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert Path(printed.strip()) == folder and content(folder) == FILES
    assert len(server.credentials) == 2
    assert {path.name for path in cache.iterdir()} == {folder.name, f".{folder.name}.lock"}
