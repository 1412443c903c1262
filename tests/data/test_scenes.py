from pathlib import Path

from PIL import Image

from clip_lightning.data.formats import read_captions
from clip_lightning.data.scenes import COLOURS, SIZES, all_scenes, describe, draw, split, write_scenes


def test_scenes_are_different_and_independent() -> None:
    shown = all_scenes(3)
    assert len(set(shown)) == len(shown) > 5000 and shown[:9] != all_scenes(4)[:9]
    assert draw(0, 7, 32).tobytes() == draw(0, 7, 32).tobytes()
    for start in (0, 3, 240):
        ten = [split(index) for index in range(start, start + 10)]
        assert [ten.count(name) for name in ("train", "val", "test")] == [8, 1, 1]


def test_captions_describe_the_scene() -> None:
    towards = {"left": ("left", "right"), "above": ("above", "below")}
    synonyms = {"over": "above", "higher": "above", "under": "below", "further": "below"}
    for index in range(300):
        shown = all_scenes(0)[index]
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


def test_images_match_their_captions() -> None:
    for index in range(20):
        shown = all_scenes(0)[index]
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
    with Image.open(captions.images[3].path) as image:
        assert image.size == (32, 32)
