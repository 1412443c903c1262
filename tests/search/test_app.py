"""The page answers what the index answers, to many at the same time, and serves nothing else."""

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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

import pytest
from PIL import Image

from clip_lightning import CLIP, ImageIndex
from clip_lightning.commands.app import _names
from clip_lightning.data.scenes import draw
from clip_lightning.search.folder import Options

pytest.importorskip("uvicorn")
MakeClip = Callable[..., CLIP]

HOSTILE = '<img src=x onerror="window.hit=1"> ${window.hit=1} {{7*7}} `</script>'
SECRET = "this file is nobody's business"
NAME = "photos.example.com"


class Answer(NamedTuple):
    status: int
    text: str
    headers: Any


@dataclass(frozen=True)
class Page:
    """A page, and what lies around it."""

    url: str
    index: Any = None
    photos: Path = Path()
    run: Path = Path()

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a path as it is, with its dots; names of headers have underscores for hyphens."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body, named)
        answer = connection.getresponse()
        try:
            return Answer(answer.status, answer.read().decode(errors="replace"), answer.headers)
        finally:
            connection.close()

    def api(self, upload: bytes | None = None, /, **query: object) -> dict[str, Any]:
        answer = self.ask(f"/api?{urlencode(query)}", upload)
        return {"status": answer.status, **json.loads(answer.text)}

    def image(self, number: int) -> bytes:
        return (self.photos / f"{number}.png").read_bytes()


@contextmanager
def serving(index: ImageIndex, names: frozenset[str] | None = None) -> Iterator[Page]:
    from clip_lightning.search.page import page_server

    server = page_server(index, names, "/photos")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield Page(f"http://127.0.0.1:{listener.getsockname()[1]}")
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def served(make_clip: MakeClip, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The page of twelve synthetic scenes, one with a hostile caption, and of a model in a run's folder."""
    place = tmp_path_factory.mktemp("page")
    photos, folder = place / "photos", place / "runs" / "20260101-000000-abcd"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x010E] = SECRET
    for number in range(12):
        draw(0, number, 48).save(photos / f"{number}.png", exif=exif)
    captions = [(n, f"image {n}" if n else HOSTILE) for n in range(12)] + [(5, "the second caption")]
    rows = [json.dumps({"image": f"{number}.png", "caption": caption}) for number, caption in captions]
    (photos / "captions.jsonl").write_text("\n".join(rows))
    make_clip().save_pretrained(folder / "model")
    for name in ("config.yaml", "metrics.json", "predictions.html", "secret.txt"):
        (folder / name).write_text(f"trainer: {SECRET}")
    index = ImageIndex.build(folder / "model", photos, place / "index", Options(onnx=False))
    with serving(index, _names("127.0.0.1", "127.0.0.1", NAME)) as page:
        yield Page(page.url, index, photos, folder)


def paths(found: list[Any]) -> list[str]:
    return [str(hit["path"] if isinstance(hit, dict) else hit.path) for hit in found]


def test_programs_get_what_the_index_says(served: Page) -> None:
    found, expected = served.api(q="a red circle", k=5)["results"], served.index.search("a red circle", 5)[0]
    plain = [json.loads(json.dumps(asdict(hit), default=str)) for hit in expected]
    assert [{name: value for name, value in hit.items() if name != "id"} for hit in found] == plain
    image, secret = served.photos / "3.png", str(served.run / "secret.txt")
    found = served.api(served.image(3), k=4)["results"]
    assert paths(found) == paths(served.index.search_by_image([image], 4)[0])
    assert paths(found)[0] == str(image)
    assert served.api(image=found[0]["id"], k=4)["results"] == found, "similar to a result"
    answer = served.api(served.image(3), labels=f"a star,  a red   circle , a star,{secret}")
    assert answer["reading"] == "softmax"
    assert answer["probabilities"].keys() == {"a star", "a red circle", secret}, "labels are never a file"
    assert sum(answer["probabilities"].values()) == pytest.approx(1)


def test_fifty_at_once_get_their_own_answers(served: Page) -> None:
    sentences = [f"{n} {colour} squares" for n in range(10) for colour in "red blue green a on".split()]
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda sentence: served.api(q=sentence, k=3)["results"], sentences))
    assert list(map(paths, answers)) == [paths(served.index.search(each, 3)[0]) for each in sentences]


def test_a_model_with_a_bias_judges_each_label(make_clip: MakeClip, served: Page, tmp_path: Path) -> None:
    clip, options = make_clip(init_bias=-1.0), Options(onnx=False)
    with serving(ImageIndex.build(clip, served.photos, tmp_path / "index", options)) as page:
        answer = page.api(served.image(1), labels="a star,a heart", templates="none")
        assert "Sigmoid: " in page.ask("/?labels=a+star", served.image(1)).text
    assert answer["reading"] == "sigmoid"
    assert sum(answer["probabilities"].values()) != pytest.approx(1)


