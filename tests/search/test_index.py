"""An index is exact if it says so, is brought up to date with little work, and survives being killed."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from processes import killed_at

from clip_lightning import CLIP, ImageIndex
from clip_lightning.data.images import BrokenImage
from clip_lightning.data.scenes import draw
from clip_lightning.errors import UserError
from clip_lightning.model.export.onnx import write_text_tower
from clip_lightning.search import vectors
from clip_lightning.search.build import build_index, tower_digest
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Options
from clip_lightning.search.index import FoundImage

Patch = pytest.MonkeyPatch
SENTENCES = ["a red circle", "two blue squares", "a star"]
WRITER = "clip_lightning.search.build.write_text_tower"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve different images, some in subfolders and with names that are not ASCII."""
    names = [f"{n}.png" for n in range(9)] + ["été/日本 語 🐶.png", "été/ö'\".JPG", "deep/er/x.webp"]
    for number, name in enumerate(names):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(0, number, 32).save(path)
    return tmp_path / "photos"


@pytest.fixture
def clip(make_clip: Callable[..., CLIP]) -> CLIP:
    return make_clip()


def update(clip: CLIP | Path, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Build an index, without its text tower, which takes seconds to write, unless a test asks for it."""
    return build_index(clip, source, out, Options(**{"onnx": False, **options}))


def built(clip: CLIP, source: Path, out: Path, **options: Any) -> ImageIndex:
    return ImageIndex.build(clip, source, out, Options(**{"onnx": False, **options}))


def manifest_of(out: Path) -> Manifest:
    return EmbeddingsFolder(out).manifest()


def contents(out: Path) -> tuple[list[tuple[object, ...]], np.ndarray, str]:
    """The images of the current version, their embeddings, and what cannot be decoded."""
    parts = [EmbeddingsFolder(out).read(part) for part in manifest_of(out).parts if part[0] == "i"]
    rows = [json.loads(line) for lines, _ in parts for line in lines]
    embeddings = np.concatenate([vectors for _, vectors in parts])
    names = ("path", "captions", "width", "height", "sha256")
    return [tuple(row[name] for name in names) for row in rows], embeddings, (out / "broken.json").read_text()


def assert_same(first: Path, second: Path) -> None:
    (rows, embeddings, broken), (others, theirs, also_broken) = contents(first), contents(second)
    assert (rows, broken) == (others, also_broken)
    np.testing.assert_allclose(embeddings, theirs, atol=1e-6)  # other batches


def files(hits: list[FoundImage]) -> list[Path]:
    return [hit.path for hit in hits]


def test_flat_finds_what_brute_force_finds(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    index = built(clip, photos, tmp_path / "idx", batch_size=5)
    paths = sorted(path for path in photos.rglob("*") if path.is_file())
    scores = clip.embed_texts(SENTENCES) @ clip.embed_images(paths).T
    assert len(index) == len(paths) == 12
    for row, hits in zip(scores, index.search(SENTENCES, 5), strict=True):
        best = row.sort(descending=True).values[:5]
        assert [hit.score for hit in hits] == pytest.approx(best.tolist(), abs=1e-5)
        exact = dict(zip(paths, row.tolist(), strict=True))
        assert [hit.score for hit in hits] == pytest.approx([exact[hit.path] for hit in hits], abs=1e-5)
        assert len({hit.path for hit in hits}) == 5
        assert all(hit.path.is_absolute() and not hit.missing and hit.width == 32 for hit in hits)
    texts = index.search(clip.embed_texts(SENTENCES), 5)
    assert texts == index.search(SENTENCES, 5) == index.search(clip.embed_texts(SENTENCES).numpy(), 5)
    assert files(index.search(SENTENCES[0], 5)[0]) == files(texts[0])  # without the others' padding


def test_an_index_has_more_files_than_a_process_may_open(clip: CLIP, scenes: Path, tmp_path: Path) -> None:
    free, limits = os.dup(0), resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 30, limits[1]))
    try:
        options: dict[str, Any] = {"shard_size": 1, "what": "both"}
        index = built(clip, scenes, tmp_path / "idx", **options)
        assert len(index.manifest.parts) == 240
        image = Path(index.search("a star", 1)[0][0].path)
        assert index.search_by_image(image, 1)[0][0].path == image
        assert update(clip, scenes, tmp_path / "idx", **options)["embedded"] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_an_image_finds_itself_and_k_may_be_larger(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    index = built(clip, photos, tmp_path / "idx")
    for name in ("3.png", "été/日本 語 🐶.png"):
        hits = index.search_by_image(photos / name, 1000)[0]
        assert (len(hits), hits[0].path) == (12, photos / name)
        assert hits[0].score == pytest.approx(1, abs=1e-5)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(BrokenImage, match=r"broken\.png cannot be read"):
        index.search_by_image([tmp_path / "broken.png"])
    (photos / "0.png").unlink()
    assert {hit.path.name for hit in index.search("a", 12)[0] if hit.missing} == {"0.png"}


def test_embedded_captions_stay_until_they_are_no_longer_wanted(
    clip: CLIP, scenes: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(scenes, tmp_path / "data")
    lines = (folder / "captions.csv").read_text().splitlines()
    assert built(clip, folder, tmp_path / "idx", what="both").manifest.captions == len(lines) - 1
    assert update(clip, folder, tmp_path / "idx")["captions"] == len(lines) - 1
    assert built(clip, folder, tmp_path / "idx", what="images").manifest.captions == 0
    (folder / "some.csv").write_text("\n".join(lines[:11]) + "\n")
    assert update(clip, folder / "some.csv", tmp_path / "some")["images"] == 2, "those of the file only"


def test_an_approximate_index_embeds_nothing_again_and_is_repaired(
    clip: CLIP, scenes: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(vectors, "FEWEST_IVFPQ", 40)
    out = tmp_path / "idx"
    update(clip, scenes, out)
    expected = ImageIndex.load(out, clip).search(SENTENCES, 5)
    assert update(clip, scenes, out, type="ivfpq")["embedded"] == 0
    [file] = out.glob("*.faiss")
    for hits, others in zip(ImageIndex.load(out, clip).search(SENTENCES, 5), expected, strict=True):
        assert files(hits) == files(others)
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in others], abs=1e-3)
    complete = file.read_bytes()
    file.write_bytes(complete[:-1])
    with pytest.raises(UserError, match=r"is damaged .*faiss is not complete"):
        ImageIndex.load(out)
    update(clip, scenes, out, type="ivfpq")
    assert file.stat().st_size == len(complete)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "faiss", None)
        for attempt in (lambda: ImageIndex.load(out), lambda: update(clip, scenes, out, type="ivfpq")):
            with pytest.raises(UserError, match=r"^an index of type ivfpq needs FAISS; pip install"):
                attempt()
        update(clip, scenes, out)  # a flat one does not
        assert ImageIndex.load(out, clip).search(SENTENCES, 5) == expected
    assert not [*out.glob("*.faiss")]


def test_new_changed_and_deleted_files(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "idx"
    update(clip, photos, out)
    [file] = out.glob("*.npy")
    before = file.stat().st_ino
    again = update(clip, photos, out)
    assert (again["unchanged"], again["embedded"]) == (12, 0)
    assert file.stat().st_ino == before  # nothing was written

    draw(0, 20, 32).save(photos / "new.png")
    draw(0, 21, 32).save(photos / "1.png")
    (photos / "2.png").unlink()
    (photos / "3.png").rename(photos / "moved.png")
    os.utime(photos / "4.png", (1, 1))
    done = update(clip, photos, out)
    # what moved or was touched has the content that it had, and is not embedded again
    expected = {"images": 12, "added": 2, "changed": 1, "removed": 2, "unchanged": 9, "embedded": 2}
    assert expected.items() <= done.items()
    one, other = (photos / "5.png").read_bytes(), (photos / "6.png").read_bytes()
    (photos / "5.png").write_bytes(other)
    (photos / "6.png").write_bytes(one)
    assert {"changed": 2, "embedded": 0}.items() <= update(clip, photos, out).items(), "they changed places"
    update(clip, photos, tmp_path / "fresh")
    assert_same(out, tmp_path / "fresh")
    names = {hit.path.name for hit in ImageIndex.load(out, clip).search("a star", 100)[0]}
    assert {"new.png", "moved.png"} < names
    assert len(list(out.glob("*.npy"))) == 1


def test_broken_and_unreadable_images_are_left_out_and_tried_again(
    clip: CLIP, photos: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    (photos / "empty.png").touch()
    (photos / "text.jpg").write_text("not an image")
    complete = (photos / "7.png").read_bytes()
    (photos / "7.png").write_bytes(complete[: len(complete) // 2])
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    (photos / os.fsdecode(b"caf\xe9.png")).write_bytes(complete)
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "a.png").write_bytes(complete)
    read = Path.read_bytes
    away = {photos / "1.png", photos / "2.png"}

    def read_bytes(path: Path) -> bytes:
        if path in away:
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    done = update(clip, photos, tmp_path / "idx", num_workers=1)
    assert done["images"] == 9
    assert {Path(path).name for path in done["broken"]} == {"empty.png", "text.jpg", "7.png"}
    assert "empty" in done["broken"][str(photos / "empty.png")]
    assert {Path(path).name for path in done["unreadable"]} == {"1.png", "2.png", "gone.png", "caf?.png"}
    assert json.loads((tmp_path / "idx" / "broken.json").read_text()) == done["broken"]
    away.clear()
    (photos / "7.png").write_bytes(complete)
    done = update(clip, photos, tmp_path / "idx")
    assert (done["added"], done["embedded"], len(done["broken"]), len(done["unreadable"])) == (3, 3, 2, 2)


def test_without_any_image_the_index_stays(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "idx", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no images in"):
        update(clip, empty, out)
    assert not out.exists()
    update(clip, photos, out)
    (empty / "a.png").write_text("not an image")
    with pytest.raises(UserError, match=r"none of 1 images can be read .*known format"):
        update(clip, empty, out)
    assert len(ImageIndex.load(out)) == 12


def test_another_model_is_refused(make_clip: Callable[..., CLIP], photos: Path, tmp_path: Path) -> None:
    clip, out = make_clip(), tmp_path / "idx"
    clip.save_pretrained(tmp_path / "model")
    other = make_clip()
    with torch.no_grad():
        next(other.heads.text.parameters()).add_(0.01)
    update(tmp_path / "model", photos, out)
    with pytest.raises(UserError, match="contains embeddings of another model"):
        update(other, photos, out)
    with pytest.raises(UserError, match="not the model that the index was built with"):
        ImageIndex.load(out, other).search("a star")
    # what is the same model: where it was, a copy of it, the object itself
    expected = ImageIndex.load(out).search("a star")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(UserError, match="is not in"):
        ImageIndex.load(out).search("a star")
    assert ImageIndex.load(out, tmp_path / "moved").search("a star") == expected
    assert ImageIndex.load(out, clip).search("a star") == expected


def test_only_one_writes_while_many_read(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    update(clip, photos, tmp_path / "idx")
    with EmbeddingsFolder(tmp_path / "idx").writing():
        with pytest.raises(UserError, match="another process is writing"):
            update(clip, photos, tmp_path / "idx")
        assert len(ImageIndex.load(tmp_path / "idx", clip).search("a star", 3)[0]) == 3


@pytest.mark.parametrize("name", ["notes", "manifest.json", "images-1.npy", ".lecture.tmp", "1.png.npy"])
def test_folders_of_something_else_stay(clip: CLIP, photos: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"something other than embeddings|another program or version"):
        update(clip, photos, tmp_path / "theirs")
    assert [path.name for path in theirs.parent.iterdir()] == [theirs.name]
    with pytest.raises(UserError, match=r"no finished index|another program or version"):
        ImageIndex.load(tmp_path / "theirs")


def test_a_damaged_index_is_named_and_repaired(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "idx"
    update(clip, photos, out)
    for suffix in ("npy", "jsonl"):
        [file] = out.glob(f"*.{suffix}")
        complete = file.read_bytes()
        for damage in (complete[:-70], b"half", complete.replace(b'"path"', b'"pith"')[::-1]):
            file.write_bytes(damage)
            with pytest.raises(UserError, match=r"idx is damaged \(") as caught:
                ImageIndex.load(out, clip).search("a star", 12)
            assert "\n" not in str(caught.value)
        update(clip, photos, out)
        assert file.read_bytes() == complete
    manifest = json.loads((out / "manifest.json").read_text())
    changes = {"source": 5, "shard_size": "1", "width": -1, "parts": ["../../etc/passwd"], "faiss_bytes": 0.5}
    for name, value in (changes | {"dtype": "int4"}).items():
        (out / "manifest.json").write_text(json.dumps(manifest | {name: value}))
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            ImageIndex.load(out)


def test_manifests_of_other_versions(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "idx" / "manifest.json", tmp_path / "idx"
    expected = built(clip, photos, out).search("a star", 12)
    manifest = json.loads(file.read_text())
    assert manifest["dtype"] == "float32"
    without_dtype = {name: value for name, value in manifest.items() if name != "dtype"}
    for earlier in (manifest | {"format": "npy"}, without_dtype):
        file.write_text(json.dumps(earlier))
        assert ImageIndex.load(out, clip).search("a star", 12) == expected
    draw(0, 20, 32).save(photos / "new.png")
    assert {"unchanged": 12, "embedded": 1}.items() <= update(clip, photos, out).items()
    assert len(ImageIndex.load(out, clip)) == 13
    file.write_text(json.dumps(manifest | {"format": "parquet"}))
    for attempt in (lambda: ImageIndex.load(out), lambda: update(clip, photos, out)):
        with pytest.raises(UserError, match="was written by another program or version"):
            attempt()


def stand_in(clip: CLIP, folder: Path) -> float:
    """Files where the text tower's would be, in no time."""
    (folder / "text.onnx").write_bytes(b"tower")
    (folder / "tokenizer.json").write_bytes(b"{}")
    return 0.0


def tower_of(out: Path) -> Path:
    """Where the text tower is; checks that the files are those that were written."""
    manifest = manifest_of(out)
    folder = EmbeddingsFolder(out).text_tower(manifest.identity)
    assert manifest.text_tower == tower_digest(folder)
    return folder


@pytest.mark.parametrize("first", [True, False], ids=["first", "update"])
def test_killed_anywhere_the_index_is_the_old_or_the_new_one(
    clip: CLIP, scenes: Path, photos: Path, tmp_path: Path, monkeypatch: Patch, first: bool
) -> None:
    monkeypatch.setattr(WRITER, stand_in)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)  # the stand-in must not be kept
    captions = (scenes / "captions.csv").read_text()
    for number, name in enumerate(sorted(scenes.glob("*.*g"))[:9]):
        captions = captions.replace(name.name, f"{number}.png")
    (photos / "captions.csv").write_text(captions)

    def build(out: Path) -> None:
        update(clip, photos, out, batch_size=2, num_workers=1, what="both", shard_size=16, onnx=None)

    def names(out: Path) -> list[str]:  # without their digests: other batches may round otherwise
        return sorted(re.sub("-[0-9a-f]{16}", "", path.name) for path in out.iterdir())

    old, start = None, tmp_path / "start"
    if not first:
        build(start)
        old = contents(start)[0]
        draw(0, 30, 32).save(photos / "1.png")
        draw(0, 31, 32).save(photos / "another.png")
        (photos / "2.png").unlink()
    build(tmp_path / "new")
    new = contents(tmp_path / "new")[0]
    number, states = 0, []
    while True:
        number += 1
        out = tmp_path / f"killed{number}"
        if not first:
            shutil.copytree(start, out)
        if not killed_at(number, lambda out=out: build(out)):
            break
        if not out.exists() or not (manifest := EmbeddingsFolder(out).manifest()) or not manifest.finished:
            assert first
            states.append("none")
        else:
            rows = contents(out)[0]
            assert tower_of(out)
            states.append("old" if rows == old else "new")
            assert rows in (old, new)
            index = ImageIndex.load(out, clip)
            assert len(index.search("a star", 50)[0]) == len(rows)
        if number % 4 == 0 or states[-1] == "new":
            build(out)
            assert_same(out, tmp_path / "new")
            assert names(out) == names(tmp_path / "new")
    assert number > 15
    assert states == sorted(states, key=lambda state: state == "new")
    assert {*states} == ({"none"} if first else {"old", "new"})  # a new index is complete with its last file


