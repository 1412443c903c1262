"""What `index` and `search` print, and what they refuse in one line."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_lightning.__main__ import main

Run = Callable[..., dict]


@pytest.fixture(scope="module")
def index(bundle: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "an index é"
    words = ["--onnx", "false"]  # to write it takes seconds
    assert main(["index", str(bundle), str(scenes), "--out", str(out), *words]) == 0
    return out


def test_each_prints_json(index: Path, bundle: Path, scenes: Path, printed: Run) -> None:
    done = printed("index", bundle, scenes, "--out", index, "--onnx", "false")
    assert (done["images"], done["captions"], done["unchanged"], done["embedded"]) == (40, 0, 40, 0)
    assert done["out"] == str(index)
    found = printed("search", index, "a red circle", "--k", 3)
    assert found == printed("search", index, "--k=3", "--query", "a red circle")
    assert found["type"] == "flat"
    [query] = found["queries"]
    assert query["query"] == "a red circle" and len(query["results"]) == 3
    for result in query["results"]:
        assert Path(result["path"]).parent == scenes and not result["missing"]
        assert -1 <= result["score"] <= 1 and len(result["captions"]) == 5


def test_people_read_a_line_per_image_and_what_was_left_out(
    index: Path, bundle: Path, scenes: Path, ran: Any, tmp_path: Path
) -> None:
    lines = ran("search", index, "a red circle", "--k", 2).out.splitlines()
    assert len(lines) == 2
    assert str(scenes) in lines[0]
    (few := tmp_path / "few").mkdir()
    (few / "text.jpg").write_text("not an image")
    (few / "gone.png").symlink_to("nowhere")
    Image.new("RGB", (9, 9)).save(few / "a.png")
    said = ran("index", bundle, few, "--out", tmp_path / "b", "--onnx", "false")
    assert said.out.startswith("1 images (1 added, 1 broken, 1 unreadable) in ")
    assert "text.jpg: not an image of a known format\n" in said.err
    assert "gone.png: No such file or directory; the next run retries it\n" in said.err


def test_by_image_and_by_file(index: Path, scenes: Path, tmp_path: Path, printed: Run) -> None:
    image = next(path for path in sorted(scenes.iterdir()) if path.suffix != ".csv")
    [query] = printed("search", index, "--image", image)["queries"]
    assert query["results"][0]["path"] == str(image)
    (tmp_path / "queries").write_text("a star\n\n  a: {red} circle 🐶\n", encoding="utf-8")
    found = printed("search", index, "--file", tmp_path / "queries", "--k", 100)
    assert [query["query"] for query in found["queries"]] == ["a star", "a: {red} circle 🐶"]
    assert [len(query["results"]) for query in found["queries"]] == [40, 40]


def test_the_grid_shows_images(index: Path, scenes: Path, tmp_path: Path, ran: Any) -> None:
    grid = tmp_path / "new" / "grid.png"
    said = ran("search", index, "a red circle " * 30, "--grid", grid, "--k", 4).out
    assert len(said.splitlines()) == 4
    with Image.open(grid) as drawn:
        drawn.load()
        assert (drawn.width, drawn.mode) == (2 * 48 + 3 * 260 - 20, "RGB")
        assert len(drawn.getcolors(1 << 20) or []) > 20
    image = next(path for path in sorted(scenes.iterdir()) if path.suffix != ".csv")
    assert main(["search", str(index), "--image", str(image), "--grid", str(grid)]) == 0


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from clip_lightning.__main__ import main; "
        "print([main([name, '--help']) for name in ('index', 'embed', 'search', 'app', 'classify')]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[0, 0, 0, 0, 0]\nFalse\n")
    assert all(text in done.stdout for text in ("ivfpq", "--shard_size", "scores are cosine"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("search", "missing: index"),
        ("search INDEX a --image MODEL", "got 2"),
        ("search INDEX a dog", "dog"),
        ("search INDEX EMPTY", "empty"),
        ("search INDEX caf\udce9", r"the argument 'caf\udce9' is not UTF-8 text"),
        ("search INDEX --image nothing.png", "nothing.png cannot be read: No such file"),
        ("search INDEX a --gird x.png", "did you mean --grid"),
        (f"search {'long' * 70} a", "File name too long"),
        ("index MODEL SCENES", "missing: out"),
        ("index MODEL SCENES --out new --type best", "auto or flat or ivfpq"),
        ("embed MODEL SCENES --out SCENES/captions.csv/new", "cannot be written"),
        ("embed MODEL BARE --out new --what captions", "has no readable captions"),
        ("app MODEL", "is a model; also give a folder: clip-lightning app "),
        ("app INDEX --out x", "--out is only for"),
        ("app MODEL SCENES --model x", "--model only for"),
        ("app INDEX --port PORT", " is in use"),
        ("app INDEX --host 192.0.2.1", "--host 192.0.2.1: expected an address of this machine"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    words: str,
    expected: str,
    index: Path,
    bundle: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "bare" / "a.png")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        places = {"INDEX": index, "MODEL": bundle, "SCENES": scenes, "PORT": busy.getsockname()[1]}
        places |= {"EMPTY": "", "BARE": "bare"}
        pattern = "|".join(places)
        given = [re.sub(pattern, lambda found: str(places[found[0]]), word) for word in words.split()]
        assert expected in refused(*given)
    assert not (tmp_path / "new").exists()