@pytest.mark.parametrize(
    ("upload", "query", "reason"),
    [
        (None, {"q": "a", "k": 0}, "k is '0'; expected a whole number from 1 to 60"),
        (None, {"q": "a", "k": "9" * 5000}, "expected a whole number"),
        (None, {"image": "../../etc/passwd"}, "not in the results of any search"),
        (b"", {}, "cannot be read: the file is empty"),
        (b"no image", {}, "cannot be read: not a"),
        (8000, {}, "8000x8000 pixels are more than"),
        (40, {"labels": " , "}, "got 0 labels; give 1 to 200"),
        (40, {"labels": ",".join(map(str, range(201)))}, "got 201 labels; give 1 to 200"),
        (40, {"labels": "a", "templates": "/etc/passwd"}, "expected simple, imagenet, none"),
    ],
)
def test_odd_input_is_answered_with_one_clear_line(
    served: Page, tmp_path: Path, upload: bytes | int | None, query: dict[str, object], reason: str
) -> None:
    if isinstance(upload, int):
        Image.new("1", (upload, upload)).save(tmp_path / "image.png")
        upload = (tmp_path / "image.png").read_bytes()
    answer, page = served.api(upload, **query), served.ask(f"/?{urlencode(query)}", upload)
    assert reason in answer["error"] and "\n" not in answer["error"]
    assert answer["status"] == page.status == (404 if "image" in query else 400)
    assert 'role="alert"' in page.text


def test_nothing_to_search_for_and_a_mistake_of_ours(
    served: Page, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "the query is empty" in served.api(q=" \n ")["error"]
    page = served.ask("/?q=+++").text
    assert "Type a sentence and press Enter" in page and page.count('<a href="?q=') == 3
    monkeypatch.setattr(ImageIndex, "search", lambda *_: 1 / 0)
    answer = served.api(q="a")
    assert (answer["status"], "internal error" in answer["error"]) == (500, True)
    assert capfd.readouterr().err == "clip-lightning app: ZeroDivisionError: division by zero\n"


@pytest.mark.parametrize("prefix", ["/", "/static/", "/image/", "/thumbnail/", "/photos/static/", "/run/"])
def test_no_file_is_served(served: Page, prefix: str) -> None:
    around = ["secret.txt", "config.yaml", "predictions.html", "model/config.json", "../../photos/0.png"]
    files = [Path("/etc/passwd"), Path("pyproject.toml"), *(served.run / name for name in around)]
    up = ["../" * 12, "..%2f" * 12, "%2e%2e/" * 12, "..%252f" * 12, "....//" * 12, "..\\" * 12]
    asked = [dots + str(file.resolve()).lstrip("/") for file in files for dots in ["/", *up]]
    asked += ["config.yaml", "predictions.html", "../page.py", "%00", "a" * 5000, "http://127.0.0.1:1/"]
    for path in asked:
        assert served.ask(prefix + path.replace(" ", "%20")).status == 404, path


def test_images_are_encoded_again_and_only_once_they_were_found(served: Page) -> None:
    with serving(served.index) as page:
        id = served.api(q="a")["results"][0]["id"]
        paths = [f"/image/{id}", f"/thumbnail/{id}"]
        assert [page.ask(path).status for path in paths] == [404, 404]
        assert page.api(q="a")["results"][0]["id"] == id
        for answer in map(page.ask, paths):
            assert (answer.status, answer.headers["Content-Type"]) == (200, "image/jpeg")
            assert SECRET not in answer.text
        assert page.ask("/", Host="[").status == 200, "any name will do"


def test_uploads_are_bounded_and_never_stored(served: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_lightning.search import page

    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # a temporary file would fail there
    padded = served.image(1) + bytes(20_000_000 - len(served.image(1)))
    assert served.api(padded, k=1)["results"][0]["path"] == str(served.photos / "1.png")
    answer = served.api(padded + bytes(10_000_000))
    assert (answer["status"], "larger than 20 MB" in answer["error"]) == (413, True)
    monkeypatch.setattr(page, "UPLOAD_SECONDS", 0.2)
    assert served.ask("/api", b"cut", Content_Length="1000").status == 408
    inside: list[int] = []
    most: list[int] = []

    async def read(request: Any) -> bytes:
        inside.append(1)
        most.append(len(inside))
        await asyncio.sleep(0.05)
        inside.pop()
        return served.image(1)

    monkeypatch.setattr(page, "_read_body", read)
    with ThreadPoolExecutor(30) as threads:
        assert {each["status"] for each in threads.map(lambda _: served.api(b"it"), range(30))} == {200}
    assert 1 < max(most) <= page.MOST_UPLOADS


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),  # another port of this machine
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),  # a website whose name resolves to this machine
        ({"Host": "["}, 403),
        ({"Host": "[::1]:7860"}, 200),
        ({"Host": NAME, "Origin": f"https://{NAME}"}, 200),
    ],
)
def test_other_websites_cannot_use_it(served: Page, headers: dict[str, str], status: int) -> None:
    for path, upload in (("/api?q=a", None), ("/static/page.js", None), ("/", b""), ("/api", b"")):
        assert (served.ask(path, upload, **headers).status == 403) == (status == 403)
    link = served.ask("/?q=a", Sec_Fetch_Mode="navigate", **headers)
    assert link.status == (status if "Host" in headers else 200), "a link elsewhere opens the page"