@pytest.fixture(scope="module")
def exported(make_clip: Callable[..., CLIP], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle `model`, its images `photos` and their index `idx`, with its text tower."""
    folder = tmp_path_factory.mktemp("exported")
    make_clip().save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for number in range(6):
        draw(0, number, 32).save(folder / "photos" / f"{number}.png")
    assert update(folder / "model", folder / "photos", folder / "idx", onnx=None)["text_tower"] == "onnx"
    return folder


LONG = "a red circle 🐶 " * 60
QUERIES = [*SENTENCES, "a", LONG, "Ünknown wörds"] * 20


def test_the_text_tower_finds_what_the_model_finds(
    exported: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Patch
) -> None:
    light = ImageIndex.load(exported / "idx")
    found = light.search(QUERIES, 6)
    assert "clip" not in light.__dict__
    expected = ImageIndex.load(exported / "idx", exported / "model").search(QUERIES, 6)
    for hits, others in zip(found, expected, strict=True):
        assert files(hits) == files(others)
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in others], abs=1e-5)
    assert light.search([]) == []
    # both say which sentences they cut
    assert caplog.messages == [f"the model reads only the first 64 tokens of {LONG[:60] + '...'!r}"] * 40
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    without = ImageIndex.load(exported / "idx")
    assert files(without.search("a star")[0]) == files(expected[2])
    assert "clip" in without.__dict__


def test_a_sentence_needs_neither_torch_nor_the_model(exported: Path) -> None:
    program = f"""
import sys
from clip_lightning.__main__ import main
assert main(["search", {str(exported / "idx")!r}, "a red circle", "--k", "2"]) == 0
heavy = ("torch", "transformers", "timm", "lightning", "faiss", "pyarrow")
print("LOADED", *[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert (len(lines), loaded) == (2, "LOADED")


def test_updates_keep_and_repair_the_text_tower(exported: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    index = shutil.copytree(exported / "idx", tmp_path / "idx")
    model, photos = exported / "model", exported / "photos"
    file = tower_of(index) / "text.onnx"
    before = file.stat().st_ino
    with monkeypatch.context() as patch:
        patch.delattr(WRITER)  # it need not be written again
        assert update(model, photos, index, onnx=None)["text_tower"] == "onnx"
    assert tower_of(index) == file.parent and file.stat().st_ino == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writer = Mock(wraps=write_text_tower)
    monkeypatch.setattr(WRITER, writer)

    def damage_both() -> None:
        for damaged in (file, *tmp_path.rglob("text_tower/*/text.onnx")):
            damaged.write_bytes(b"another tower")

    for change, written in ((lambda: file.write_bytes(b"another"), 1), (file.unlink, 1), (damage_both, 2)):
        change()
        with pytest.raises(UserError, match=r"idx is damaged"):
            ImageIndex.load(index).search("a star")
        assert ImageIndex.load(index, model).search("a star")
        assert update(model, photos, index, onnx=None)["text_tower"] == "onnx"
        assert tower_of(index) and ImageIndex.load(index).search("a star")
        assert writer.call_count == written  # else it was copied from the cache
    assert update(model, photos, index, onnx=False)["text_tower"] == "--onnx false"
    assert not file.parent.exists() and not manifest_of(index).text_tower


def test_a_kept_text_tower_has_as_many_dims(
    make_clip: Callable[..., CLIP], photos: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for dims in (16, 8):
        out = tmp_path / str(dims)
        assert update(make_clip(head="mlp"), photos, out, onnx=True, dims=dims)["width"] == dims
        assert ImageIndex.load(out).search("a star")


def test_a_tower_without_an_export(clip: CLIP, photos: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(WRITER, Mock(side_effect=UserError("not this one")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert update(clip, photos, tmp_path / "idx", onnx=None)["text_tower"] == "not this one"
    with pytest.raises(UserError, match="--onnx true: not this one"):
        update(clip, photos, tmp_path / "idx", onnx=True)
