"""Hugging Face data sets: folders of the same pictures, captions and splits, and images with classes."""

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from PIL import Image

from clip_lightning import CLIP
from clip_lightning.data.classes import find_classes
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import BrokenImage, to_pixels
from clip_lightning.data.readers import ReadOptions
from clip_lightning.data.sources import HubDataset
from clip_lightning.errors import UserError
from clip_lightning.model.encode import Encoded, encode_images

Patch = pytest.MonkeyPatch
datasets = pytest.importorskip("datasets")

Captions = dict[bytes, tuple[tuple[str, ...], str | None]]


def picture(number: int, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, (9, 8), 40 * number).save(data, kind)
    return data.getvalue()


A, B, C = picture(1), picture(2, "PNG", "LA"), picture(3, "JPEG", "CMYK")
PARTS = {"train": A, "validation": B, "test": C}
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
    options = ReadOptions(image_column=image, caption_column=captions)
    return replace(HubDataset.parse(f"hf:{name}"), read=options)


def fetch_hub(name: str, image: str | None = None, captions: str | None = None) -> Path:
    source = named(name, image, captions)
    source.fetch()
    return source.folder()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
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
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        (data or datasets.DatasetDict(splits)).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return write


# What is read -------------------------------------------------------------------------------------------


def test_lists_of_captions_in_official_splits(save: Callable[..., str], cache: Path, monkeypatch: Patch):
    images = {split: table(cells(data), caption=[[split, "two"]]) for split, data in PARTS.items()}
    name = save(**images)
    before = named(name).folder()
    folder = fetch_hub(name)
    assert folder == before == named(name).folder()
    assert read(folder) == {
        A: (("train", "two"), "train"),
        B: (("validation", "two"), "val"),
        C: (("test", "two"), "test"),
    }
    assert {path.name for path in folder.iterdir()} == {"captions.jsonl", "images"}
    assert {path.name for path in cache.iterdir()} == {folder.name, f".{folder.name}.lock"}
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert fetch_hub(name) == folder, "a second time nothing is loaded"
    with pytest.raises(UserError, match="pip install datasets"):
        fetch_hub(f"{name}/train")


@pytest.mark.parametrize(
    ("splits", "column", "expected"),
    [
        ({"test": [A, B, C]}, ["train", "val", None], {A: "train", B: "val", C: None}),
        ({"train": [A]}, None, {A: None}),
        ({"everything": [A]}, None, {A: None}),
        ({"test": [A]}, None, {A: "test"}),
        ({"train": [A], "test": [B], "unlabelled": [C]}, None, {A: "train", B: "test"}),
    ],
)
def test_splits_come_from_a_column_or_the_data_set(
    splits: dict[str, list[bytes]],
    column: list[Any] | None,
    expected: dict[bytes, str | None],
    save: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
):
    more = {} if column is None else {"split": column}
    parts = {name: table(cells(*data), caption=["x"] * len(data), **more) for name, data in splits.items()}
    folder = fetch_hub(save(**parts))
    assert read(folder) == {data: (("x",), split) for data, split in expected.items()}
    assert read_captions(folder).has_official_splits == any(expected.values())
    printed = capsys.readouterr()
    assert ("left out the splits unlabelled" in printed.err) == ("unlabelled" in splits)
    assert printed.out == ""


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
        ({"image": "nothing"}, "no image column nothing: found left, right, n, words, .*image_column"),
        ({"image": "left", "captions": "n"}, r"has values of the types dict, int, NoneType as image"),
        ({"image": "left", "captions": "words,nothing"}, "has no caption column words,nothing"),
        ({"image": "left"}, "has no caption column"),
        ({}, "has no image column"),
    ],
)
def test_missing_columns(options: dict[str, str], message: str, save: Callable[..., str]):
    data = table(cells(A), "left", right=cells(B), n=[1], words=["one"])
    name = save(data.cast_column("right", datasets.Image(decode=False)).cast_column("left", datasets.Image()))
    with pytest.raises(UserError, match=message) as raised:
        fetch_hub(name, **options)
    assert "\n" not in str(raised.value)
    assert not named(name, **options).folder().exists()


def test_other_local_files(tmp_path: Path):
    """A file, which counts as another once it has changed; Parquet files of splits; images with metadata."""
    path, parts, images = tmp_path / "any.parquet", tmp_path / "parts", tmp_path / "images"
    datasets.Dataset.from_dict({"jpg": [A], "txt": ["one"]}).to_parquet(path)
    first = fetch_hub(str(path))
    datasets.Dataset.from_dict({"jpg": [A, B], "txt": ["one", "two"]}).to_parquet(path)
    assert read(first) == {A: (("one",), None)}
    assert read(fetch_hub(str(path))) == {A: (("one",), None), B: (("two",), None)}
    parts.mkdir()
    for split, data in {"train": A, "test": B}.items():
        part = table(cells(data), caption=[split]).cast_column("image", datasets.Image())
        part.to_parquet(parts / f"{split}-00000-of-00001.parquet")
    assert read(fetch_hub(str(parts))) == {A: (("train",), "train"), B: (("test",), "test")}
    images.mkdir()
    (images / "a.jpg").write_bytes(A)
    (images / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "one"}\n')
    assert read(fetch_hub(str(images))) == {A: (("one",), None)}