@pytest.mark.parametrize("keeps_path", [False, True])
@pytest.mark.parametrize("keeps_host", [False, True])
def test_the_page_works_behind_a_proxy_with_a_path(served: Page, keeps_path: bool, keeps_host: bool) -> None:
    browser = {"Sec_Fetch_Site": "same-origin", "Origin": f"https://{NAME}"}
    browser |= {"Host": NAME} if keeps_host else {}

    def through_proxy(path: str, body: bytes | None = None) -> Answer:
        return served.ask(path if keeps_path else path.removeprefix("/photos"), body, **browser)

    links = {*re.findall(r'(?:src|href)="([^"#]+)"', through_proxy("/photos/?q=a+star").text)} - {"data:,"}
    statuses = {link: through_proxy(urljoin("/photos/", link)).status for link in links}
    found = json.loads(through_proxy("/photos/api", served.image(3)).text)["results"]
    assert {"static/page.js", "static/page.css"} < statuses.keys()
    assert sum(link.startswith("thumbnail/") for link in statuses) == 12
    assert set(statuses.values()) == {200}, statuses
    assert found[0]["path"] == str(served.photos / "3.png")
    answer = served.ask("/photos", Host=NAME)
    assert (answer.status, answer.headers["Location"]) == (307, "/photos/")


def test_text_of_the_data_is_text_and_no_other_host_is_named(served: Page) -> None:
    page = served.ask(f"/?{urlencode({'q': HOSTILE})}")
    assert page.text.count("<img ") == 1 + 2 * 12
    assert page.text.count("&lt;img src=x onerror=&#34;") == 3 + 4  # the query, the caption
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    for text in (page.text, served.ask("/static/page.css").text, served.ask("/static/page.js").text):
        assert not re.findall(r"""(?:src=|href=|url\(|@import)\s*["']?(?:https?:)?//""", text)
    assert "test_vit × bert" in " ".join(page.text.split()) and served.run.name not in page.text


def test_an_image_that_is_gone_is_said_to_be(make_clip: MakeClip, tmp_path: Path) -> None:
    draw(0, 1, 32).save(tmp_path / "1.png")
    index = ImageIndex.build(make_clip(), tmp_path, tmp_path / "index", Options(onnx=False))
    (tmp_path / "1.png").unlink()
    with serving(index) as page:
        assert "file not found" in page.ask("/?q=a").text
        id = page.api(q="a")["results"][0]["id"]
        assert all("No such file" in page.ask(path).text for path in (f"/image/{id}", f"/?image={id}"))


def test_by_which_names_the_page_may_be_asked() -> None:
    own = {"localhost", "127.0.0.1", "::1"}
    assert _names("localhost", "127.1.2.3", "Photos.example.com, b") == own | {NAME, "b"}
    assert [_names("a", address, "") for address in ("0.0.0.0", "::", "192.168.1.2")] == [None] * 3


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_from_a_folder_to_a_page_until_it_is_stopped(served: Page, tmp_path: Path, stop: int) -> None:
    """The whole command: indexes, serves, and ends although an upload is under way."""
    log, cache = tmp_path / "log", served.photos.parent / "cache"
    program = [sys.executable, "-m", "clip_lightning", "app", str(served.run / "model"), str(served.photos)]
    with log.open("w") as file:
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        process = subprocess.Popen([*program, "--host", "0.0.0.0"], stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"12 images at (http://\S+) \(press Ctrl-C", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        assert Page(found[1]).ask("/", Host="example.com").status == 200
        connection = http.client.HTTPConnection(urlsplit(found[1]).netloc, timeout=30)
        connection.request("POST", "/api", b"half", {"Content-Length": "100"})
        process.send_signal(stop)
        assert process.wait(timeout=30) == 128 + stop
        connection.close()
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "Traceback" not in text and text.count("without a login") == 1
    assert f"is stored in {cache}/clip-lightning/indexes/photos-" in text and "12 images (" in text


PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "color_scheme": "dark"}


