"""Archives by URL: a server with faults, archives that are made to do harm, kills and rivals."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import io
import os
import re
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

import pytest

from clip_lightning.data import download as downloads
from clip_lightning.data import sources, unpack
from clip_lightning.data.archive import archive_folder, fetch_archive
from clip_lightning.data.formats import read_captions
from clip_lightning.errors import UserError

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


def tarred(files: dict[str, bytes], compression: str = "gz") -> bytes:
    return tar_of(*((tarfile.TarInfo(name), content) for name, content in files.items()), how=compression)


def tar_of(*members: tuple[tarfile.TarInfo, bytes], how: str = "") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{how}") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def plain(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no waiting between attempts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "FIRST_WAIT", 0.0)
    return tmp_path / "cache" / "clip-lightning" / "data"


class Server(ThreadingHTTPServer):
    """Serves `data` under any path, and does at each request what `faults` says next.

    `status 503` and the like; `cut N`: hangs up after N bytes; `whole`: knows no ranges; `wait`: sends the
    first half and then nothing; `to URL`: redirects there.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = data
        self.faults: list[str] = []
        self.starts: list[int] = []
        self.credentials: list[str | None] = []
        self.waited_in_vain = False
        self.half_sent, self.may_end = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/data"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        fault, _, number = (self.server.faults.pop(0) if self.server.faults else "").partition(" ")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and fault != "whole" else 0
        self.server.starts.append(start)
        self.server.credentials.append(self.headers.get("Authorization"))
        if fault == "to":
            self.send_response(302)
            self.send_header("Location", number)
            self.end_headers()
            return
        data = self.server.data
        if fault == "status" or start >= len(data):
            self.send_error(int(number) if fault == "status" else 416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if fault == "wait":
            self.wfile.write(data[start : len(data) // 2])
            self.wfile.flush()
            self.server.half_sent.set()
            self.server.waited_in_vain = not self.server.may_end.wait(5)
            return
        self.wfile.write(data[start:][: int(number)] if fault == "cut" else data[start:])
        self.close_connection = True

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            pass  # the client was killed

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], Server]]:
    servers = []

    def start(data: bytes) -> Server:
        server = Server(data)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.may_end.set()
        server.shutdown()
        server.server_close()


# The folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_archives_become_folders_that_are_read(kind: str, serve: Callable[[bytes], Server], cache: Path):
    data = zipped(FILES) if kind == "zip" else tarred(FILES, kind.removeprefix("tar").removeprefix("."))
    server = serve(data)
    folder = fetch_archive(server.url, digest(data).upper())
    assert folder == archive_folder(server.url, digest(data)) == cache / digest(data)[:16]
    assert content(folder) == FILES
    images = read_captions(folder).images
    assert [(image.path.name, image.captions, image.split) for image in images] == [
        ("a.jpg", ("one",), "train"),
        ("b.jpg", ("two",), "test"),
    ]
    assert fetch_archive(server.url, digest(data)) == folder
    assert server.starts == [0], "it was asked for again"
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == [folder.name]


def test_a_file_of_this_machine_is_left_where_it_is(tmp_path: Path):
    archive = tmp_path / "my data.zip"
    archive.write_bytes(zipped(FILES))
    assert content(fetch_archive(archive.as_uri(), digest(archive.read_bytes()))) == FILES
    with pytest.raises(UserError, match="has the SHA-256"):
        fetch_archive(archive.as_uri(), "0" * 64)
    assert archive.exists()
    with pytest.raises(UserError, match=r"--data\.url file:.*nothing\.zip cannot be read \(No such file"):
        fetch_archive((tmp_path / "nothing.zip").as_uri(), "0" * 64)


@pytest.mark.parametrize("make", [zipped, tarred])
def test_the_folder_around_everything_and_what_macos_adds_are_taken_off(
    make: Callable[[dict[str, bytes]], bytes], tmp_path: Path
):
    around = {f"./pets/{name}": data for name, data in FILES.items()}
    extra = {"__MACOSX/pets/._captions.csv": b"\0", "pets/images/._a.jpg": b"\0"}
    archive = tmp_path / "pets"
    archive.write_bytes(make(around | extra))
    assert content(fetch_archive(archive.as_uri(), digest(archive.read_bytes()))) == FILES


