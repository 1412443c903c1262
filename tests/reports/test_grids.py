"""The grids take any text and any picture, and show which one is right."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from clip_lightning.evaluation.predictions import FoundCaption, PictureRow, Prediction, PredictionRow
from clip_lightning.reports.grids import draw_captions, draw_predictions

GREEN = (22, 163, 74)
STRANGE = ["", "<b> & 🐶👩‍👩‍👧 日本語 \0 \ud83d", "كلب على الشاطئ", "word " * 10_000, "x" * 10_000]


def draw_pictures(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        Image.new("RGB", (60, 40), (200, 12 * n, 40)).save(path)
    return paths


def strange_rows(folder: Path) -> list[PredictionRow]:
    pictures = draw_pictures(folder, 2)
    found = (Prediction(pictures[1], 0.5, False), Prediction(folder / "gone.png", 0.25, False))
    return [PredictionRow(n, text, pictures[0], 30, 40, found) for n, text in enumerate(STRANGE)]


def test_drawing_takes_any_text_and_a_lost_picture(tmp_path: Path) -> None:
    rows = strange_rows(tmp_path)
    draw_predictions(rows, tmp_path / "new" / "a.png", "t" * 500)
    draw_predictions([], tmp_path / "none.png", "nothing")
    with Image.open(tmp_path / "new" / "a.png") as grid:
        grid.load()
        assert grid.height < 5 * 400  # long texts end in …
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]  # no temporary file left


def test_the_frame_is_green_where_the_picture_is_right(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path, 4)

    def greens(right: bool) -> int:
        predictions = tuple(Prediction(path, 0.5, right and n == 2) for n, path in enumerate(pictures))
        draw_predictions([PredictionRow(0, "", pictures[2], 9, 9, predictions)], tmp_path / "a.png", "")
        return count_green(tmp_path / "a.png")

    assert greens(right=False) == 0
    assert greens(right=True) > 4 * 160 * 4


def count_green(path: Path) -> int:
    with Image.open(path) as grid:
        return dict((colour, count) for count, colour in grid.getcolors(1 << 20) or []).get(GREEN, 0)


def test_captions_take_any_text_and_a_lost_picture(tmp_path: Path) -> None:
    (picture,) = draw_pictures(tmp_path, 1)
    found = tuple(FoundCaption(text, 0.5, False) for text in STRANGE)
    rows = [
        PictureRow(0, picture, (STRANGE[1],), 30, 40, found),
        PictureRow(1, tmp_path / "gone.png", (), 1, 40, found[:1]),
    ]
    draw_captions(rows, tmp_path / "a.png", "t" * 500)
    draw_captions([], tmp_path / "none.png", "nothing")
    with Image.open(tmp_path / "a.png") as grid:
        grid.load()
        assert grid.height == 150 + (6 * 32 + 40) + (160 + 40) + 24  # one line each, the wanted one too


def test_right_captions_are_green(tmp_path: Path) -> None:
    (picture,) = draw_pictures(tmp_path, 1)

    def greens(right: bool) -> int:
        found = (FoundCaption("a dog runs", 0.5, right), FoundCaption("a cat", 0.25, False))
        draw_captions([PictureRow(0, picture, ("a dog runs",), 9, 9, found)], tmp_path / "a.png", "")
        return count_green(tmp_path / "a.png")

    assert greens(right=False) == 0
    assert greens(right=True) > 100