@pytest.fixture
def page(served: Page, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page as Chromium opens it; in the end nothing must have gone wrong, such as a refused style."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    wrong: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(**getattr(request, "param", {}))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda it: wrong.append(it.text) if it.type == "error" else None)
        page.goto(served.url)
        yield page
        assert page.evaluate("window.hit") is None, "text of the data was run"
        browser.close()
    # mistakes have their status, as they should
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def scores(page: Any) -> list[str]:
    page.locator("#grid > li").first.wait_for()
    return list(page.locator("#grid > li > p > b").all_inner_texts())


@pytest.mark.browser
def test_from_a_sentence_by_keyboard_to_similar_images(page: Any, served: Page) -> None:
    page.keyboard.type("a red circle")
    page.keyboard.press("Enter")
    found = served.index.search("a red circle", 12)[0]
    assert scores(page) == [f"{hit.score:.3f}" for hit in found]
    for name in ("file", "k", "Search", ""):
        page.keyboard.press("Tab")
        focus = page.evaluate_handle("document.activeElement")
        assert focus.evaluate("it => it.id || it.innerText") == name
        seen = "it => getComputedStyle(it.id == 'file' ? it.parentElement : it).outlineStyle"
        assert focus.evaluate(seen) == "solid"
    page.keyboard.press("Enter")
    large = page.locator(":popover-open")
    assert large.locator("li").all_inner_texts() == list(found[0].captions)
    assert str(found[0].path) in large.inner_text()
    width = "image => image.decode().then(() => image.naturalWidth)"
    assert large.locator("img").evaluate(width) == 48
    page.keyboard.press("Escape")
    assert large.count() == 0
    page.locator("#grid > li > button").first.click()
    large.get_by_role("link", name="Find similar").click()
    page.get_by_text("most similar to this image").wait_for()
    assert scores(page)[0] == "1.000"
    assert page.locator("#preview").evaluate(width) == 48
    page.get_by_label("Labels").fill("a star, a heart")
    page.locator("#bars li").nth(1).wait_for()
    page.go_back()
    page.get_by_text("most similar to “a red circle”").wait_for()


@pytest.mark.browser
def test_images_chosen_dropped_and_pasted_replace_sentences(page: Any, served: Page, tmp_path: Path) -> None:
    page.get_by_role("searchbox").fill("a star")
    page.locator("#file").set_input_files(served.photos / "4.png")
    page.get_by_text("most similar to this image").wait_for()
    assert scores(page)[0] == "1.000"
    assert page.get_by_role("searchbox").input_value() == ""
    events = ("DragEvent('drop', {dataTransfer", "ClipboardEvent('paste', {clipboardData")
    for number, event in enumerate(events, 5):
        page.evaluate(
            "content => { const data = new DataTransfer();"
            "data.items.add(new File([new Uint8Array(content)], 'a.png', {type: 'image/png'}));"
            f"document.dispatchEvent(new {event}: data}})); }}",
            list(served.image(number)),
        )
        page.locator(f"#grid > li:first-child > button > img[alt='image {number}']").wait_for()
    page.get_by_label("Labels").press_sequentially("a star, <b>a circle</b>, a heart")
    page.locator("#bars li").get_by_text("a heart").wait_for()
    values = [float(text.rstrip(" %")) for text in page.locator("#bars b").all_inner_texts()]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(100, abs=0.2)
    assert page.get_by_text("Softmax: ").is_visible()
    assert "<b>a circle</b>" in page.locator("#bars").inner_text()
    for size, reason in ((30_000_000, "larger than 20 MB"), (10, "cannot be read: not a")):
        (tmp_path / "image.png").write_bytes(bytes(size))
        page.locator("#file").set_input_files(tmp_path / "image.png")
        page.get_by_role("alert").get_by_text(reason).wait_for()
    page.get_by_label("Results").fill("3")
    page.get_by_role("searchbox").fill("a star")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("3 of 12 images, the most similar to “a star”").wait_for()
    assert page.locator("#given").is_hidden()


@pytest.mark.browser
@pytest.mark.parametrize("page", [PHONE], indirect=True)
def test_a_phone_shows_results_above_the_fold(page: Any, served: Page) -> None:
    page.get_by_role("searchbox").fill("a red circle")
    page.get_by_role("button", name="Search").click()
    scores(page)
    assert page.locator("#grid > li").nth(2).bounding_box()["y"] + 150 < 844
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    page.locator("#file").set_input_files(served.photos / "5.png")
    page.get_by_text("most similar to this image").wait_for()
    assert page.locator("#grid > li").first.bounding_box()["y"] < 600
    assert page.evaluate("document.documentElement.scrollWidth") == 390