# What is written ----------------------------------------------------------------------------------------


def test_images_are_stored_unchanged_and_rows_are_grouped(save: Callable[..., str]):
    name = save(table(cells(*KINDS.values()), caption=list(KINDS)))
    folder = fetch_hub(name)
    written = {path.suffix: path for path in (folder / "images").rglob("*.*")}
    assert {suffix: path.read_bytes() for suffix, path in written.items()} == KINDS
    assert {path.parent for path in written.values()} == {folder / "images" / "all"}
    train = table(cells(A, B, A), caption=["one", "two", "three"])
    name = save(train=train, test=table(cells(A), caption=["four"]))
    images = read_captions(fetch_hub(name)).images
    assert [(image.path.read_bytes(), image.captions, image.split) for image in images] == [
        (A, ("one", "three"), "train"),
        (B, ("two",), "train"),
        (A, ("four",), "test"),  # the same image in two splits is the data set's own affair
    ]


def test_rows_without_an_image_or_caption_are_counted(hub: Callable[[Any], Mock], tmp_path: Path):
    gone = {"bytes": None, "path": str(tmp_path / "hf" / "gone.jpg")}
    postscript = {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": None}
    pictures = [*cells(A), None, gone, *cells(b"<html>", b""), postscript, *cells(B)]
    hub(table(pictures, caption=[["one"], *[["x"]] * 5, []]))
    folder = fetch_hub("owner/name")
    captions = read_captions(folder)
    assert read(folder) == {A: (("one",), None)}
    assert sorted(captions.left_out)[1:] == [
        "train row 1 (it has no image)",
        "train row 2 (No such file or directory)",
        "train row 3 (not an image of a known format)",
        "train row 4 (the file is empty)",
        "train row 5 (not an image of a known format)",
    ]
    assert captions.left_out[sorted(captions.left_out)[0]] == "row 7 has no caption"


# The hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: Patch) -> Callable[[Any], Mock]:
    """Answers `load_dataset` with a data set, and notes what was asked for."""

    def answer(data: Any) -> Mock:
        load = Mock(return_value=data)
        monkeypatch.setattr(datasets, "load_dataset", load)
        return load

    return answer


def test_subset_and_revision_are_part_of_the_name(hub: Callable[[Any], Mock]):
    asked = hub(table(cells(A), caption=["one"]))
    names = ["owner/name", "owner/name:sub", "owner/name@refs/convert/parquet", "owner/name:sub@v1.0", "name"]
    assert len({fetch_hub(name) for name in names}) == len(names)
    assert asked.mock_calls == [
        call("owner/name", None, revision=None),
        call("owner/name", "sub", revision=None),
        call("owner/name", None, revision="refs/convert/parquet"),
        call("owner/name", "sub", revision="v1.0"),
        call("name", None, revision=None),
    ]


def test_a_hub_data_set_cannot_read_local_images(hub: Callable[[Any], Mock], tmp_path: Path):
    private, fetched = tmp_path / "private.jpg", tmp_path / "hf" / "downloads" / "fetched.png"
    fetched.parent.mkdir(parents=True)
    private.write_bytes(A)
    fetched.write_bytes(B)
    (fetched.parent / "link.jpg").symlink_to(private)
    paths = [private, fetched, fetched.parent / "link.jpg", fetched.parent / ".." / ".." / "private.jpg"]
    hub(table([{"bytes": None, "path": str(path)} for path in paths], caption=["x"] * 4))
    folder = fetch_hub("owner/name")
    assert read(folder) == {B: (("x",), None)}
    assert "train row 0 (its image is not in the data set)" in read_captions(folder).left_out
    assert len(read_captions(folder).left_out) == 3
    labels = datasets.ClassLabel(names=["a", "b"])
    rows = table([{"bytes": None, "path": str(path)} for path in paths[:2]], label=[0, 1])
    hub(rows.cast_column("label", labels))
    refused, allowed = find_classes("hf:owner/name").images
    with pytest.raises(BrokenImage, match="its image is not in the data set"):
        refused.read()
    assert allowed.read() == B


def test_unreadable_data_sets_are_one_line(save: Callable[..., str], tmp_path: Path):
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "scripted.py").write_text("raise SystemExit('it ran')")
    for name, message in (
        (str(scripted), r"scripts are no longer supported.*@refs/convert/parquet"),
        ("owner/name", r"hf:owner/name cannot be loaded \(.*Offline.*HF_HUB_OFFLINE"),
        *((name, "expected hf:OWNER/NAME") for name in ("./none", "/no", "a/b/c", "a/b:", "https://x/y", "")),
    ):
        with pytest.raises(UserError, match=message) as raised:
            fetch_hub(name)
        assert "\n" not in str(raised.value)


