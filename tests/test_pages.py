"""The grid and the page take any text and any picture, and show which one is right."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from clip_lightning.files import write_atomically
from clip_lightning.tracking.pages import draw_predictions, write_predictions_page
from clip_lightning.tracking.predictions import Prediction, PredictionRow

GREEN = (22, 163, 74)


def draw_pictures(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        Image.new("RGB", (60, 40), (200, 12 * n, 40)).save(path)
    return paths


def strange_rows(folder: Path) -> list[PredictionRow]:
    pictures = draw_pictures(folder, 2)
    texts = ["", "<script>alert(1)</script> & 🐶👩‍👩‍👧 日本語 \0 \ud83d", "word " * 10_000, "x" * 10_000]
    found = (Prediction(pictures[1], 0.5, False), Prediction(folder / "gone.png", 0.25, False))
    return [PredictionRow(n, text, pictures[0], 30, 40, found) for n, text in enumerate(texts)]


def test_drawing_takes_any_text_and_a_lost_picture(tmp_path: Path) -> None:
    rows = strange_rows(tmp_path)
    draw_predictions(rows, tmp_path / "new" / "a.png", "t" * 500)
    draw_predictions([], tmp_path / "none.png", "nothing")
    with Image.open(tmp_path / "new" / "a.png") as grid:
        grid.load()
        assert grid.height < 4 * 400  # long texts end in …
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]  # no temporary file left


def test_the_frame_is_green_where_the_picture_is_right(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path, 4)

    def greens(right: bool) -> int:
        predictions = tuple(Prediction(path, 0.5, right and n == 2) for n, path in enumerate(pictures))
        draw_predictions([PredictionRow(0, "", pictures[2], 9, 9, predictions)], tmp_path / "a.png", "")
        with Image.open(tmp_path / "a.png") as grid:
            return dict((colour, count) for count, colour in grid.getcolors(1 << 20) or []).get(GREEN, 0)

    assert greens(right=False) == 0
    assert greens(right=True) > 4 * 160 * 4


class Page(HTMLParser):
    """Tags and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_stands_alone_and_is_escaped(tmp_path: Path) -> None:
    rows = strange_rows(tmp_path)
    write_predictions_page(rows, {0: {1: 57}, 1: {1: 12, 9: 1}, 2: {1: 30}}, tmp_path / "p.html")
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & 🐶👩‍👩‍👧 日本語" in page.text
    assert "epoch 0: 57 → 1: 12 → 2: 30" in page.text
    assert page.tags.count("polyline") == 1
    assert len(page.sources) == 4 * 3
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)


def test_long_histories_are_thinned(tmp_path: Path) -> None:
    history = {epoch: {0: 100 - epoch} for epoch in range(100)}
    write_predictions_page(strange_rows(tmp_path)[:1], history, tmp_path / "p.html")
    text = Page((tmp_path / "p.html").read_text(encoding="utf-8")).text
    (moves,) = re.findall("epoch 0: 100.*", text)
    assert moves.count("→") == 7 and moves.rstrip().endswith("99: 1")


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "folder" / "a.json"
    write_atomically(file, b"old")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(OSError, match="No space"):
                write_atomically(file, b"new")
        assert file.read_bytes() == b"old"
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"
    assert list(file.parent.iterdir()) == [file]
