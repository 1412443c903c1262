from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from clip_lightning.data.formats import read_captions
from clip_lightning.data.scenes import COLOURS, SIZES, describe, draw, scene, split, write_scenes
from clip_lightning.errors import UserError


def test_no_two_scenes_show_the_same() -> None:
    shown = [scene(3, index) for index in range(5000)]
    assert len(set(shown)) == len(shown)


def test_a_scene_does_not_depend_on_the_others() -> None:
    assert [scene(0, index) for index in (7, 3)] == [scene(0, index) for index in range(8)][7:2:-4]
    assert scene(0, 7) != scene(1, 7)
    assert draw(0, 7, 32).tobytes() == draw(0, 7, 32).tobytes()


def test_shares_of_the_splits() -> None:
    for start in (0, 3, 240):
        ten = [split(index) for index in range(start, start + 10)]
        assert [ten.count(name) for name in ("train", "val", "test")] == [8, 1, 1]


def test_captions_say_what_is_shown_whichever_object_comes_first() -> None:
    towards = {"left": ("left", "right"), "above": ("above", "below")}
    synonyms = {"over": "above", "higher": "above", "under": "below", "further": "below"}
    for index in range(300):
        shown = scene(0, index)
        captions = describe(0, index)
        assert len(set(captions)) == 5
        for caption in captions:
            words = caption.replace(",", "").split()
            directions = {synonyms.get(word, word) for word in words} & {"left", "right", "above", "below"}
            first_named_first = caption.index(f"{shown.first.colour} {shown.first.shape}") < caption.index(
                f"{shown.second.colour} {shown.second.shape}"
            )
            # "B with A on its left" names A last, and "A and on its right B" says where B is.
            where_the_last_is = "with" in words or "and" in words
            told = towards[shown.relation][first_named_first == where_the_last_is]
            assert directions == {told}, caption
            assert f"{shown.background} background" in caption


def test_the_picture_shows_the_objects_where_the_caption_says() -> None:
    for index in range(20):
        shown = scene(0, index)
        picture = draw(0, index, 64)
        points: dict[str, list[tuple[int, int]]] = {}
        for x in range(64):
            for y in range(64):
                points.setdefault(str(picture.getpixel((x, y))), []).append((x, y))
        axis = 0 if shown.relation == "left" else 1
        first, second = (
            [point[axis] for point in points[str(COLOURS[thing.colour])]]
            for thing in (shown.first, shown.second)
        )
        assert max(first) < min(second)
        if shown.first.size != shown.second.size:
            larger = first if SIZES[shown.first.size] > SIZES[shown.second.size] else second
            assert len(larger) == max(len(first), len(second))
        assert picture.getpixel((0, 0)) == COLOURS[shown.background]


def test_written_scenes_can_be_read(tmp_path: Path) -> None:
    write_scenes(tmp_path / "deep" / "scenes", 20, 32, 0)
    captions = read_captions(tmp_path / "deep" / "scenes")
    assert [image.split for image in captions.images] == [split(index) for index in range(20)]
    assert [image.captions for image in captions.images] == [describe(0, index) for index in range(20)]
    assert captions.left_out == {}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scenes"]
    with Image.open(captions.images[3].path) as picture:
        assert picture.size == (32, 32)


def test_several_writers_at_once_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    (folder).mkdir()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_scenes(folder, 10, 16, 0), range(4)))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_scenes(folder, 10, 16, 0)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(before) == 11
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", 10, 16, 0)
    for count, size, seed in ((11, 16, 0), (10, 20, 0), (10, 16, 1)):
        with pytest.raises(UserError, match="something other than these scenes"):
            write_scenes(tmp_path / "scenes", count, size, seed)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="something other than these scenes"):
            write_scenes(folder, 10, 16, 0)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("count", "size"), [(0, 32), (10**6, 32), (10, 8)])
def test_impossible_scenes(count: int, size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scenes"):
        write_scenes(tmp_path / "scenes", count, size, 0)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_lightning.data.scenes.draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 10, 16, 0)
    assert list(tmp_path.iterdir()) == []