def test_unusable_data_sets_are_one_line(save: Callable[..., str]):
    one = table(cells(A), caption=["one"])
    no_image = r"no usable image with a caption \(first train row 0 \(it has no"
    for data, message in (
        (table([None, None], caption=["one", "two"]), no_image),
        (table(cells(A), caption=["one"], split=["Fold 1"]), "saved has a split 'Fold 1'; expected"),
        (datasets.DatasetDict(one=one, two=one), "has no split named train"),
    ):
        with pytest.raises(UserError, match=message):
            read(fetch_hub(save(data)))


# Classes ------------------------------------------------------------------------------------------------

CLASSES = ["airplane", "big_cat", "ship"]


def labelled(**parts: list[int]) -> dict[str, Any]:
    """Splits whose row i has picture i and the class given for it."""
    splits = {}
    for name, labels in parts.items():
        pictures = cells(*(picture(i, "PNG") for i in range(len(labels))))
        rows = table(pictures, "photo", kind=labels, note=["x"] * len(labels))
        rows = rows.cast_column("kind", datasets.ClassLabel(names=CLASSES))
        splits[name] = rows.cast_column("photo", datasets.Image())
    return splits


def test_images_with_classes(
    save: Callable[..., str], tmp_path: Path, make_clip: Callable[..., CLIP], capsys: Any
):
    name = save(**labelled(train=[0, 1, 2], validation=[2, 1], extra=[0]))
    found = find_classes(f"hf:{name}")
    assert "left out the splits extra" in capsys.readouterr().err
    assert found.classes == tuple(CLASSES) and found.labels == (0, 1, 2, 2, 1)
    assert found.splits == ("train",) * 3 + ("val",) * 2
    pixels = to_pixels(found.images[4])
    assert pixels.shape == (3, 8, 9) and pixels[:, 0, 0].tolist() == [40, 0, 0]
    assert found.images[4].name == f"hf:{name} validation 1"
    clip = make_clip().eval()
    (tmp_path / "one.png").write_bytes(picture(1, "PNG"))
    images = [found.images[4], tmp_path / "one.png"]
    features = Encoded.join(encode_images(clip.image_tower, images)).features
    assert torch.equal(features[0], features[1])


def test_classes_are_evaluated_by_name(save: Callable[..., str], bundle: Path, tmp_path: Path, printed: Any):
    labels = [0, 1, 2, 1]
    place = f"hf:{save(**labelled(train=[0, 1, 2, 0, 1, 2], test=labels))}"
    for row, label in enumerate(labels):
        file = tmp_path / "as_files" / CLASSES[label] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(row, "PNG"))

    folder = tmp_path / "as_files"
    found, same = (printed("evaluate", "zero-shot", bundle, data) for data in (place, folder))
    assert (found["split"], found["images"], found["classes"]) == ("test", 4, 3)
    for name in ("zero_shot_top1", "zero_shot_top5", "expected_calibration_error"):
        assert same[name] == pytest.approx(found[name], abs=1e-4)
    probed = printed("evaluate", "linear-probe", bundle, place, "--shots", 1)
    assert (probed["train_images"], probed["test_images"]) == (6, 4)


def test_hidden_labels_and_broken_images(save: Callable[..., str]):
    found = find_classes(f"hf:{save(**labelled(train=[0, 1, 2], test=[-1, -1]))}")
    assert found.splits == ("train",) * 3 and found.left_out == {"2 images of test": "they have no class"}
    rows = table([*cells(b"nothing"), None, *cells(A)], label=[0, 1, 1])
    rows = rows.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    found = find_classes(f"hf:{save(rows.cast_column('image', datasets.Image()))}")
    assert found.splits == (None,) * 3, "all in train means not split"
    for row, reason in enumerate(("not an image", "it has no image")):
        with pytest.raises(BrokenImage, match=reason):
            to_pixels(found.images[row])


def test_missing_columns_of_classes(save: Callable[..., str]):
    name = save(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))
    said = r"has the columns .*'text': 'Value'.*expected one column of the type Image"
    with pytest.raises(UserError, match=said):
        find_classes(f"hf:{name}")
    with pytest.raises(UserError, match="has 1 classes with images; expected two or more"):
        find_classes(f"hf:{save(**labelled(train=[1, 1]))}")
