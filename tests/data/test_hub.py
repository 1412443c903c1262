"""Hugging Face data sets become folders of the same pictures, captions and splits."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_lightning.data import materialise
from clip_lightning.data.columns import ReadOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.hub import HubDataset
from clip_lightning.errors import UserError

datasets = pytest.importorskip("datasets")

Captions = dict[bytes, tuple[tuple[str, ...], str | None]]


def picture(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (9, 8), 40 * number).save(data, kind)
    return data.getvalue()


A, B, C = picture(1), picture(2, "PNG", "LA"), picture(3, "JPEG", "CMYK")
KINDS = {".jpg": A, ".png": B, ".webp": picture(4, "WEBP"), ".tif": picture(5, "TIFF", "I;16")}


def read(folder: Path) -> Captions:
    """Bytes of each picture → its captions and split."""
    return {image.path.read_bytes(): (image.captions, image.split) for image in read_captions(folder).images}


def table(pictures: list[Any], column: str = "image", **columns: list[Any]) -> Any:
    data = datasets.Dataset.from_dict({column: pictures, **columns})
    return data.cast_column(column, datasets.Image(decode=False))


def cells(*pictures: bytes) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": "../../../escaped.jpg"} for data in pictures]


def named(name: str, image: str | None = None, captions: str | None = None) -> HubDataset:
    return replace(HubDataset.parse(f"hf:{name}"), read=ReadOptions(image, captions))


def fetch_hub(name: str, image: str | None = None, captions: str | None = None) -> Path:
    source = named(name, image, captions)
    source.fetch()
    return source.folder()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "hf" / "downloads")
    datasets.disable_progress_bars()
    return tmp_path / "cache" / "clip-lightning" / "data"


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Writes a data set, or splits by name, and gives its folder."""

    def write(data: Any = None, /, **splits: Any) -> str:
        (data or datasets.DatasetDict(splits)).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return write


# What is read -------------------------------------------------------------------------------------------


def test_lists_of_captions_in_official_splits(save: Callable[..., str], cache: Path):
    name = save(
        train=table(cells(A), caption=[["one", "two"]]),
        validation=table(cells(B), caption=[["three"]]),
        test=table(cells(C), caption=[["four", "five"]]),
    )
    before = named(name).folder()
    folder = fetch_hub(name)
    assert folder == before == named(name).folder()
    assert folder.parent == cache
    assert read(folder) == {
        A: (("one", "two"), "train"),
        B: (("three",), "val"),
        C: (("four", "five"), "test"),
    }
    assert {path.name for path in folder.iterdir()} == {"captions.jsonl", "images", "plan.json"}
    assert {path.name for path in cache.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_a_second_time_nothing_is_loaded(save: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    name = save(table(cells(A), caption=["one"]))
    folder = fetch_hub(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert fetch_hub(name) == named(name).folder() == folder


def test_a_split_column_goes_before_the_splits_of_the_hub(save: Callable[..., str]):
    data = table(cells(A, B, C), caption=["one", "two", "three"], split=["train", "val", None])
    assert read(fetch_hub(save(test=data))) == {
        A: (("one",), "train"),
        B: (("two",), "val"),
        C: (("three",), None),
    }


@pytest.mark.parametrize(("hub", "ours"), [("train", None), ("test", "test"), ("everything", None)])
def test_a_single_split(hub: str, ours: str | None, save: Callable[..., str]):
    folder = fetch_hub(save(**{hub: table(cells(A), caption=["one"])}))
    assert read(folder) == {A: (("one",), ours)}
    assert read_captions(folder).has_official_splits == (ours is not None)


def test_splits_that_are_none_of_ours_are_left_out(
    save: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    parts = {"train": A, "test": B, "unlabelled": C}
    name = save(**{split: table(cells(data), caption=["one"]) for split, data in parts.items()})
    assert read(fetch_hub(name)) == {A: (("one",), "train"), B: (("one",), "test")}
    said = capsys.readouterr()
    assert "left out the splits unlabelled" in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "columns",
    [
        {"caption_1": ["two"], "caption_0": ["one"]},
        {"TEXT": [["two", "one"]], "url": ["x"]},
        {"sentences": [[{"raw": "two", "tokens": ["two"]}, {"raw": "one", "tokens": ["one"]}]]},
        {"caption": [["two", None, "", "one"]], "text": ["no"], "id": [7]},
    ],
)
def test_usual_columns_of_captions(columns: dict[str, list[Any]], save: Callable[..., str]):
    assert read(fetch_hub(save(table(cells(A), **columns)))) == {A: (("two", "one"), None)}


def test_columns_that_are_given(save: Callable[..., str]):
    data = table(cells(A), "photo", other=cells(B), caption=["no"], long=["one"], short=[["two"]])
    name = save(data.cast_column("other", datasets.Image(decode=False)))
    assert read(fetch_hub(name, "other", "long,short")) == {B: (("one", "two"), None)}
    # of several columns with pictures, the one with a usual name
    assert read(fetch_hub(name)) == {A: (("no",), None)}
    assert named(name).folder() != named(name, "other").folder() != named(name, None, "long").folder()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image": "nothing"},
            r"--data\.read\.image_column nothing is not in .*left \(Image\), .*n \(int64\)",
        ),
        (
            {"image": "left", "captions": "n"},
            r"--data\.read\.caption_column n is not in .*give --data\.read\.caption_column COLUMN",
        ),
        (
            {"image": "left", "captions": "words,nothing"},
            r"--data\.read\.caption_column words,nothing is not",
        ),
        ({"image": "left"}, "has no caption column"),
        ({}, "has no image column"),
    ],
)
def test_columns_that_are_not_there(options: dict[str, str], message: str, save: Callable[..., str]):
    data = table(cells(A), "left", right=cells(B), n=[1], words=["one"])
    name = save(data.cast_column("right", datasets.Image(decode=False)).cast_column("left", datasets.Image()))
    with pytest.raises(UserError, match=message) as raised:
        fetch_hub(name, **options)
    assert "\n" not in str(raised.value)
    assert not named(name, **options).folder().exists()