@pytest.mark.parametrize(
    ("url", "sha256", "message"),
    [
        (
            "https://a.example/x.zip?key=secret",
            None,
            r"--data\.url https://a\.example/x\.zip has no checksum; .*sha256sum",
        ),
        ("https://a.example/x.zip", "abc", r"--data\.sha256 'abc' is no SHA-256; .*64 digits"),
        ("ftp://a.example/x.zip", "0" * 64, "expected https://"),
        ("file://other/x.zip", "0" * 64, "expected https://"),
        ("x.zip", "0" * 64, r"--data\.url x\.zip is not a URL"),
        ("https://me:secret@a.example/x.zip", None, r"--data\.url https://a\.example/x\.zip has no checksum"),
        ("https://me:secret/@a.example/x.zip", "0" * 64, r"--data\.url is not a valid URL; .*%2F"),
        ("https://[a.example/x.zip?key=secret", "0" * 64, r"--data\.url is not a valid URL"),
    ],
)
def test_a_wrong_address_or_checksum_is_one_line(url: str, sha256: str | None, message: str):
    for function in (archive_folder, fetch_archive):
        with pytest.raises(UserError, match=message) as raised:
            function(url, sha256)
        assert "\n" not in str(raised.value)
        assert "secret" not in str(raised.value)


# The connection -----------------------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_was(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    server.faults = ["status 500", "cut 1000", "status 503", "cut 50000"]
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts == [0, 0, 1000, 1000, 51000]


