"""The page: it answers what the index answers, to many at once, and serves nothing else."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

from clip_lightning import CLIP, ImageIndex
from clip_lightning.commands.app import _is_loopback, run
from clip_lightning.data.scenes import draw
from clip_lightning.errors import UserError
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.search.run_record import read_run

gradio_client = pytest.importorskip("gradio_client")

HOSTILE = '<img src=x onerror="window.hit=1"> ${window.hit=1} {{7*7}} `</script>'
SECRET = "this file is nobody's business"


@dataclass(frozen=True)
class Served:
    """A page, and what lies around it."""

    url: str
    index: ImageIndex
    photos: Path
    run: Path
    log: Path

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Status and body for a path that is sent as it is, with its dots."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def upload(self, name: str, data: bytes, **headers: str) -> tuple[int, str]:
        """Status and the answer, which is the path on the server if it was taken."""
        head = f'--xx\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + b"\r\n--xx--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=xx"}
        status, answer = self.ask("/gradio_api/upload", "POST", body, **kind, **headers)
        return status, json.loads(answer)[0] if status == 200 else answer.decode()


@pytest.fixture(scope="module")
def served(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page of twelve drawn pictures, one with a hostile caption, and of a model in a run's folder."""
    place = tmp_path_factory.mktemp("page")
    photos = place / "photos"
    photos.mkdir()
    for number in range(12):
        draw(0, number, 48).save(photos / f"{number}.png")
    captions = [{"image": f"{n}.png", "caption": f"picture {n}" if n else HOSTILE} for n in range(12)]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    folder = place / "runs" / "20260101-000000-abcd"
    torch.manual_seed(0)
    clip = CLIP(
        ImageTower.from_name("random:test_vit", 32), TextTower.from_name(f"random:{bert}"), embed_dim=16
    )
    clip.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(SECRET)
    metrics = {
        "text_to_image_R@1": 81.12,
        "image_to_text_R@10": 100.0,
        "parameters": 1234567,
        "epoch": HOSTILE,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.html").write_text("<h1>What the model finds</h1><script>parent.hit=1</script>")
    (folder / "secret.txt").write_text(SECRET)
    index = ImageIndex.build(folder / "model", photos, place / "index")
    # Gradio leaves event loops and sockets to the garbage collector: not in the process of the tests
    log = place / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command("app", place / "index", "--port", free_port()),
            stderr=file,
            env=os.environ | {"TMPDIR": str(place)},
        )
    try:
        yield Served(awaited_url(log, process), index, photos, folder, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def command(*words: object) -> list[str]:
    """The words after `clip-lightning` as those of a process."""
    program = """
import sys
from clip_lightning.__main__ import COMMANDS, main
COMMANDS.setdefault("app", ("clip_lightning.commands.app", "pictures found on a page"))
sys.exit(main(sys.argv[1:]))
"""
    return [sys.executable, "-c", program, *map(str, words)]


def awaited_url(log: Path, process: subprocess.Popen[Any]) -> str:
    """What the command says when the page is there."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"(http://\S+) \(Ctrl-C", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    """Gradio's own client."""
    client = gradio_client.Client(served.url, verbose=False)
    yield client
    client.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_records(found: list[Any]) -> list[dict[str, Any]]:
    """As programs get them."""
    records = [hit.as_dict() for hit in found]
    return [{"file": record.pop("path"), **record} for record in records]


def as_picture(path: Path | str) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


# answers


def test_programs_get_what_the_index_says(served: Served, client: Any) -> None:
    picture = served.photos / "3.png"
    found = client.predict("a red circle", 5, api_name="/search")
    assert found == as_records(served.index.search("a red circle", 5)[0])
    found = client.predict(gradio_client.handle_file(str(picture)), 4, api_name="/search_by_image")
    assert [hit["file"] for hit in found] == [
        str(hit.path) for hit in served.index.search_by_image([picture], 4)[0]
    ]
    assert found[0]["file"] == str(picture)
    labels = "a star,  a red   circle , a star,"
    judged = client.predict(gradio_client.handle_file(str(picture)), labels, api_name="/classify")
    assert judged["reading"] == "softmax"
    assert judged["probabilities"].keys() == {"a star", "a red circle"}
    assert sum(judged["probabilities"].values()) == pytest.approx(1)
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert named.keys() == {"/search", "/search_by_image", "/classify"}


def test_fifty_at_once_get_their_own_answers(served: Served) -> None:
    sentences = [
        f"{count} {colour} squares" for count in range(10) for colour in "red blue green a on".split()
    ]
    expected = [as_records(served.index.search(sentence, 3)[0]) for sentence in sentences]

    def ask(sentence: str) -> Any:
        """As `curl` would: an event, and then its answer."""
        body = json.dumps({"data": [sentence, 3]}).encode()
        kind = {"Content-Type": "application/json"}
        event = json.loads(served.ask("/gradio_api/call/search", "POST", body, **kind)[1])["event_id"]
        answer = served.ask(f"/gradio_api/call/search/{event}")[1].decode()
        assert "event: complete" in answer, answer
        return json.loads(answer.rpartition("data: ")[2])[0]

    with ThreadPoolExecutor(50) as threads:
        assert list(threads.map(ask, sentences)) == expected


def test_a_model_with_a_bias_judges_each_label(make_clip: Callable[..., CLIP], tmp_path: Path) -> None:
    from clip_lightning.search.answers import Answers

    draw(0, 1, 32).save(tmp_path / "1.png")
    index = ImageIndex.build(make_clip(init_bias=-1.0), tmp_path, tmp_path / "index")
    judged = Answers(index).classify(tmp_path / "1.png", "a star, a red circle", "none")
    assert judged.reading == "sigmoid"
    assert sum(judged.by_label.values()) != pytest.approx(1)


@pytest.mark.parametrize(
    ("endpoint", "given", "reason"),
    [
        ("/search", ["  ", 3], "sentence to search for is empty"),
        ("/search", ["a", 0], "k is 0; expected 1 to 60"),
        ("/search", ["a", 61], "k is 61"),
        ("/search", ["a" * 10_001, 3], "10,001 characters"),
        ("/search", [None, 3], "something went wrong"),
        ("/search_by_image", [None, 3], "expected an uploaded picture"),
        (
            "/search_by_image",
            ["broken.png", 3],
            "the picture cannot be read: not a picture of a known format",
        ),
        ("/search_by_image", ["bomb.png", 3], "8000x8000 pixels are more than"),
        ("/classify", ["good.png", " , ", "simple"], "there are no labels"),
        ("/classify", ["good.png", ",".join(map(str, range(201))), "none"], "201 labels are more than 200"),
        ("/classify", ["good.png", "a", "/etc/passwd"], "expected simple, imagenet, none"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(
    client: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    endpoint: str,
    given: list[Any],
    reason: str,
) -> None:
    file = tmp_path / str(given[0])[:20]
    if file.suffix == ".png":
        if file.stem == "broken":
            file.write_bytes(b"no picture")
        else:
            Image.new("1", (8000, 8000) if file.stem == "bomb" else (40, 40)).save(file)
        given = [gradio_client.handle_file(str(file)), *given[1:]]
    with pytest.raises(Exception, match=re.escape(reason)):
        client.predict(*given, api_name=endpoint)


def test_labels_are_words_and_never_a_file(served: Served, client: Any) -> None:
    picture = gradio_client.handle_file(str(served.photos / "1.png"))
    judged = client.predict(picture, str(served.run / "secret.txt"), "none", api_name="/classify")
    assert judged["probabilities"] == {str(served.run / "secret.txt"): 1}


# what is served


def test_only_uploads_are_served_as_files(served: Served) -> None:
    status, path = served.upload("a.txt", b"mine")
    assert status == 200
    assert served.ask(f"/gradio_api/file={path}") == (200, b"mine")
    link = Path(path).with_name("link.txt")
    link.symlink_to(served.run / "secret.txt")
    assert served.ask(f"/gradio_api/file={link}")[0] == 403
    assert served.ask(f"/gradio_api/file={path}/../../../../{served.run}/secret.txt")[0] == 403


@pytest.mark.parametrize(
    "prefix", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/run/", "/"]
)
def test_no_other_file_is_served(served: Served, prefix: str) -> None:
    files = [
        Path("/etc/passwd"),
        served.run / "secret.txt",
        served.run / "config.yaml",
        served.run / "model" / "config.json",
        served.photos / "0.png",  # indexed: part of answers, but no file
        served.photos / "captions.jsonl",
        Path(os.path.abspath("pyproject.toml")),
        next((served.photos.parent / "index" / "versions").rglob("manifest.json")),
    ]
    up = ["", "../" * 12, "..%2f" * 12, "%2e%2e/" * 12, "..%252f" * 12, "....//" * 12, "..\\" * 12]
    for file in files:
        for dots in up:
            asked = f"{prefix}{dots}{str(file)[1:] if dots else file}"
            status, body = served.ask(asked.replace(" ", "%20"))
            assert status in (403, 404), asked
            assert file.read_bytes()[:20] not in body
    for name in ("config.yaml", "model/../config.yaml", "pyproject.toml", "README.md"):
        assert served.ask(f"{prefix}{name}")[0] in (403, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/file=http://127.0.0.1:1/",
        "/gradio_api/file=" + "a" * 5000,
        "/gradio_api/file=%00",
        "/monitoring",
        "/monitoring/summary",
        "/gradio_api/stream/a/b/c/playlist.m3u8",
        "/gradio_api/custom_component/a/client/component/index.js",
        "/gradio_api/deep_link",
        "/gradio_api/vibe-code/",
        "/docs",
        "/pwa_icon",
    ],
)
def test_what_the_page_does_not_need_is_not_there(served: Served, path: str) -> None:
    assert served.ask(path)[0] in (403, 404)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://127.0.0.1:1/a.png", "../../etc/passwd", "{photos}/1.png"]
)
@pytest.mark.parametrize("wrap", [lambda picture: picture, lambda picture: {"value": [picture]}])
def test_a_request_cannot_name_another_file(served: Served, path: str, wrap: Callable[[Any], Any]) -> None:
    picture = as_picture(path.format(photos=served.photos))
    kind = {"Content-Type": "application/json"}
    for name, data in (("search_by_image", [wrap(picture), 3]), ("search", [wrap(picture), 3])):
        body = json.dumps({"data": data}).encode()
        status, answer = served.ask(f"/gradio_api/call/{name}", "POST", body, **kind)
        assert (status, b"uploaded to this page" in answer) == (403, True)
        event = json.dumps({"data": data, "fn_index": 1, "session_hash": "s"}).encode()
        assert served.ask("/gradio_api/queue/join", "POST", event, **kind)[0] == 403


def test_requests_are_bounded(served: Served) -> None:
    status, answer = served.upload("big.png", bytes(21 * 2**20))
    assert status == 413
    assert "maximum allowed size" in answer
    kind = {"Content-Type": "application/json"}
    assert served.ask("/gradio_api/call/search", "POST", b" " * 1_000_001, **kind)[0] == 413
    assert served.ask("/gradio_api/call/search", "POST", b"[" * 100_000, **kind)[0] == 400
    assert served.ask("/gradio_api/call/search", "DELETE")[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.com"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1"},  # another port of this machine
    ],
)
def test_other_sites_cannot_send_anything(served: Served, headers: dict[str, str]) -> None:
    for path in ("/gradio_api/upload", "/gradio_api/call/search", "/gradio_api/queue/join"):
        for method in ("POST", "OPTIONS"):
            assert served.ask(path, method, b"", **headers)[0] == 403
    assert served.ask("/", **headers)[0] == 200  # a link to it


