"""The words of `index` and `search`: what they print, and what they refuse in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from clip_lightning.__main__ import main
from clip_lightning.model.clip import CLIP


@pytest.fixture
def model(make_clip: Callable[..., CLIP], tmp_path: Path) -> Path:
    return make_clip().save_pretrained(tmp_path / "model")


@pytest.fixture
def index(model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = tmp_path / "an index é"
    words = ["--captions", "true", "--onnx", "false"]  # to write it takes seconds
    assert main(["index", str(model), str(scenes), "--out", str(out), *words]) == 0
    capsys.readouterr()
    return out


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, object]:
    assert main([str(word) for word in words]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_index_and_search_print_one_object(
    model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "idx"
    report = printed(capsys, "index", model, scenes, "--out", out, "--json")
    assert report["pictures"] == report["added"] == report["embedded"] == 40
    assert report["index"] == str(out)
    assert report["text_tower"] == "onnx"
    assert printed(capsys, "index", model, scenes, "--out", out, "--json", "--type", "hnsw")["embedded"] == 0
    found = printed(capsys, "search", out, "a red circle", "--k", 3, "--json")
    assert found == printed(capsys, "search", "--json", out, "--k=3", "--query", "a red circle")
    assert found["type"] == "hnsw"
    [query] = found["queries"]
    assert query["query"] == "a red circle"
    assert len(query["results"]) == 3
    for result in query["results"]:
        assert os.path.isabs(result["path"])
        assert os.path.exists(result["path"]) and not result["missing"]
        assert -1 <= result["score"] <= 1
        assert len(result["captions"]) == 5


def test_for_people(
    index: Path, model: Path, scenes: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["search", str(index), "a red circle", "--k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert str(scenes) in lines[0]
    (scenes_copy := tmp_path / "few").mkdir()
    (scenes_copy / "text.jpg").write_text("no picture")
    Image.new("RGB", (9, 9)).save(scenes_copy / "a.png")
    words = ["--out", str(tmp_path / "b"), "--onnx", "false"]
    assert main(["index", str(model), str(scenes_copy), *words]) == 0
    said = capsys.readouterr()
    assert "1 pictures (1 new, 1 left out), flat" in said.out
    assert "text.jpg: not a picture of a known format" in said.err


def test_by_picture_by_file_and_the_other_way(
    index: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next(path for path in sorted(scenes.iterdir()) if path.suffix != ".csv")
    [query] = printed(capsys, "search", index, "--image", picture, "--json")["queries"]
    assert query["results"][0]["path"] == str(picture)
    [query] = printed(capsys, "search", index, "--image", picture, "--captions", "true", "--json")["queries"]
    assert len(query["results"]) == 9
    assert all(result["caption"] and result["paths"] for result in query["results"])
    (tmp_path / "queries").write_text("a star\n\n  a: {red} circle 🐶\n", encoding="utf-8")
    found = printed(capsys, "search", index, "--file", tmp_path / "queries", "--k", 100, "--json")
    assert [query["query"] for query in found["queries"]] == ["a star", "a: {red} circle 🐶"]
    assert [len(query["results"]) for query in found["queries"]] == [40, 40]
    assert main(["search", str(index), "--image", str(picture), "--captions=true", "--k=2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_grid_shows_pictures(
    index: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "new" / "grid.png"
    assert main(["search", str(index), "a red circle " * 30, "--grid", str(grid), "--k", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    with Image.open(grid) as drawn:
        drawn.load()
        assert (drawn.width, drawn.mode) == (2 * 48 + 3 * 260 - 20, "RGB")
        assert len(drawn.getcolors(1 << 20) or []) > 20
    (tmp_path / "queries").write_text("a star\na cross", encoding="utf-8")
    picture = next(path for path in sorted(scenes.iterdir()) if path.suffix != ".csv")
    for words in (["--file", str(tmp_path / "queries")], ["--image", str(picture)]):
        assert main(["search", str(index), *words, "--grid", str(grid)]) == 0


@pytest.mark.parametrize("command", ["index", "search"])
def test_help_imports_no_torch(command: str) -> None:
    program = (
        "import sys; from clip_lightning.__main__ import main; "
        f"print(main([{command!r}, '--help']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert "cosines" in done.stdout if command == "search" else "hnsw" in done.stdout


def test_another_model(
    index: Path, make_clip: Callable[..., CLIP], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_clip(image="random:test_resnet").save_pretrained(tmp_path / "other")
    assert main(["search", str(index), "a star", "--model", str(other)]) == 2
    said = capsys.readouterr()
    assert "is not the model that the index was built with" in said.err
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search"], "missing: --index"),
        (["search", "INDEX"], "a sentence in quotes"),
        (["search", "INDEX", "a", "--image", "MODEL"], "got 2"),
        (["search", "INDEX", "a", "dog"], "dog"),
        (["search", "INDEX", ""], "empty"),
        (["search", "INDEX", "a", "--k", "0"], "expected 1 or more"),
        (["search", "INDEX", "a", "--k", "many"], "a whole number"),
        (["search", "INDEX", "--image", "nothing.png"], "no such file"),
        (["search", "INDEX", "--file", "nothing.txt"], "cannot be read"),
        (["search", "INDEX", "a", "--captions", "true"], "give --image"),
        (["search", "INDEX", "a", "--gird", "x.png"], "did you mean --grid"),
        (["search", "MODEL", "a"], "no finished index"),
        (["search", "nowhere", "a"], "no finished index"),
        (["index", "MODEL"], "missing"),
        (["index", "MODEL", "SCENES"], "--out"),
        (["index", "MODEL", "SCENES", "--out", "new", "--type", "best"], "auto or flat or hnsw or ivfpq"),
        (["index", "MODEL", "SCENES", "--out", "new", "--type", "ivfpq"], "use --type flat"),
        (["index", "MODEL", "SCENES", "--out", "new", "--batch_size", "0"], "expected 1 or more"),
        (["index", "MODEL", "SCENES", "--out", "new", "--num_workers", "0"], "expected 1 or more"),
        (["index", "SCENES", "SCENES", "--out", "new"], "no clip-lightning bundle"),
        (["index", "MODEL", "nowhere", "--out", "new"], "no folder or file"),
        (["index", "MODEL", "SCENES", "--out", "MODEL"], "something else"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    expected: str,
    index: Path,
    model: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"INDEX": str(index), "MODEL": str(model), "SCENES": str(scenes)}
    assert main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("clip-lightning: error: ") and said.err.count("\n") == 1, said.err
    assert expected in said.err
    assert not said.out