def test_bytes_without_the_type_image(tmp_path: Path):
    path = tmp_path / "any.parquet"
    datasets.Dataset.from_dict({"jpg": [A, B], "txt": ["one", "two"]}).to_parquet(path)
    assert read(fetch_hub(str(path))) == {A: (("one",), None), B: (("two",), None)}


def test_a_folder_of_parquet_files(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, data in {"train": A, "test": B}.items():
        table(cells(data), caption=[split]).cast_column("image", datasets.Image()).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    assert read(fetch_hub(str(folder))) == {A: (("train",), "train"), B: (("test",), "test")}


def test_a_folder_of_pictures_and_metadata(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(A)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one"}\n')
    assert read(fetch_hub(str(folder))) == {A: (("one",), None)}


# What is written ----------------------------------------------------------------------------------------


def test_pictures_are_kept_byte_for_byte_under_safe_names(save: Callable[..., str]):
    folder = fetch_hub(save(table(cells(*KINDS.values()), caption=list(KINDS))))
    written = {path.suffix: path for path in (folder / "images").rglob("*.*")}
    assert {suffix: path.read_bytes() for suffix, path in written.items()} == KINDS
    assert {path.parent for path in written.values()} == {folder / "images" / "all"}


def test_rows_of_one_picture_are_its_captions(save: Callable[..., str]):
    name = save(
        train=table(cells(A, B, A), caption=["one", "two", "three"]), test=table(cells(A), caption=["four"])
    )
    images = read_captions(fetch_hub(name)).images
    assert [(image.path.read_bytes(), image.captions, image.split) for image in images] == [
        (A, ("one", "three"), "train"),
        (B, ("two",), "train"),
        (A, ("four",), "test"),  # the same picture in two splits is the data set's own affair
    ]


def test_rows_without_a_picture_or_caption_are_counted(
    hub: Callable[[Any], list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    gone = {"bytes": None, "path": str(tmp_path / "hf" / "gone.jpg")}
    postscript = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": None}
    pictures = [*cells(A), None, gone, *cells(b"<html>", b""), postscript, *cells(B)]
    hub(table(pictures, caption=[["one"], *[["x"]] * 5, []]))
    folder = fetch_hub("owner/name")
    captions = read_captions(folder)
    assert read(folder) == {A: (("one",), None)}
    assert sorted(captions.left_out)[1:] == [
        "train row 1 (it has no picture)",
        "train row 2 (No such file or directory)",
        "train row 3 (not a picture of a known format)",
        "train row 4 (not a picture of a known format)",
        "train row 5 (not a picture of a known format)",
    ]
    assert captions.left_out[sorted(captions.left_out)[0]] == "it has no caption"
    assert "5 of 7 rows have no readable picture, the first: train row 1" in capsys.readouterr().err


def test_no_row_is_usable(save: Callable[..., str]):
    name = save(table([None, None], caption=["one", "two"]))
    with pytest.raises(UserError, match=r"no readable picture in 2 rows, the first: train row 0 \(it has no"):
        fetch_hub(name)
    assert not named(name).folder().exists()


def test_an_unknown_word_in_the_split_column(save: Callable[..., str]):
    with pytest.raises(UserError, match=r"--data\.root hf:.*saved has a split called 'fold 1'; expected"):
        fetch_hub(save(table(cells(A), caption=["one"], split=["Fold 1"])))


def test_a_changed_local_data_set_is_another(tmp_path: Path):
    path = tmp_path / "any.parquet"
    datasets.Dataset.from_dict({"jpg": [A], "txt": ["one"]}).to_parquet(path)
    first = fetch_hub(str(path))
    datasets.Dataset.from_dict({"jpg": [A, B], "txt": ["one", "two"]}).to_parquet(path)
    assert fetch_hub(str(path)) != first
    assert len(read(named(str(path)).folder())) == 2


# The hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Answers `load_dataset` with a data set, and notes what was asked for."""

    def answer(data: Any) -> list[Any]:
        asked: list[Any] = []

        def load(*arguments: Any, **options: Any) -> Any:
            asked.append((*arguments, options))
            return data

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return answer


def test_subset_and_revision_are_part_of_the_name(hub: Callable[[Any], list[Any]]):
    asked = hub(table(cells(A), caption=["one"]))
    names = ["owner/name", "owner/name:sub", "owner/name@refs/convert/parquet", "owner/name:sub@v1.0", "name"]
    assert len({fetch_hub(name) for name in names}) == len(names)
    assert asked == [
        ("owner/name", None, {"revision": None}),
        ("owner/name", "sub", {"revision": None}),
        ("owner/name", None, {"revision": "refs/convert/parquet"}),
        ("owner/name", "sub", {"revision": "v1.0"}),
        ("name", None, {"revision": None}),
    ]


def test_a_data_set_from_the_hub_cannot_name_pictures_of_this_machine(
    hub: Callable[[Any], list[Any]], tmp_path: Path
):
    private, fetched = tmp_path / "private.jpg", tmp_path / "hf" / "downloads" / "fetched.png"
    fetched.parent.mkdir(parents=True)
    private.write_bytes(A)
    fetched.write_bytes(B)
    (fetched.parent / "link.jpg").symlink_to(private)
    paths = [private, fetched, fetched.parent / "link.jpg", fetched.parent / ".." / ".." / "private.jpg"]
    hub(table([{"bytes": None, "path": str(path)} for path in paths], caption=["x"] * 4))
    folder = fetch_hub("owner/name")
    assert read(folder) == {B: (("x",), None)}
    assert "train row 0 (its picture is not in the data set)" in read_captions(folder).left_out
    assert len(read_captions(folder).left_out) == 3


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/folder", "a/b/c", "owner/name:", "https://x.example/y", ""]
)
def test_names_that_are_none(name: str):
    with pytest.raises(UserError, match=r"--data\.root hf:.*expected OWNER/NAME"):
        named(name)


def test_no_network():
    with pytest.raises(
        UserError, match=r"--data\.root hf:owner/name cannot be loaded \(.*Offline.*HF_HUB_OFFLINE"
    ):
        fetch_hub("owner/name")


def test_code_of_a_data_set_is_not_run(tmp_path: Path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match=r"scripts are no longer supported.*@refs/convert/parquet"):
        fetch_hub(str(folder))


def test_without_the_package(save: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    name = save(table(cells(A), caption=["one"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'clip-lightning\[hub\]'"):
        fetch_hub(name)


# Kills --------------------------------------------------------------------------------------------------


def test_a_killed_process_s_work_is_not_mixed_with_other_data(
    hub: Callable[[Any], list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(materialise, "SHARD_ROWS", 1)
    for number, pictures in enumerate([[A, B], [C, B]]):
        table(cells(*pictures), caption=["one", "two"]).save_to_disk(tmp_path / str(number))

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    hub(datasets.load_from_disk(tmp_path / "0"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(materialise, "_join", stop)
        fetch_hub("owner/name")
    hub(datasets.load_from_disk(tmp_path / "1"))  # the hub's `main` has moved on
    folder = fetch_hub("owner/name")
    assert read(folder) == {C: (("one",), None), B: (("two",), None)}
    assert len(list((folder / "images").rglob("*.*"))) == 2