def test_this_page_and_programs_can_upload(served: Served) -> None:
    here = urlsplit(served.url).netloc
    for headers in (
        {},
        {"Origin": f"http://{here}"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://x"},
    ):
        assert served.upload("a.txt", b"mine", **headers)[0] == 200


def test_all_uploads_together_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from clip_lightning.search import guard

    monkeypatch.setattr(guard, "MOST_UPLOADED", 250)
    monkeypatch.setattr(guard, "FILES_PER_UPLOAD", 1)
    monkeypatch.setattr(guard, "MOST_FILES", 3)

    async def store(scope: Any, receive: Any, send: Any) -> None:
        size = int(dict(scope["headers"])[b"content-length"])
        if size == 99:  # while it arrives, others have to count it
            assert await statuses(99, 60, 1) == [507, 507, None]
        (tmp_path / str(len(list(tmp_path.iterdir())))).write_bytes(bytes(size))

    page = guard.Guard(store, uploads=tmp_path, hosts=frozenset(), files={})

    async def statuses(*sizes: int | str, **others: str) -> list[int | None]:
        """The guard's answers to uploads of so many bytes; None for those that it hands on."""
        answers: list[int | None] = []
        for size in sizes:
            fields = {"content-length": str(size), **others}
            headers = [(name.encode(), value.encode()) for name, value in fields.items()]
            sent: list[Any] = []

            async def send(message: Any, sent: list[Any] = sent) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
            await page(scope, None, send)  # type: ignore[arg-type]
            answers.append(sent[0]["status"] if sent else None)
        return answers

    assert asyncio.run(statuses(100, 99)) == [None, None]
    assert asyncio.run(statuses(1)) == [507]  # the fourth file
    for file in tmp_path.iterdir():
        file.unlink()
    assert asyncio.run(statuses(251, 250, 1, 10**9, "many")) == [507, None, 507, 413, 411]
    assert asyncio.run(statuses(1, **{"transfer-encoding": "chunked"})) == [411]


def test_a_page_elsewhere_cannot_use_it(served: Served) -> None:
    assert served.ask("/", Host="example.com")[0] == 403
    assert served.ask("/", Host="localhost:1")[0] == 200
    assert served.ask("/", Host="127.0.0.1")[0] == 200


def test_the_page_names_no_other_host(served: Served) -> None:
    html = served.ask("/")[1].decode()
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?:https?:)?//[^\"']+", html)
    assert "default-src 'self'" in dict(_headers(served, "/"))["content-security-policy"]
    theme = served.ask("/theme.css")[1].decode()
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)]+", theme)


