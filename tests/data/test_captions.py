import shutil
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lightning.data.captions import (
    SPLITS,
    CaptionedImage,
    CaptionSet,
    Splits,
    content_groups,
    split_by_image,
)
from clip_lightning.errors import UserError


def caption_set(root: Path, contents: list[bytes], splits: Sequence[str | None] | None = None) -> CaptionSet:
    """Pictures whose bytes are `contents`; nothing here decodes them."""
    images = []
    for index, content in enumerate(contents):
        path = root / f"{index}.jpg"
        path.write_bytes(content)
        images.append(CaptionedImage(path, (f"caption {index}",), splits[index] if splits else None))
    return CaptionSet(root, tuple(images), has_official_splits=splits is not None)


@settings(max_examples=50, deadline=None)
@given(
    contents=st.lists(st.sampled_from([b"a", b"b", b"c", b"dd", b"ee", b"f"]), min_size=12, max_size=40),
    seed=st.integers(0, 5),
    val_fraction=st.floats(0, 0.3),
    test_fraction=st.floats(0, 0.3),
)
def test_copies_of_an_image_are_in_one_split(
    contents: list[bytes], seed: int, val_fraction: float, test_fraction: float
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        captions = caption_set(Path(folder), contents)
        try:
            parts = split_by_image(captions, Splits(val_fraction, test_fraction, seed))
        except UserError:  # few different pictures, all of them held out
            return
        assert set(parts) == set(SPLITS)
        paths = [image.path for part in parts.values() for image in part]
        assert sorted(paths) == sorted(image.path for image in captions.images)
        held = [{image.path.read_bytes() for image in part} for part in parts.values()]
        assert all(one.isdisjoint(other) for one, other in combinations(held, 2))
        assert parts["train"]


@settings(max_examples=30, deadline=None)
@given(splits=st.lists(st.sampled_from(["train", "val", "test", None]), min_size=1, max_size=20))
def test_official_splits_are_kept(splits: list[str | None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        captions = caption_set(Path(folder), [bytes([index]) for index in range(len(splits))], splits)
        parts = split_by_image(captions, Splits(0.0, 0.0))
    for name in SPLITS:
        assert [image.split for image in parts[name]] == [name] * splits.count(name)


def test_a_missing_val_split_is_drawn_from_train(tmp_path: Path) -> None:
    contents = [bytes([i]) for i in range(20)]
    for splits, sizes in ((["train"] * 15 + ["test"] * 5, [12, 3, 5]), (["test"] * 20, [0, 0, 20])):
        parts = split_by_image(caption_set(tmp_path, contents, splits), Splits(0.2, 0.5))
        assert [len(parts[name]) for name in SPLITS] == sizes


def test_splits_and_digest_do_not_depend_on_order_or_folder(tmp_path: Path) -> None:
    contents = [bytes([index]) for index in range(30)]
    (tmp_path / "one" / "tables").mkdir(parents=True)
    one = caption_set(tmp_path / "one", contents)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = [CaptionedImage(tmp_path / "two" / i.path.name, i.captions) for i in reversed(one.images)]
    two = CaptionSet(tmp_path / "two", tuple(moved))
    assert one.digest() == two.digest()
    outside = [CaptionSet(each.root / "tables", each.images).digest() for each in (one, two)]
    assert outside[0] == outside[1] != one.digest()
    first, second = (split_by_image(c, Splits(0.2, 0.2, seed=1)) for c in (one, two))
    for name in SPLITS:
        assert {image.path.name for image in first[name]} == {image.path.name for image in second[name]}


def test_every_change_changes_the_digest(tmp_path: Path) -> None:
    captions = caption_set(tmp_path, [b"a", b"b"])
    image = captions.images[0]
    digests = {captions.digest()}
    for changed in (
        CaptionedImage(image.path, ("another",)),
        CaptionedImage(image.path, (*image.captions, "another")),
        CaptionedImage(image.path, image.captions, "val"),
    ):
        digests.add(CaptionSet(tmp_path, (changed, captions.images[1])).digest())
    image.path.write_bytes(b"longer")
    digests.add(captions.digest())
    assert len(digests) == 5


def test_content_groups_point_to_the_first_copy(tmp_path: Path) -> None:
    images = caption_set(tmp_path, [b"x", b"y", b"x", b"zz", b"y", b"x"]).images
    assert content_groups(images) == [0, 1, 0, 3, 1, 0]
