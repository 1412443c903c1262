"""Whatever bytes come in: a right answer or one line that says what is wrong; nothing written elsewhere."""

import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lightning.data.formats import read_captions
from clip_lightning.data.sources import unpack
from clip_lightning.errors import UserError

QUICK = pytest.param(settings(max_examples=40, deadline=None, derandomize=True), id="quick")
LONG = pytest.param(settings(max_examples=3000, deadline=None), marks=pytest.mark.faults, id="long")

CSV = b'image,caption,split\na.jpg,"a dog, running",train\nb.jpg,two cats,test\n'
KARPATHY = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}]}
VALID = {
    "x.csv": CSV,
    "x.tsv": CSV.replace(b",", b"\t"),
    "captions.txt": CSV,
    "results.csv": b"image_name| comment_number| comment\na.jpg| 0| a dog\n",
    "Flickr8k.token.txt": b"a.jpg#0\ta dog\na.jpg#1\ta cat\n",
    "x.jsonl": b'{"image": "a.jpg", "captions": ["a dog", "x"], "split": "val"}\n',
    "dataset_coco.json": json.dumps(KARPATHY).encode(),
}
ODD = [
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b",", b"\t", b"#0\t", b"|", b"../", b"/etc/"),
    *(b"<script>", b"$(touch x)", b"\\ud800", b"\\u0000", b"1", b"null", b"[]", b"{}", b"9" * 5000),
    *(b"[" * 3000, b"x" * 200_000, b'"image": 1,', "\u202e\u2028".encode()),
]
Edits = list[tuple[int, int, bytes]]
EDITS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 20), st.sampled_from(ODD) | st.binary(max_size=8)),
    max_size=4,
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def edited(content: bytes, edits: Edits) -> bytes:
    """The content with some bytes taken out and others put in."""
    for start, length, new in edits:
        start %= len(content) + 1
        content = content[:start] + new + content[start + length :]
    return content


def read(files: dict[str, bytes]) -> dict[str, tuple[tuple[str, ...], str | None]] | None:
    """Name → captions and split as the package reads them; None where it refuses with one line."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name, content in {"a.jpg": b"", "b.jpg": b"", **files}.items():
            (root / name).write_bytes(content)
        before = sorted(root.parent.glob(f"{root.name}/**/*"))
        try:
            found = read_captions(root)
        except UserError as error:
            assert str(error).strip()
            return None
        finally:
            assert sorted(root.parent.glob(f"{root.name}/**/*")) == before
        assert len(found.digest()) == 64
        json.dumps(found.left_out, ensure_ascii=False).encode()
        assert all(image.path.is_file() and image.captions for image in found.images)
        return {image.path.name: (image.captions, image.split) for image in found.images}


def fuzz_tables(name: str, edits: Edits) -> None:
    read({name: edited(VALID[name], edits)})


def fuzz_bytes(name: str, content: bytes) -> None:
    read({name: content})


def fuzz_records(records: list[Any]) -> None:
    """JSON lines with any values, beside an independent reading of those that are as they should be."""
    content = "\n".join(json.dumps(record) for record in records).encode()
    found = read({"x.jsonl": content})
    if found is None:
        return
    expected: dict[str, tuple[str, ...]] = {}
    for record in records:
        captions = record["caption"] if isinstance(record["caption"], list) else [record["caption"]]
        for caption in captions:
            words = " ".join((caption or "").split())
            # json's own reader joins halves of characters that happen to be neighbours
            if words and "\0" not in words and words.encode(errors="replace").decode() == words:
                expected[record["image"]] = (*expected.get(record["image"], ()), words)
    assert {name: captions for name, (captions, _) in found.items()} == expected


def fuzz_karpathy(value: Any, where: int) -> None:
    image: dict[str, Any] = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}
    key = ("filename", "filepath", "split", "sentences", "raw")[where]
    (image["sentences"][0] if key == "raw" else image)[key] = value
    read({"dataset_coco.json": json.dumps({"images": [image]}).encode()})


NAMES = st.sampled_from(
    [*("a", "a/b", "A", "../x", "/tmp/x", "a/../../x", "..", ".", "", "a\\b", "C:/x", "./a", "a\nb", "é")]
) | st.text(max_size=6)
MEMBERS = st.lists(st.tuples(NAMES, st.sampled_from(["file", "link", "hard", "folder", "device"]), NAMES))


def tarred(members: list[tuple[str, str, str]]) -> bytes:
    types = {"file": b"0", "hard": b"1", "link": b"2", "device": b"3", "folder": b"5"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = types[kind], target, 1 if kind == "file" else 0
            tar.addfile(info, io.BytesIO(b"x"))
    return out.getvalue()


def zipped(members: list[tuple[str, str, str]]) -> bytes:
    modes = {"file": 0o100644, "hard": 0o100644, "link": 0o120777, "device": 0o020644, "folder": 0o040755}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, kind, target in members:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, modes[kind] << 16
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names twice
                archive.writestr(info, target.encode(errors="replace"))
    return out.getvalue()


def fuzz_archive(make: Callable[[Any], bytes], members: Any, edits: Edits) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            content = edited(make(members), edits)
        except (ValueError, UnicodeError):  # no archive can say this
            return
        (root / "archive").write_bytes(content)
        try:
            unpack(root / "archive", root / "files", "this")
        except (UserError, OSError) as error:
            assert isinstance(error, UserError) or error.errno is not None
        assert {path.name for path in root.iterdir()} <= {"archive", "files"}
        assert all(path.is_dir() or path.is_file() for path in root.rglob("*"))
        assert not any(path.is_symlink() for path in root.rglob("*"))


RECORDS = st.lists(
    st.fixed_dictionaries(
        {"image": st.sampled_from(["a.jpg", "b.jpg"]), "caption": st.text() | st.lists(st.text()) | JSON}
    ),
    max_size=4,
)
FUZZ: dict[str, tuple[Callable[..., None], dict[str, st.SearchStrategy[Any]]]] = {
    "edited tables": (fuzz_tables, {"name": st.sampled_from(sorted(VALID)), "edits": EDITS}),
    "any bytes": (
        fuzz_bytes,
        {"name": st.sampled_from([*sorted(VALID), "x.parquet"]), "content": st.binary(max_size=200)},
    ),
    "records": (fuzz_records, {"records": RECORDS}),
    "Karpathy's JSON": (fuzz_karpathy, {"value": JSON, "where": st.integers(0, 4)}),
    "archives": (
        fuzz_archive,
        {"make": st.sampled_from([tarred, zipped]), "members": MEMBERS, "edits": st.just([]) | EDITS},
    ),
}


@pytest.mark.parametrize("effort", [QUICK, LONG])
@pytest.mark.parametrize("what", FUZZ)
def test_bad_bytes_are_read_right_or_refused(what: str, effort: settings) -> None:
    check, arguments = FUZZ[what]
    effort(given(**arguments)(check))()