def _headers(served: Served, path: str) -> list[tuple[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=30)
    connection.request("GET", path)
    found = [(name.lower(), value) for name, value in connection.getresponse().getheaders()]
    connection.close()
    return found


# the run


def test_the_run_beside_the_model(served: Served, tmp_path: Path) -> None:
    assert served.ask("/run/predictions.html")[1].startswith(b"<h1>What the model finds")
    assert "sandbox" in dict(_headers(served, "/run/predictions.html"))["content-security-policy"]
    other = tmp_path / "other"
    shutil.copytree(served.run, other)
    (other / "predictions.html").unlink()
    (other / "predictions.html").symlink_to(served.run / "secret.txt")
    (other / "predictions").mkdir()
    (other / "predictions" / "recall.png").write_bytes(b"png")
    record = read_run(other / "model")
    assert record is not None
    assert list(record.files) == record.pictures == ["/run/predictions/recall.png"]
    assert record.predictions is None
    (other / "config.yaml").unlink()
    assert read_run(other / "model") is read_run("owner/name") is read_run(None) is None


def test_words_of_the_data_are_words_on_the_page(served: Served, client: Any) -> None:
    from clip_lightning.search.page import _found, _run

    page = _found(_answers(served), "a", None, 12)
    assert page.count("<img ") == 12
    assert page.count("data:image/jpeg;base64,") == 12
    assert "&lt;img src=x onerror=&#34;" in page
    record = read_run(served.run / "model")
    assert record is not None
    assert "81.1" in _run(record) and "1,234,567" in _run(record)
    assert "<img" not in _run(record)


def _answers(served: Served) -> Any:
    from clip_lightning.search.answers import Answers

    return Answers(served.index)


def test_a_picture_that_is_gone_is_said_to_be(make_clip: Callable[..., CLIP], tmp_path: Path) -> None:
    from clip_lightning.search.answers import Answers
    from clip_lightning.search.page import _found

    draw(0, 1, 32).save(tmp_path / "1.png")
    index = ImageIndex.build(make_clip(), tmp_path, tmp_path / "index")
    (tmp_path / "1.png").unlink()
    assert "no longer there" in _found(Answers(index), "a", None, 12)


# the command


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{model}"], "is a model; give the folder of pictures after it"),
        (["nowhere"], "no finished index in nowhere"),
        (["{index}", "--out", "x"], "--out is where MODEL FOLDER puts its index"),
        (["{index}", "--port", "0"], "--port 0: expected 1 to 65535"),
        (["{model}", "{photos}", "--model", "x"], "--model is for an index"),
        (["{index}", "--port", "{port}"], r"--port \d+ is taken"),
        (["{index}", "--host", "192.0.2.1"], "--host 192.0.2.1 cannot be listened at"),
    ],
)
def test_a_mistake_is_one_line(served: Served, words: list[str], reason: str) -> None:
    places = {
        "model": served.run / "model",
        "index": served.photos.parent / "index",
        "photos": served.photos,
        "port": urlsplit(served.url).port,
    }
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=reason) as raised:
            run(["app", *(word.format(**places) for word in words)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "\n" not in str(raised.value)


def test_who_may_ask() -> None:
    assert all(map(_is_loopback, ["127.0.0.1", "127.1.2.3", "localhost", "::1"]))
    assert not any(map(_is_loopback, ["0.0.0.0", "::", "192.168.1.2", "example.com"]))


def test_from_a_folder_to_a_page_and_ctrl_c(served: Served, tmp_path: Path) -> None:
    """The whole command: indexes, serves, and ends although a page is open."""
    words = command("app", served.run / "model", served.photos, "--host", "0.0.0.0", "--port", free_port())
    places = {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, env=os.environ | places)
    try:
        page = Served(awaited_url(log, process), served.index, served.photos, served.run, log)
        assert page.ask("/", Host="example.com")[0] == 200
        connection = http.client.HTTPConnection(urlsplit(page.url).netloc, timeout=30)
        connection.request("GET", "/gradio_api/heartbeat/abc")  # as a browser, which never ends it
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == b""
        connection.close()
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert process.returncode == 130
    assert "Traceback" not in text
    assert f"is kept in {tmp_path}/clip-lightning/indexes/photos-" in text
    assert "12 pictures (12 new)" in text
    assert text.count("there is no login") == 1
    assert not list(tmp_path.glob("clip-lightning-app-*"))


# in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, served: Served) -> Iterator[Any]:
    """The page as it opens; at the end it must have asked no other host, and complained of nothing."""
    yield from opened(chromium, served)


@pytest.fixture
def phone(chromium: Any, served: Served) -> Iterator[Any]:
    """The page on a small screen, dark."""
    small = {"width": 390, "height": 844}
    yield from opened(chromium, served, viewport=small, is_mobile=True, has_touch=True, color_scheme="dark")


def opened(browser: Any, served: Served, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**options)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # a refused upload has no progress to load, and a run's page no scripts to run: both as they should be
    usual = ("Failed to load resource", "Blocked script execution")
    page.on("console", lambda it: wrong.append(it.text) if it.type == "error" else None)
    page.goto(served.url)
    page.get_by_label("Sentence").wait_for()
    page.get_by_label("Drop an image file here to upload").first.wait_for()
    yield page
    assert page.evaluate("window.hit") is None, "words of the data were run"
    context.close()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {urlsplit(served.url).netloc}
    assert [text for text in wrong if not text.startswith(usual)] == []


def scores(page: Any) -> list[str]:
    page.locator(".cl-grid li").first.wait_for()
    return page.locator(".cl-grid b").all_inner_texts()


def search_by_picture(page: Any, picture: Path, tab: int = 0) -> None:
    page.locator("input[type=file]").nth(tab).set_input_files(picture)


@pytest.mark.browser
def test_a_sentence_by_keyboard_alone(page: Any, served: Served) -> None:
    assert page.evaluate("document.activeElement.placeholder") == "a dog running on grass"
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    assert scores(page) == [f"{hit.score:.3f}" for hit in served.index.search("a red circle", 12)[0]]
    assert page.locator(".cl-grid img").count() == 12
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "(e => [e.getAttribute('aria-label') || e.innerText, getComputedStyle(e).outlineStyle])"
                "(document.activeElement)"
            )
        )
    assert {style for _, style in reached} == {"solid"}, "focus is not seen"
    names = [name for name, _ in reached]
    wanted = ["Search", "number input for Pictures to show", "range slider for Pictures to show"]
    assert [name for name in names if name in wanted] == wanted
    assert "Drop an image file here to upload" in names