def test_failures_with_progress_in_between_are_not_counted(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    server.faults = ["cut 1000"] * (downloads.ATTEMPTS + 2)
    assert content(fetch_archive(server.url, digest(server.data))) == FILES


def test_a_server_without_ranges_is_asked_for_all(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    server.faults = ["cut 1000", "whole"]
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts == [0, 0]


def test_a_part_that_is_whole_is_not_fetched_again(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    folder = archive_folder(server.url, digest(server.data))
    part = folder.with_name(f".{folder.name}.draft") / "archive.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.data)  # killed before its checksum was known
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts == [len(server.data)]


def test_a_refusal_is_not_asked_twice(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    server.faults = ["status 404"]
    with pytest.raises(UserError, match=r"--data\.url http://127.* is refused .*HTTP 404 Not Found"):
        fetch_archive(server.url, digest(server.data))
    assert len(server.starts) == 1


def test_user_and_password_go_to_their_server_alone(serve: Callable[[bytes], Server]):
    server, other = serve(zipped(FILES)), serve(zipped(FILES))
    url = server.url.replace("://", "://me:a%40secret@")
    server.faults = ["to /moved", f"to {other.url}"]
    assert content(fetch_archive(url, digest(server.data))) == FILES
    assert server.credentials == [f"Basic {base64.b64encode(b'me:a@secret').decode()}"] * 2
    assert other.credentials == [None]
    server.faults = ["status 401"]
    with pytest.raises(UserError, match=r"http://127.* is refused .*HTTP 401.*password in it") as raised:
        fetch_archive(url, "0" * 64)
    assert "secret" not in str(raised.value)


def test_after_several_failures_it_is_given_up_and_can_go_on(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    server.faults = ["cut 1000", *["status 500"] * downloads.ATTEMPTS]
    with pytest.raises(UserError, match=r"HTTP 500 .*6 times in a row\); 1000 bytes are kept"):
        fetch_archive(server.url, digest(server.data))
    assert not archive_folder(server.url, digest(server.data)).exists()
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts[-1] == 1000


def test_no_server(serve: Callable[[bytes], Server], monkeypatch: pytest.MonkeyPatch):
    server = serve(b"")
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    with pytest.raises(UserError, match=r"cannot be fetched \(Connection refused, 2 times"):
        fetch_archive(server.url, "0" * 64)


def test_silence_counts_as_broken(serve: Callable[[bytes], Server], monkeypatch: pytest.MonkeyPatch):
    server = serve(zipped(FILES))
    server.faults = ["wait"]
    monkeypatch.setattr(downloads, "SILENCE", 0.2)
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts == [0, len(server.data) // 2]
    assert not server.waited_in_vain, "the server's patience ended first"


def test_a_wrong_checksum_removes_the_file(serve: Callable[[bytes], Server], cache: Path):
    server = serve(zipped(FILES))
    wanted = digest(b"another")
    with pytest.raises(UserError, match=f"has the SHA-256 {digest(server.data)}, .* {wanted}") as raised:
        fetch_archive(server.url, wanted)
    assert "\n" not in str(raised.value)
    assert content(cache).keys() == {f".{wanted[:16]}.lock"}


def test_a_part_of_another_version_is_found_out_and_fetched_anew(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    wanted = digest(server.data)
    new, server.data = server.data, bytes(len(server.data))
    server.faults = ["cut 1000", *["status 500"] * downloads.ATTEMPTS]
    with pytest.raises(UserError, match="1000 bytes are kept"):
        fetch_archive(server.url, wanted)
    server.data = new
    with pytest.raises(UserError, match="has the SHA-256"):
        fetch_archive(server.url, wanted)
    assert content(fetch_archive(server.url, wanted)) == FILES


def test_too_little_room(serve: Callable[[bytes], Server], monkeypatch: pytest.MonkeyPatch):
    server = serve(zipped(FILES))

    def full(folder: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, "9.9 GB are needed, 0.1 GB are free")

    monkeypatch.setattr(unpack, "require_space", full)
    with pytest.raises(UserError, match=r"cannot be written .*9\.9 GB are needed.*XDG_CACHE_HOME"):
        fetch_archive(server.url, digest(server.data))
    monkeypatch.setattr(downloads, "require_space", full)
    with pytest.raises(UserError, match="cannot be written"):
        fetch_archive(server.url, "1" * 64)
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"1000000000\.0 GB are needed"):
        sources.require_space(Path.cwd(), 10**18)


# Harm ---------------------------------------------------------------------------------------------------


def unix_zip(name: str, kind: int, data: str = "x", **others: bytes) -> bytes:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, data)
        for other, bytes_ in others.items():
            archive.writestr(other, bytes_)
    return out.getvalue()


def encrypted_zip() -> bytes:
    data = bytearray(zipped({"a.jpg": b"x"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    return bytes(data)


def damaged_zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.jpg", b"picture")
    return data.getvalue().replace(b"picture", b"pasture", 1)


def header_bomb() -> bytes:
    """A header that says it has 64 MB, in 64 KB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 26
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 26), 1)


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
HARMFUL = {
    "zip ..": (lambda: zipped({"../escaped": b"x"}), "leads out of it"),
    "zip .. inside": (lambda: zipped({"a/../../escaped": b"x"}), "leads out of it"),
    "zip absolute": (lambda: zipped({"/tmp/escaped": b"x"}), "absolute name"),
    "zip drive": (lambda: zipped({"C:/escaped": b"x"}), "absolute name"),
    "zip backslash": (lambda: unix_zip("..\\escaped", stat.S_IFREG), "backslashes"),
    "zip link out": (lambda: unix_zip("out", stat.S_IFLNK, "/etc/passwd"), "link, 'out', to '/etc/passwd'"),
    "zip link up": (lambda: unix_zip("out", stat.S_IFLNK, "../../x"), "no file of it"),
    "zip through a link": (
        lambda: unix_zip("d", stat.S_IFLNK, "/tmp", **{"d/escaped": b"x"}),
        "one file on some",
    ),
    "zip pipe": (lambda: unix_zip("pipe", stat.S_IFIFO), "device or the like"),
    "zip case": (lambda: zipped({"a.jpg": b"x", "A.JPG": b"y"}), "'a.jpg' and 'A.JPG'"),
    "zip case of folders": (lambda: zipped({"i/a.jpg": b"x", "I/b.jpg": b"y"}), "'i/' and 'I/'"),
    "zip accents": (lambda: zipped({"é.jpg": b"x", "e\u0301.jpg": b"y"}), "one file on some"),
    "zip file and folder": (lambda: zipped({"a": b"x", "a/b": b"y"}), "one file on some"),
    "zip bomb": (lambda: zipped({"zeros": bytes(3_000_000)}), "unpacks to more than"),
    "zip of many": (lambda: zipped({str(i): b"" for i in range(600)}), "unpacks to more than"),
    "zip encrypted": (encrypted_zip, "broken .*encrypted"),
    "zip damaged": (damaged_zip, "broken .*CRC"),
    "zip cut": (lambda: zipped(FILES)[:1000], "broken"),
    "tar ..": (lambda: tarred({"../escaped": b"x"}), "leads out of it"),
    "tar absolute": (lambda: tarred({"/tmp/escaped": b"x"}), "absolute name"),
    "tar link out": (lambda: tar_of(special("out", LINK, "/etc/passwd")), "'out', to '/etc/passwd'"),
    "tar link up": (lambda: tar_of(special("a/out", LINK, "../../x")), "to '../x'"),
    "tar hard link out": (lambda: tar_of(special("out", HARD, "/etc/passwd")), "'out', to '/etc/passwd'"),
    "tar hard link up": (lambda: tar_of(special("a/out", HARD, "../x")), "to '../x'"),
    "tar link to nothing": (lambda: tar_of(special("a", LINK, "b")), "no file of it"),
    "tar link to a folder": (lambda: tar_of(plain("d/x"), special("a", LINK, "d")), "no file of it"),
    "tar link to itself": (lambda: tar_of(special("a", LINK, "a")), "no file of it"),
    "tar through a link": (
        lambda: tar_of(special("d", LINK, "/tmp"), plain("d/escaped")),
        "one file on some",
    ),
    "tar through a link to inside": (
        lambda: tar_of(plain("real/x"), special("d", LINK, "real"), plain("d/y")),
        "one file on some",
    ),
    "tar over a link": (lambda: tar_of(special("d", LINK, "/tmp/escaped"), plain("d")), "one file on some"),
    "tar twice": (lambda: tar_of(plain("a"), plain("a")), "'a' and 'a'"),
    "tar device": (lambda: tar_of(special("null", tarfile.CHRTYPE)), "device or the like"),
    "tar disk": (lambda: tar_of(special("disk", tarfile.BLKTYPE)), "device or the like"),
    "tar pipe": (lambda: tar_of(special("pipe", tarfile.FIFOTYPE)), "device or the like"),
    "tar case": (lambda: tarred({"a.jpg": b"x", "A.jpg": b"y"}), "one file on some"),
    "tar bomb": (lambda: tarred({"zeros": bytes(3_000_000)}), "unpacks to more than"),
    "tar of copies": (
        lambda: tar_of(
            plain("a", bytes(900_000)), *(special(f"l{i}", LINK, "a") for i in range(3)), how="gz"
        ),
        "unpacks to more than",
    ),
    "tar header bomb": (header_bomb, "header of 6710"),
    "tar.gz cut": (lambda: tarred(FILES)[:1000], "broken"),
    "tar.bz2 damaged": (lambda: tarred(FILES, "bz2")[:80] + bytes(400), "broken"),
    "tar.xz damaged": (lambda: tarred(FILES, "xz")[:80] + bytes(400), "broken"),
    "no archive": (lambda: b"<html>Please log in</html>" * 100, "is no .zip"),
    "nothing": (lambda: b"", "is no .zip"),
    "empty zip": (lambda: zipped({}), "is empty"),
}


@pytest.mark.parametrize("attack", HARMFUL)
def test_harm_is_refused(attack: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unpack, "ALWAYS_ALLOWED", 2_000_000)
    make, message = HARMFUL[attack]
    archive = tmp_path / "archive"
    archive.write_bytes(make())
    before = {path for path in tmp_path.rglob("*") if cache not in path.parents} | set(
        Path("/tmp").glob("esc*")
    )
    with pytest.raises(UserError, match=message) as raised:
        fetch_archive(archive.as_uri(), digest(archive.read_bytes()))
    assert "\n" not in str(raised.value)
    assert "--data.url" in str(raised.value)
    after = {path for path in tmp_path.rglob("*") if cache not in path.parents} | set(
        Path("/tmp").glob("esc*")
    )
    assert after - before <= {cache, *cache.parents}
    assert {path.suffix for path in cache.iterdir()} == {".lock"}, "something of it was kept"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_link_to_a_file_of_the_archive_is_a_copy(kind: str, tmp_path: Path):
    link = "all/../../all/a.jpg"  # as seen from train/
    archive = tmp_path / "archive"
    if kind == "zip":
        archive.write_bytes(
            unix_zip("train/1.jpg", stat.S_IFLNK, "../all/a.jpg", **{"all/a.jpg": b"picture"})
        )
    else:
        members = (
            special("train/1.jpg", LINK, link),
            plain("all/a.jpg", b"picture"),
            special("h", HARD, "./all/a.jpg"),
        )
        archive.write_bytes(tar_of(*members))
    folder = fetch_archive(archive.as_uri(), digest(archive.read_bytes()))
    expected = {"train/1.jpg": b"picture", "all/a.jpg": b"picture"}
    assert content(folder) == (expected if kind == "zip" else expected | {"h": b"picture"})
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in folder.rglob("*.jpg"))


def test_rights_of_the_archive_are_not_taken_over(tmp_path: Path):
    info = tarfile.TarInfo("a.jpg")
    info.mode, info.uid = 0o6777, 0
    archive = tmp_path / "archive"
    archive.write_bytes(tar_of((info, b"x"), plain("b")))
    folder = fetch_archive(archive.as_uri(), digest(archive.read_bytes()))
    assert not (folder / "a.jpg").stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IXUSR)


# Kills and rivals ---------------------------------------------------------------------------------------

FETCH = """
import sys
from clip_lightning.data import unpack
from clip_lightning.data.archive import fetch_archive
if "stop" in sys.argv:
    def stop(writer):  # everything is written but not yet in place
        print("unpacked", flush=True)
        sys.stdin.read()
    unpack._Writer.copy_links = stop
print("begun", flush=True)
print(fetch_archive(sys.argv[1], sys.argv[2]))
"""


def fetching(server: Server, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, server.url, digest(server.data), *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    expect(process, "begun")
    return process


def expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


def test_killed_while_downloading(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    server.faults = ["wait"]
    process = fetching(server)
    assert server.half_sent.wait(30)
    part = archive_folder(server.url, digest(server.data))
    part = part.with_name(f".{part.name}.draft") / "archive.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    kill(process)
    assert not archive_folder(server.url, digest(server.data)).exists()
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts[-1] > 0, "it began anew"


def test_killed_while_unpacking(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    process = fetching(server, "stop")
    expect(process, "unpacked")
    kill(process)
    assert not archive_folder(server.url, digest(server.data)).exists()
    assert content(fetch_archive(server.url, digest(server.data))) == FILES
    assert server.starts == [0], "what had been downloaded was fetched again"


def test_two_at_once_download_once(serve: Callable[[bytes], Server]):
    server = serve(zipped(FILES))
    first = fetching(server, "stop")
    expect(first, "unpacked")
    second = fetching(server)
    time.sleep(0.1)  # until it waits, or, if it does not, downloads
    first.communicate(timeout=60)
    said, _ = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert content(Path(said.strip())) == FILES
    assert server.starts == [0]


def test_importing_it_is_light():
    program = "import sys, clip_lightning.data.archive, clip_lightning.data.hub; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"clip_lightning.data.hub", "clip_lightning.data.archive"} <= loaded
    assert not loaded & {"torch", "lightning", "datasets", "pyarrow", "numpy", "wandb"}
