import csv
import gzip
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lightning.data.captions import CaptionSet, content_groups
from clip_lightning.data.formats import read_captions
from clip_lightning.data.readers import ReadOptions
from clip_lightning.errors import UserError

Files = dict[str, str | bytes]


def write(root: Path, files: Files) -> Path:
    """Files of these contents; pictures are never opened here, so any content does."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def parquet(**columns: list[Any]) -> bytes:
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), data)
    return data.getvalue()


TWICE = io.BytesIO()
_ROWS = pyarrow.Table.from_arrays([pyarrow.array(["a.jpg"])] * 3, ["image", "caption", "caption"])
pyarrow.parquet.write_table(_ROWS, TWICE)


def content(captions: CaptionSet) -> dict[str, tuple[tuple[str, ...], str | None]]:
    return {
        image.path.relative_to(captions.root).as_posix(): (image.captions, image.split)
        for image in captions.images
    }


PAIR = {"a.jpg": (("one", "two"), None), "b.jpg": (("three",), None)}
A_RECORD = {"image": "a.jpg", "caption": ["one", "two"]}
B_RECORD = {"image": "b.jpg", "caption": "three"}
LINES = f"{json.dumps(A_RECORD)}\n{json.dumps(B_RECORD)}\n"
TAB_TABLE = "image\tcaption\na.jpg\tone\na.jpg\ttwo\nb.jpg\tthree\n"
TOKENS = "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n"


def coco(**captions: list[str]) -> str:
    names = [*captions]
    images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in enumerate(names)]
    rows = [(names.index(name), text) for name in names for text in captions[name]]
    annotations = [{"image_id": number, "caption": text} for number, text in sorted(rows, key=lambda r: r[1])]
    return json.dumps({"images": images, "annotations": annotations})


LAYOUTS: dict[str, Files] = {
    "csv": {"any.csv": "image,caption\na.jpg,one\nb.jpg,three\na.jpg,two\n"},
    "columns of open_clip": {"x.csv": "filepath\ttitle\na.jpg\tone\na.jpg\ttwo\nb.jpg\tthree\n"},
    "tsv": {"x.tsv": "id\tcaption\timage\n1\tone\ta.jpg\n2\ttwo\t./a.jpg\n3\tthree\tb.jpg\n"},
    "byte order mark, CRLF": {"x.csv": "\ufeffImage,Text\r\na.jpg,one\r\na.jpg,two\r\nb.jpg,three\r\n"},
    "unquoted": {"x.csv": 'image,caption\na.jpg,"one"\na.jpg,two\n\nb.jpg,  three \n'},
    "UTF-16": {"x.csv": TAB_TABLE.encode("utf-16")},
    "compressed table": {"x.tsv.gz": gzip.compress(TAB_TABLE.encode())},
    "compressed lines": {"x.jsonl.gz": gzip.compress(LINES.encode())},
    "Parquet": {"x.parquet": parquet(id=[1, 2], captions=[["one", "two"], ["three"]], image=[*PAIR])},
    "jsonl": {"x.jsonl": LINES.replace("\n", "\n\n").replace('"caption"', '"text"')},
    "pairs": {"a.txt": "one\n\ntwo\n", "b.txt": "three"},
    "Kaggle": {"captions.txt": "image,caption\na.jpg,one\na.jpg,two\nb.jpg,three\n"},
    "Illinois": {f"Flickr8k_text/Flickr8k.{name}": TOKENS for name in ("token.txt", "lemma.token.txt")},
    "COCO": {"annotations/captions_val2017.json": coco(a=["one", "two"], b=["three"])},
    "ALBEF": {"x_train.json": json.dumps([A_RECORD, B_RECORD])},
    "name to captions": {"captions.json": '{"a.jpg": ["one", "two"], "b.jpg": "three"}'},
    "JSON lines": {"x.json": LINES},
    "pandas": {"x.csv": """image,captions\na.jpg,"['one', ""two""]"\nb.jpg,['three']\n"""},
    "JSON lists": {"x.tsv": 'image\tcaptions\na.jpg\t["one", "two"]\nb.jpg\t["three"]\n'},
    "NumPy": {"x.csv": "image,captions\na.jpg,['one' 'two']\nb.jpg,three\n"},
    "numbered": {"x.csv": "image,caption_0,caption_1\na.jpg,one,two\nb.jpg,three,\n"},
    "a name twice, as pandas reads it": {"x.csv": "image,caption,caption.1\na.jpg,one,two\nb.jpg,three,\n"},
    "Excel": {"x.csv": "\ufeffsep=;\nimage;caption\na.jpg;one\na.jpg;two\nb.jpg;three\n"},
    "a list in data": {"x.json": json.dumps({"data": [A_RECORD, B_RECORD]})},
    "semicolons": {"x.csv": "image;caption;a, b\na.jpg;one;\na.jpg;two;\nb.jpg;three;\n"},
    "no header": {"x.csv": "a.jpg,one\na.jpg,two\nb.jpg,three\n"},
    "an id called image": {"x.csv": "image,file_name,prompt\n0,a.jpg,one\n0,a.jpg,two\n1,b.jpg,three\n"},
    "other spellings": {"x.csv": "image,caption\n.\\a.jpg,one\n/a.jpg,two\n%62.jpg,three\n"},
    ".caption": {"a.caption": "one\ntwo", "b.CAPTION": "three"},
    "name.jpg.txt": {"a.jpg.txt": "one\ntwo", "b.jpg.txt": "three"},
    "JSON beside it": {"a.json": '{"caption": ["one", "two"]}', "b.json": '{"text": "three"}'},
    "droppings": {
        **{"a.txt": "one\ntwo", "b.txt": "three", "._a.jpg": "", "._a.txt": "\0", "._x.csv": "\0"},
        **{".ipynb_checkpoints/a-checkpoint.jpg": "", "@eaDir/a.jpg": ""},
    },
    "numbers beside it": {
        "x.csv": TAB_TABLE,
        "check.json": '{"images": 2, "captions": 3, "source": "x.csv"}',
    },
    "Illinois 30k": {"results_20130124.token": TOKENS},
    "Kaggle 30k": {
        "flickr30k_images/results.csv": "image_name| comment_number| comment\n"
        "a.jpg| 0| one\na.jpg| 4   two\nb.jpg| 0| three\n"
    },
}
IMAGES_IN = {"Kaggle": "Images/", "Illinois": "Flicker8k_Dataset/", "COCO": "val2017/"}
IMAGES_IN |= {"name to captions": "images/", "Illinois 30k": "images/"}
IMAGES_IN |= {"Kaggle 30k": "flickr30k_images/flickr30k_images/"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognized(layout: str, tmp_path: Path) -> None:
    folder = IMAGES_IN.get(layout, "")
    write(tmp_path, LAYOUTS[layout] | {f"{folder}a.jpg": "", f"{folder}b.jpg": ""})
    captions = read_captions(tmp_path)
    assert content(captions) == {folder + name: value for name, value in PAIR.items()}
    assert not captions.has_official_splits
    assert captions.left_out == {}


def test_the_annotation_file_itself_can_be_given(tmp_path: Path) -> None:
    write(tmp_path, {"x.csv": "image,caption\na.jpg,x", "y.csv": "image,caption\na.jpg,y", "a.jpg": ""})
    assert content(read_captions(tmp_path / "y.csv")) == {"a.jpg": (("y",), None)}
    twice = Path(f"{tmp_path}/y.csv,{tmp_path}/./y.csv")
    assert content(read_captions(twice)) == {"a.jpg": (("y",), None)}
    with pytest.raises(UserError, match=r"several annotation files \(x\.csv, y\.csv\)"):
        read_captions(tmp_path)
    write(tmp_path, {"Flickr8k_text/Flickr8k.token.txt": "b.jpg#0\tone\n", "Flickr8k_Dataset/b.jpg": ""})
    captions = read_captions(tmp_path / "Flickr8k_text" / "Flickr8k.token.txt")
    assert [image.path for image in captions.images] == [tmp_path.resolve() / "Flickr8k_Dataset" / "b.jpg"]
    assert len(captions.digest()) == 64


@pytest.mark.parametrize(("folder", "extra"), [("Images", {}), ("val2014", {"filepath": "val2014"})])
def test_karpathy(folder: str, extra: dict[str, str], tmp_path: Path) -> None:
    images = [
        {"filename": f"{name}.jpg", "split": split, "sentences": [{"raw": "one"}, {"raw": "two"}], **extra}
        for name, split in (("a", "restval"), ("b", "val"), ("c", "test"))
    ]
    write(tmp_path, {f"{folder}/{name}.jpg": "" for name in "abc"})
    write(tmp_path, {"dataset_flickr8k.json": json.dumps({"images": images}), "unrelated.json": "{}"})
    captions = read_captions(tmp_path)
    assert [image.split for image in captions.images] == ["train", "val", "test"]
    assert captions.has_official_splits and captions.images[0].captions == ("one", "two")


def test_official_split_lists_may_be_incomplete(tmp_path: Path) -> None:
    rows = "".join(f"{name}.jpg,caption\n" for name in "abc")
    write(tmp_path, {f"Images/{name}.jpg": "" for name in "abc"} | {"captions.txt": f"image,caption\n{rows}"})
    write(tmp_path, {"Flickr_8k.devImages.txt": "b.jpg\nnot-here.jpg\n"})
    assert [image.split for image in read_captions(tmp_path).images] == ["train", "val", "train"]
    write(tmp_path, {"Flickr_8k.trainImages.txt": "a.jpg\r\n"})
    captions = read_captions(tmp_path)
    assert [image.split for image in captions.images] == ["train", "val", None]
    assert captions.has_official_splits
    assert [*captions.names().values()] == ["a.jpg", "b.jpg", "c.jpg"]
    write(tmp_path, {"Flickr_8k.testImages.txt": "a.jpg\n"})
    with pytest.raises(UserError, match=r"a\.jpg is in two splits, train and test"):
        read_captions(tmp_path)


def test_the_names_of_splits_in_a_table(tmp_path: Path) -> None:
    names = ["train", "val", "valid", "Validation", "dev", "test", ""]
    write(tmp_path, {f"{index}.jpg": "" for index in range(len(names))})
    rows = [f"{index}.jpg,{name},text\n" for index, name in enumerate(names)]
    write(tmp_path, {"x.csv": "image,split,caption\n" + "".join(rows)})
    splits = [image.split for image in read_captions(tmp_path).images]
    assert splits == ["train", "val", "val", "val", "val", "test", None]


@pytest.mark.parametrize("second", ["a.jpg", "./a.jpg", "sub/../a.jpg"])
def test_an_image_in_two_splits_is_refused(second: str, tmp_path: Path) -> None:
    table = f"image,caption,split\na.jpg,x,train\n{second},y,val\n"
    write(tmp_path, {"a.jpg": "", "sub/b.jpg": "", "x.csv": table})
    with pytest.raises(UserError, match=r"a\.jpg is in two splits, train and val"):
        read_captions(tmp_path)


def test_unusable_rows_are_named(tmp_path: Path) -> None:
    token = "a.jpg#0\tone\na.jpg#1\t \n2258277193_586949ec62.jpg.1#0\tA man\nblank.jpg#0\t\nno tab\n"
    images = {f"Images/{name}.jpg": "" for name in ("a", "blank", "c")}
    write(tmp_path, images | {"Flickr8k.token.txt": token})
    captions = read_captions(tmp_path)
    assert content(captions) == {"Images/a.jpg": (("one",), None)}
    assert captions.left_out == {
        "a.jpg": "row 2 has no caption",
        "2258277193_586949ec62.jpg.1": "there is no such image",
        "blank.jpg": "row 4 has no caption",
        "no tab": "there is no such image",
    }
    pairs = tmp_path / "pairs"
    write(pairs, {"deep/er/a.PNG": "", "deep/er/a.txt": "one", "b.jpg": "", "c.jpg": "", "c.txt": " \n"})
    captions = read_captions(pairs, ReadOptions("folder"))
    assert content(captions) == {"deep/er/a.PNG": (("one",), None)}
    assert captions.left_out == {"b.jpg": "there is no b.txt next to it", "c.jpg": "row 1 has no caption"}


def test_links_stay_readable_and_below_the_root(tmp_path: Path) -> None:
    write(tmp_path, {"store/deep/a.jpg": "x", "store/b.jpg": "y", "b.jpg": "not this one"})
    root = write(tmp_path / "root", {"x.csv": "image,caption\nImages/a.jpg,one\nImages/../b.jpg,two\n"})
    (root / "Images").symlink_to(tmp_path / "store" / "deep")
    captions = read_captions(root)
    assert [image.path.read_text() for image in captions.images] == ["x", "y"]
    assert captions.images[0].path == root.resolve() / "Images" / "a.jpg"


def test_results_csv_keeps_bars_quotes_and_commas(tmp_path: Path) -> None:
    lines = ('a.jpg| 0| A "quoted", and | barred sentence .', "21.jpg| 4   A dog runs .", '21.jpg| 0|  "Open')
    table = "\n".join(["image_name| comment_number| comment", *lines])
    write(tmp_path, {"results.csv": table, "a.jpg": "", "21.jpg": ""})
    assert content(read_captions(tmp_path, ReadOptions("flickr30k"))) == {
        "a.jpg": (('A "quoted", and | barred sentence .',), None),
        "21.jpg": (("A dog runs .", '"Open'), None),
    }


SPLIT = {"a.jpg": (("one",), "train"), "b.jpg": (("two",), "val"), "c.jpg": (("three",), "test")}
TABLE = "image,caption\n{}.jpg,{}\n"
SPLIT_LAYOUTS: dict[str, Files] = {
    "a table per split": {
        **{"train.csv": TABLE.format("a", "one"), "valid.csv": TABLE.format("b", "two")},
        "my_test.csv": TABLE.format("c", "three"),
    },
    "JSON of splits": {
        "x.json": '{"train": [{"image": "a.jpg", "caption": "one"}], "val": {"b.jpg": ["two"]}, '
        '"test": {"c.jpg": "three"}}'
    },
    "COCO": {
        "annotations/captions_train2017.json": coco(a=["one"]),
        "annotations/captions_val2017.json": coco(b=["two"]),
        "annotations/captions_test2017.json": coco(c=["three"]),
    },
}


@pytest.mark.parametrize("layout", SPLIT_LAYOUTS)
def test_one_file_per_split(layout: str, tmp_path: Path) -> None:
    captions = read_captions(write(tmp_path, SPLIT_LAYOUTS[layout] | dict.fromkeys(SPLIT, "")))
    assert content(captions) == SPLIT
    assert all(name in captions.summary() for name in SPLIT_LAYOUTS[layout])
    assert "3 images with 3 captions (train 1, val 1, test 1)" in captions.summary()


def test_one_folder_per_split(tmp_path: Path) -> None:
    """Each with a table and images of the same names, or with pairs."""
    for word in ("train", "val", "test"):
        write(tmp_path / word, {"captions.csv": TABLE.format("a", word), "images/a.jpg": ""})
        write(tmp_path / "pairs" / word, {"a.jpg": "", "a.txt": word})
    with pytest.raises(UserError, match=r"test/captions\.csv, train/captions\.csv, .* and also pairs"):
        read_captions(tmp_path)
    above = read_captions(tmp_path, ReadOptions("folder"))
    assert content(above) == {f"pairs/{word}/a.jpg": ((word,), word) for word in ("train", "val", "test")}
    tables = read_captions(tmp_path, ReadOptions("captions"))
    expected = {word: ((word,), word) for word in ("train", "val", "test")}
    assert content(tables) == {f"{word}/images/a.jpg": value for word, value in expected.items()}
    assert {*tables.names().values()} == {*content(tables)}, "a.jpg is the name of three images"
    pairs = read_captions(tmp_path / "pairs")
    assert content(pairs) == {f"{word}/a.jpg": value for word, value in expected.items()}
    parts = {f"{number:05}.csv": TABLE.format(name, name) for number, name in enumerate("ab")}
    assert len(read_captions(write(tmp_path / "parts", {**parts, "a.jpg": "", "b.jpg": ""})).images) == 2
    given = ",".join(str(tmp_path / word / "captions.csv") for word in ("train", "val"))
    assert [image.split for image in read_captions(Path(given)).images] == ["train", "val"]


@pytest.mark.parametrize("header", ["image,caption", "caption,image"])
@pytest.mark.parametrize("names", ["p00{}.jpg", "00{}"])
def test_a_stray_quote_does_not_swallow_rows(header: str, names: str, tmp_path: Path) -> None:
    rows = [(names.format(number), f"caption {number}") for number in range(6)]
    rows[2] = rows[2][0], '"quoted from here'
    rows[4] = rows[4][0], 'to here"'
    if header.startswith("caption"):
        rows = [row[::-1] for row in rows]
    write(tmp_path, {"x.csv": "\n".join([header, *map(",".join, rows)]), names.format(0): ""})
    with pytest.raises(UserError, match=r"broken at line 4"):
        read_captions(tmp_path)


def test_missing_images_are_explained(tmp_path: Path) -> None:
    names = ["/content/drive/pics/one.jpg", "C:\\me\\pics\\Two.jpg", "three", "nowhere.jpg", "b/here.jpg"]
    write(tmp_path, {"x.csv": "image,caption\n" + "".join(f"{name},x\n" for name in names)})
    write(tmp_path, {f"pics/{name}": "" for name in ("one.jpg", "two.JPG", "three.jpg")} | {"b/here.jpg": ""})
    left_out = read_captions(tmp_path).left_out
    option = f"correct the name, or use --data.read.image_folder {tmp_path.resolve() / 'pics'} if only"
    for reason, file in zip(left_out.values(), ("one.jpg", "two.JPG", "three.jpg"), strict=False):
        assert f"there is no such image, but there is pics/{file}; {option}" in reason
    assert left_out["nowhere.jpg"] == "there is no such image" and len(left_out) == 4
    in_pics = ReadOptions(image_folder=Path("pics"))
    assert list(content(read_captions(tmp_path, in_pics))) == ["pics/one.jpg"]
    write(tmp_path, {"x.csv": "image,caption\na/1.jpg,x\nb/1.jpg,x\n", "pics/1.jpg": ""})
    with pytest.raises(UserError, match=r"a/1\.jpg and b/1\.jpg would both be"):
        read_captions(tmp_path, in_pics)


def test_columns_can_be_given(tmp_path: Path) -> None:
    write(tmp_path, {"x.csv": "bild,satz,wort\na.jpg,one,two\n", "a.jpg": ""})
    with pytest.raises(UserError, match=r"found bild, satz, wort, .*give --data\.read\.image_column COLUMN"):
        read_captions(tmp_path)
    options = ReadOptions(image_column="bild", caption_column="satz,wort")
    assert content(read_captions(tmp_path, options)) == {"a.jpg": (("one", "two"), None)}
    with pytest.raises(UserError, match=r"no caption column saetze: found .*give --data\.read\.caption_"):
        read_captions(tmp_path, ReadOptions(image_column="bild", caption_column="saetze"))


def test_probable_mistakes_are_reported(tmp_path: Path) -> None:
    write(tmp_path, {"x.csv": "image,caption\na.jpg,NaN\na.jpg,a dog\n", "a.jpg": ""})
    write(tmp_path, dict.fromkeys(("photo.cr2", "photo2.CR2", "._x.jpg"), ""))
    write(tmp_path, {"labels.csv": "image,label\na.jpg,3\n"})
    assert read_captions(tmp_path).warnings == (
        "1 captions look like missing values (NaN) but are used as captions; remove these rows",
        "skipped: 2 .cr2 files, an unsupported format, 1 hidden files, 1 table without images and "
        "captions, labels.csv",
    )


def test_a_folder_that_cannot_be_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.jpg": "", "a.txt": "a dog", "locked/b.jpg": "", "locked/b.txt": "a cat"})

    def refuse(list_folder: Callable[[Any], Any], path: Any) -> Any:
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return list_folder(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(refuse, getattr(os, name)))
    assert read_captions(tmp_path).warnings == ("skipped: 1 unreadable folder locked (Permission denied)",)


AWKWARD = ["", " ", 'a "b", c', "two\nlines", "tab\there", "👩‍🚒 🐕", "word " * 10_000, "'", '"', "a|b;c"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30) | st.sampled_from(AWKWARD)
ROWS = st.lists(st.tuples(st.sampled_from("abcde"), TEXTS), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, kind=st.sampled_from(["csv", "tsv"]))
def test_captions_survive_writing_and_reading(rows: list[tuple[str, str]], kind: str) -> None:
    expected: dict[str, tuple[str, ...]] = {}
    for name, text in rows:
        if text.split():
            expected[f"{name}.jpg"] = (*expected.get(f"{name}.jpg", ()), " ".join(text.split()))
    with tempfile.TemporaryDirectory() as folder:
        root = write(Path(folder), {f"{name}.jpg": "" for name in "abcde"})
        with (root / f"x.{kind}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([("image", "caption"), *((f"{name}.jpg", text) for name, text in rows)])
        limit = csv.field_size_limit()
        if not expected:
            with pytest.raises(UserError, match="no usable image with a caption"):
                read_captions(root)
            return
        captions = read_captions(root)
        assert {image.path.name: image.captions for image in captions.images} == expected
        assert csv.field_size_limit() == limit


WRONG: dict[str, tuple[Files, str]] = {
    "no caption column": ({"x.csv": "image,word\n"}, "no caption column: found image, word, exp"),
    "no image column": ({"x.jsonl": '{"bild": 1, "caption": "a"}'}, "no image column: found bild, caption"),
    "no header": ({"captions.txt": ""}, "no image column: found nothing"),
    "unknown JSON": ({"dataset_coco.json": '{"images": [{"id": 1}]}'}, "begins with '{.*; expected COCO"),
    "LLaVA": ({"x.json": '[{"image": "a.jpg", "conversations": []}]'}, "begins with .*expected COCO"),
    "regions": ({"x.json": '[{"id": 1, "regions": []}]'}, "begins with .*expected COCO"),
    "texts apart": ({"images/a.jpg": "", "text/a.txt": "x"}, "no a.txt next to it.*expected"),
    "an id twice": ({"captions_x.json": coco(a=["x"], b=["y"]).replace('"id": 1', '"id": 0')}, "the same id"),
    "list": ({"dataset_coco.json": "[3]"}, r"begins with '\[3\]' .*; expected COCO"),
    "broken JSON": ({"dataset_coco.json": "{"}, "begins with .*JSONDecodeError"),
    "a name twice": ({"captions.json": '{"a.jpg": "x", "a.jpg": "y"}'}, "'a.jpg' is in an object 2 times"),
    "broken line": ({"x.jsonl": "{"}, "line 1 is not a JSON object"),
    "no object": ({"x.jsonl": "\n3"}, "line 2 is not a JSON object"),
    "two images in a row": ({"x.csv": "a.jpg,b.jpg,a dog"}, "no caption column: found image, 2, 3"),
    "a column twice": ({"x.csv": "image,caption,caption\na.jpg,x,y"}, "several columns caption; give them"),
    "a split twice": ({"x.csv": "image,caption,split,split\na.jpg,x,val,test"}, "several columns split"),
    "twice in Parquet": ({"x.parquet": TWICE.getvalue()}, "several columns caption"),
    "a number as a split": ({"x.jsonl": '{"image": "a", "caption": "x", "split": 1}'}, "str, str, int"),
    "deep JSON": ({"x.jsonl": b"[" * 100_000}, "line 1 is not a JSON object .*RecursionError"),
    "a long number": ({"x.jsonl": b"1" * 5000}, "line 1 is not a JSON object .*5000 digits"),
    "half a character": ({"x.jsonl": '{"image": "a.jpg", "caption": "\\ud800"}'}, "row 1: it has invalid"),
    "NUL in a folder's name": ({"x.csv": "image,caption\nx\0/a.jpg,y\n"}, "row 1: it has invalid"),
    "deep Karpathy": ({"dataset_coco.json": b'{"images": ' + b"[" * 100_000}, "begins with .*RecursionError"),
    "a number as a sentence": (
        {"dataset_x.json": '{"images": [{"filename": "a", "sentences": [{"raw": 1}]}]}'},
        "str, list",
    ),
    "folders like tables": (dict.fromkeys(("captions.txt/x", "x.csv/x", "y.json/x"), ""), "no usable image"),
    "open quote": ({"x.csv": 'image,caption\na.jpg,"x'}, "broken at line 2.*quotes"),
    "too many fields": ({"x.csv": "caption,image\nx,y,a.jpg"}, "3 fields for 2 columns"),
    "no table": ({"a.jpg": "", "a.txt": "x"}, "has no CSV, TSV"),
    "latin1": ({"x.csv": "image,caption\na.jpg,café".encode("latin1")}, "cannot be read as UTF-8"),
    "cut off": ({"x.jsonl.gz": gzip.compress(LINES.encode())[:20]}, "cannot be read .*EOFError"),
    "not Parquet": ({"x.parquet": b"PAR1 no more"}, "not a valid Parquet"),
    "bytes": ({"x.parquet": parquet(image=[b"x"], caption=["a"])}, "types bytes, .* as image.*or hf:/"),
    **{
        f"two tables: {files[-1]}": (dict.fromkeys(("a.jpg", *files), TABLE), said)
        for *files, said in (
            ("one/captions.txt", "two/captions.txt", r"\(one/captions\.txt, two/captions\.txt\), but not"),
            ("a.txt", "old/captions.csv", r"has old/captions\.csv and also pairs"),
            ("train.csv", "val.csv", "all.csv", r"all\.csv, train\.csv, val\.csv"),
        )
    },
}
LAYOUT: Any = dict.fromkeys(("list", "broken JSON", "no table"), "captions")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_has_one_clear_line(case: str, tmp_path: Path) -> None:
    files, message = WRONG[case]
    with pytest.raises(UserError, match=message) as error:
        read_captions(write(tmp_path, files), ReadOptions(LAYOUT.get(case, "auto")))
    assert "\n" not in str(error.value)
    assert "--data." in str(error.value)


def test_folders_in_a_list_and_unknown_formats(tmp_path: Path) -> None:
    write(tmp_path, {"train/a.jpg": "", "train/a.txt": "a dog", "val.csv": TABLE})
    with pytest.raises(UserError, match=r"train is not a file"):
        read_captions(Path(f"{tmp_path / 'train'},{tmp_path / 'val.csv'}"))
    with pytest.raises(UserError, match="does not exist"):
        read_captions(tmp_path / ("x" * 5000))
    write(tmp_path, {"x.bin": b"\0\1"})
    with pytest.raises(UserError, match="has an unknown format; expected Parquet"):
        read_captions(tmp_path / "x.bin")


@pytest.mark.real
def test_flickr8k(shared_data: Path) -> None:
    captions = read_captions(shared_data / "flickr8k")
    assert Counter(image.split for image in captions.images) == {"train": 6000, "val": 1000}
    assert {len(image.captions) for image in captions.images} == {5}
    assert captions.left_out == {}
    ((index, first),) = [pair for pair in enumerate(content_groups(captions.images)) if pair[0] != pair[1]]
    copies = [captions.images[index], captions.images[first]]
    assert {i.path.name for i in copies} == {"2851198725_37b6027625.jpg", "3050606344_af711c726c.jpg"}
    assert {image.split for image in copies} == {"train"}