@pytest.mark.browser
def test_a_picture_and_a_sentence_replace_each_other(page: Any, served: Served) -> None:
    page.get_by_label("Sentence").fill("a star")
    search_by_picture(page, served.photos / "5.png")
    page.get_by_text("most similar to this picture").wait_for()
    assert scores(page)[0] == "1.000"
    assert page.locator(".cl-grid li").first.inner_text() == "1.000 picture 5"
    assert page.get_by_label("Sentence").input_value() == ""
    page.get_by_label("Sentence").fill("a star")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("most similar to “a star”").wait_for()
    page.get_by_label("Drop an image file here to upload").first.wait_for()


@pytest.mark.browser
def test_nothing_to_search_for(page: Any) -> None:
    hint = page.get_by_text("Type a sentence and press Enter")
    hint.wait_for()
    page.get_by_label("Sentence").fill("   ")
    page.get_by_label("Sentence").press("Enter")
    page.wait_for_timeout(500)
    assert hint.is_visible()
    assert page.locator(".cl-grid").count() == 0


@pytest.mark.browser
def test_labels_as_they_are_typed(page: Any, served: Served) -> None:
    page.get_by_role("tab", name="Zero-shot").click()
    page.get_by_text("Drop a picture and type some labels").wait_for()
    search_by_picture(page, served.photos / "5.png", 1)
    page.get_by_label("Labels, with commas between").press_sequentially("a star, <b>a circle</b>, a heart")
    page.locator(".cl-bars > li").nth(2).wait_for()
    page.get_by_text("softmax:").wait_for()
    page.wait_for_function("document.querySelector('.cl-bars').innerText.includes('a heart')")
    shares = [float(text.rstrip(" %")) for text in page.locator(".cl-bars b").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert page.get_by_text("<b>a circle</b>", exact=True).is_visible()
    page.get_by_label("Labels, with commas between").fill("a star")  # as pasted
    page.get_by_text("100.0 %").wait_for()


@pytest.mark.browser
def test_a_large_upload_and_a_broken_one_are_told(page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(bytes(30_000_000))
    search_by_picture(page, large)
    page.get_by_text(re.compile("exceed the maximum allowed size of 20")).first.wait_for()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    search_by_picture(page, broken)
    page.get_by_role("alert").get_by_text("the picture cannot be read: not a picture").wait_for()


@pytest.mark.browser
def test_files_are_out_of_reach_from_the_page(chromium: Any, served: Served) -> None:
    page = chromium.new_page()
    page.goto(served.url)
    paths = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", f"{served.photos}/0.png"]
    for path in paths:
        status = page.evaluate("path => fetch('/gradio_api/file=' + path).then(r => r.status)", path)
        assert status in (403, 404), path
    assert page.evaluate("fetch('https://example.com').then(() => 'sent', () => 'refused')") == "refused"
    page.close()


@pytest.mark.browser
def test_the_run_on_the_page(page: Any) -> None:
    page.get_by_role("tab", name="Run").click()
    page.get_by_role("cell", name="81.1").wait_for()
    page.frame_locator("iframe").get_by_role("heading", name="What the model finds").wait_for()


@pytest.mark.browser
def test_a_phone_needs_no_sideways_scrolling(phone: Any) -> None:
    phone.get_by_label("Sentence").fill("a red circle")
    phone.get_by_role("button", name="Search").click()
    scores(phone)
    columns = phone.locator(".cl-grid").evaluate("grid => getComputedStyle(grid).gridTemplateColumns")
    assert len(columns.split()) == 2
    for tab in ("Search", "Zero-shot", "Run"):
        phone.get_by_role("tab", name=tab).click()
        phone.wait_for_timeout(200)
        assert phone.evaluate("document.documentElement.scrollWidth") == 390, tab
