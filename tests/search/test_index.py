"""An index is exact where it says so, is brought up to date with little work, and survives being killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_lightning import ImageIndex
from clip_lightning.data.scenes import draw
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import ImageTower, TextTower
from clip_lightning.search import embed, vectors
from clip_lightning.search.build import Options, Report, build_index
from clip_lightning.search.store import Store
from clip_lightning.search.text_tower import TextTowerFiles

SENTENCES = ["a red circle", "two blue squares", "a star"]
WRITER = "clip_lightning.search.build.write_text_tower"
# of fp16 vectors
CLOSE = 2e-3


@pytest.fixture(autouse=True)
def no_export(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a tower as ONNX takes seconds; only tests about that wait for it."""

    def refuse(clip: CLIP, folder: Path) -> float:
        raise UserError("not in this test")

    if "exported" not in request.fixturenames:
        monkeypatch.setattr(WRITER, refuse)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve different pictures, some in subfolders and with names that are not ASCII."""
    folder = tmp_path / "photos"
    names = [f"{n}.png" for n in range(9)] + ["été/日本 語 🐶.png", "été/ö'\".JPG", "deep/er/x.webp"]
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(0, number, 32).save(path)
    return folder


@pytest.fixture
def clip(make_clip: Callable[..., CLIP]) -> CLIP:
    return make_clip()


def update(clip: CLIP | Path, source: Path, out: Path, **options: object) -> Report:
    return build_index(clip, source, out, Options(**options))  # type: ignore[arg-type]


def contents(out: Path) -> tuple[list[tuple[object, ...]], np.ndarray, dict[str, str]]:
    """All of the current version that does not say when it was made."""
    version = Store(out).current()
    assert version is not None
    rows = [(row.path, row.captions, row.width, row.height, row.sha256) for row in version.rows()]
    return rows, np.array(version.embeddings()), version.left_out()


def assert_same(first: Path, second: Path) -> None:
    (rows, embeddings, left_out), (others, theirs, also_left_out) = contents(first), contents(second)
    assert (rows, left_out) == (others, also_left_out)
    # in a batch of another size the last bit of fp16 may be another, on some CPUs
    np.testing.assert_allclose(embeddings.astype(np.float32), theirs.astype(np.float32), rtol=0, atol=5e-4)


def found_names(index: ImageIndex, k: int = 100) -> set[str]:
    return {hit.path.name for hit in index.search("a star", k)[0]}


# finding


def test_flat_finds_what_brute_force_finds(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(clip, photos, tmp_path / "idx", batch_size=5)
    paths = sorted(path for path in photos.rglob("*") if path.is_file())
    scores = clip.embed_texts(SENTENCES) @ clip.embed_images(paths).T
    assert len(index) == len(paths) == 12
    for row, hits in zip(scores, index.search(SENTENCES, 5), strict=True):
        best = row.sort(descending=True).values[:5]
        assert [hit.score for hit in hits] == pytest.approx(best.tolist(), abs=CLOSE)
        exact = dict(zip(paths, row.tolist(), strict=True))
        assert [hit.score for hit in hits] == pytest.approx([exact[hit.path] for hit in hits], abs=CLOSE)
        assert len({hit.path for hit in hits}) == 5
        assert all(hit.path.is_absolute() and not hit.missing and hit.width == 32 for hit in hits)
    texts = index.search(clip.embed_texts(SENTENCES), 5)
    assert texts == index.search(SENTENCES, 5) == index.search(clip.embed_texts(SENTENCES).numpy(), 5)
    alone = index.search(SENTENCES[0], 5)  # without the others' padding
    assert [hit.path for hit in alone[0]] == [hit.path for hit in texts[0]]


def test_a_picture_finds_itself_and_k_may_be_larger(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(clip, photos, tmp_path / "idx")
    for name in ("3.png", "été/日本 語 🐶.png"):
        hits = index.search_by_image(photos / name, 1000)[0]
        assert len(hits) == 12
        assert hits[0].path == photos / name
        assert hits[0].score == pytest.approx(1, abs=CLOSE)
    with pytest.raises(UserError, match="expected 1 or more"):
        index.search("a", 0)
    with pytest.raises(UserError, match=r"\(queries, 16\)"):
        index.search(np.zeros((1, 3)))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png cannot be read"):
        index.search_by_image([tmp_path / "broken.png"])


def test_a_lost_picture_is_marked(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(clip, photos, tmp_path / "idx")
    (photos / "0.png").unlink()
    assert {hit.path.name for hit in index.search("a", 12)[0] if hit.missing} == {"0.png"}


def test_captions_are_found_for_pictures(clip: CLIP, scenes: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(clip, scenes, tmp_path / "idx", captions=True)
    assert len(index) == 40
    picture = index.search("a star", 1)[0][0]
    assert len(picture.captions) == 5
    texts = list(dict.fromkeys(text for hit in index.search("a", 40)[0] for text in hit.captions))
    assert index.manifest.captions == len(texts)
    scores = (clip.embed_images([picture.path]) @ clip.embed_texts(texts).T)[0]
    found = index.captions(picture.path, 7)[0]
    best = scores.sort(descending=True).values[:7].tolist()
    assert [hit.score for hit in found] == pytest.approx(best, abs=CLOSE)
    own = [hit for hit in index.captions([picture.path], 1000)[0] if hit.caption in picture.captions]
    assert len(own) == len(set(picture.captions))
    assert all(picture.path in hit.paths for hit in own)
    # they stay without being asked for again, and go when told so
    assert update(clip, scenes, tmp_path / "idx").captions == len(texts)
    without = ImageIndex.build(clip, scenes, tmp_path / "idx", captions=False)
    with pytest.raises(UserError, match="--captions true"):
        without.captions([picture.path])


def test_an_annotation_file_names_its_pictures_only(clip: CLIP, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    lines = (folder / "captions.csv").read_text().splitlines()
    (folder / "some.csv").write_text("\n".join(lines[:11]) + "\n")
    assert len(ImageIndex.build(clip, folder / "some.csv", tmp_path / "idx")) == 2


# the kinds of FAISS index


def random_vectors(count: int, seed: int) -> np.ndarray:
    """Unit vectors (count, 32) around 40 centres: a model's embeddings are no uniform cloud, either."""
    centres = np.random.default_rng(0).normal(size=(40, 32))
    rng = np.random.default_rng(seed)
    values = centres[rng.integers(40, size=count)] + 0.5 * rng.normal(size=(count, 32))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_recall_and_scores_of_each_type(kind: vectors.IndexType, tmp_path: Path) -> None:
    stored, queries = random_vectors(3000, 1).astype(np.float16), random_vectors(50, 2)
    vectors.write_index(vectors.build(kind, stored), tmp_path / "é.index")
    found = vectors.search(vectors.read_index(tmp_path / "é.index"), kind, stored, queries, 10)
    scores = queries @ stored.astype(np.float32).T
    exact = np.argsort(-scores, axis=1)[:, :10]
    shared = [len({row for row, _ in hits} & set(best)) for hits, best in zip(found, exact, strict=True)]
    assert sum(shared) / 500 >= (1 if kind == "flat" else 0.95)
    for row, hits in zip(scores, found, strict=True):
        assert [score for _, score in hits] == pytest.approx([row[i] for i, _ in hits], abs=1e-5)
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)


def test_the_type_goes_by_size() -> None:
    sizes = {count: vectors.chosen_type("auto", count) for count in (1, 99_999, 100_000, 10**6, 10**6 + 1)}
    assert list(sizes.values()) == ["flat", "flat", "ivfpq", "ivfpq", "ivfpq"]
    with pytest.raises(UserError, match="use --type flat"):
        vectors.chosen_type("ivfpq", 50)


def test_another_type_embeds_nothing_again(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    first = update(clip, photos, tmp_path / "idx")
    second = update(clip, photos, tmp_path / "idx", type="hnsw")
    assert (first.type, first.embedded, second.type, second.embedded) == ("flat", 12, "hnsw", 0)
    assert len(ImageIndex.load(tmp_path / "idx", clip).search("a star", 20)[0]) == 12


# bringing up to date


def test_new_changed_and_deleted_files(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "idx"
    update(clip, photos, out)
    before = os.stat(out / "current").st_ino
    again = update(clip, photos, out)
    assert (again.unchanged, again.embedded) == (12, 0)
    assert os.stat(out / "current").st_ino == before  # nothing was written

    draw(0, 20, 32).save(photos / "new.png")
    draw(0, 21, 32).save(photos / "1.png")
    (photos / "2.png").unlink()
    (photos / "3.png").rename(photos / "moved.png")
    os.utime(photos / "4.png", (1, 1))
    report = update(clip, photos, out)
    counts = (report.pictures, report.added, report.changed, report.removed, report.unchanged)
    assert counts == (12, 2, 1, 2, 9)
    assert report.embedded == 2  # what moved or was touched has the content that it had
    update(clip, photos, tmp_path / "fresh")
    assert_same(out, tmp_path / "fresh")
    assert {"new.png", "moved.png"} < found_names(ImageIndex.load(out, clip))
    assert len(list((out / "versions").iterdir())) == 1
    assert not (out / "pending").exists()


def test_a_change_that_keeps_size_and_time_of_others(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    """Two files that change places are two changes."""
    update(clip, photos, tmp_path / "idx")
    one, other = (photos / "5.png").read_bytes(), (photos / "6.png").read_bytes()
    (photos / "5.png").write_bytes(other)
    (photos / "6.png").write_bytes(one)
    report = update(clip, photos, tmp_path / "idx")
    assert (report.changed, report.embedded) == (2, 0)
    update(clip, photos, tmp_path / "fresh")
    assert_same(tmp_path / "idx", tmp_path / "fresh")


def test_broken_pictures_are_left_out_with_reasons(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    (photos / "empty.png").touch()
    (photos / "text.jpg").write_text("no picture")
    whole = (photos / "7.png").read_bytes()
    (photos / "7.png").write_bytes(whole[: len(whole) // 2])
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "a.png").write_bytes(whole)
    report = update(clip, photos, tmp_path / "idx")
    assert report.pictures == 11
    assert {Path(path).name for path in report.left_out} == {"empty.png", "text.jpg", "7.png", "gone.png"}
    assert "empty" in report.left_out[str(photos / "empty.png")]
    (photos / "7.png").write_bytes(whole)
    report = update(clip, photos, tmp_path / "idx")
    assert (report.added, report.embedded, len(report.left_out)) == (1, 1, 3)


def test_without_any_picture_the_index_stays(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "idx", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="there is no image below"):
        update(clip, empty, out)
    assert not out.exists()
    update(clip, photos, out)
    with pytest.raises(UserError, match="there is no image below"):
        update(clip, empty, out)
    (empty / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"none of 1 pictures can be read .*known format"):
        update(clip, empty, out)
    assert len(ImageIndex.load(out)) == 12
    with pytest.raises(UserError, match="no folder or file"):
        update(clip, tmp_path / "nowhere", out)


def test_another_model_is_refused(make_clip: Callable[..., CLIP], photos: Path, tmp_path: Path) -> None:
    clip, out = make_clip(), tmp_path / "idx"
    clip.save_pretrained(tmp_path / "model")
    other = make_clip()
    with torch.no_grad():
        next(other.heads.text.parameters()).add_(0.01)
    update(tmp_path / "model", photos, out)
    for wrong in (other, make_clip(image="random:test_resnet")):
        with pytest.raises(UserError, match="built with another model"):
            update(wrong, photos, out)
        with pytest.raises(UserError, match="not the model that the index was built with"):
            ImageIndex.load(out, wrong).search("a star")
    # what is the same model: where it lay, a copy of it, the object itself
    expected = ImageIndex.load(out).search("a star")
    shutil.move(tmp_path / "model", tmp_path / "moved")
    with pytest.raises(UserError, match="no longer at"):
        ImageIndex.load(out).search("a star")
    assert ImageIndex.load(out, tmp_path / "moved").search("a star") == expected
    assert ImageIndex.load(out, clip).search("a star") == expected


def test_only_one_writes(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    update(clip, photos, tmp_path / "idx")
    with Store(tmp_path / "idx").writing():
        with pytest.raises(UserError, match="another process is writing"):
            update(clip, photos, tmp_path / "idx")
        assert (
            len(ImageIndex.load(tmp_path / "idx", clip).search("a star", 3)[0]) == 3
        )  # readers need no lock


def test_a_folder_of_something_else_is_left_alone(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="something else than an index"):
        update(clip, photos, photos)
    for name in ("versions/v1.0/notes", "versions/v20240101/notes", "pending/todo", "current/notes"):
        theirs = tmp_path / name.partition("/")[0] / name
        theirs.parent.mkdir(parents=True)
        theirs.write_text("mine")
        with pytest.raises(UserError, match=r"something else than an index|is damaged"):
            update(clip, photos, tmp_path / name.partition("/")[0])
        assert theirs.read_text() == "mine"
        shutil.rmtree(tmp_path / name.partition("/")[0])
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        update(clip, photos, file)
    with pytest.raises(UserError, match="no finished index"):
        ImageIndex.load(photos)
    with pytest.raises(UserError, match="no finished index"):
        ImageIndex.load(tmp_path / "nowhere")


def test_a_damaged_index_is_named(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    update(clip, photos, tmp_path / "idx")
    version = Store(tmp_path / "idx").current()
    assert version is not None
    (version.folder / "image.index").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        ImageIndex.load(tmp_path / "idx")
    manifest = version.folder / "manifest.json"
    whole = json.loads(manifest.read_text())
    for change in ({"source": 5}, {"type": "tree"}, {"width": -1}):
        manifest.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=r"damaged \(manifest\.json holds"):
            ImageIndex.load(tmp_path / "idx")


def test_without_faiss_there_is_one_line(
    clip: CLIP, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install 'clip-lightning\[search\]'"):
        update(clip, photos, tmp_path / "idx")


# being killed


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that is killed at the given one of all changes to the disk; whether it was."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        left = number

        def counted(change: Callable[..., object]) -> Callable[..., object]:
            def counting(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return change(*args, **options)

            return counting

        os.fsync, os.replace, os.mkdir = map(counted, (os.fsync, os.replace, os.mkdir))  # type: ignore[assignment]
        os.unlink, os.rmdir, np.save = map(counted, (os.unlink, os.rmdir, np.save))  # type: ignore[assignment]
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def stand_in(clip: CLIP, folder: Path) -> float:
    """Files where the text tower's would be, in no time."""
    (folder / "text.onnx").write_bytes(b"tower")
    (folder / "tokenizer.json").write_bytes(b"{}")
    return 0.0


def carried(out: Path) -> TextTowerFiles | None:
    """The files of the text tower in the current version, if they are those that were written."""
    version = Store(out).current()
    assert version is not None
    return version.text_tower()


@pytest.mark.parametrize("first", [True, False], ids=["first", "update"])
def test_killed_anywhere_the_index_is_the_old_or_the_new_one(
    clip: CLIP, scenes: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    monkeypatch.setattr(embed, "SHARD_ROWS", 4)
    monkeypatch.setattr(WRITER, stand_in)
    shutil.copy(scenes / "captions.csv", photos)
    captions = (photos / "captions.csv").read_text()
    for number, name in enumerate(sorted(scenes.glob("*.*g"))[:9]):
        captions = captions.replace(name.name, f"{number}.png")
    (photos / "captions.csv").write_text(captions)

    def build(out: Path) -> Report:
        return update(clip, photos, out, batch_size=2, num_workers=1, captions=True)

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
        if Store(out).current() is None:
            assert first
            states.append("none")
        else:
            rows = contents(out)[0]
            assert carried(out) is not None
            states.append("old" if rows == old else "new")
            assert rows in (old, new)
            assert len(ImageIndex.load(out, clip).search("a star", 50)[0]) == len(rows)
        if number % 4 == 0 or states[-1] == "new":
            build(out)
            assert_same(out, tmp_path / "new")
            assert {path.name for path in out.iterdir()} - {".lock"} == {"current", "versions"}
            assert len(list((out / "versions").iterdir())) == 1
    assert number > 15
    assert states == sorted(states, key=lambda state: state == "new")
    assert {*states} == {"none" if first else "old", "new"}


def test_what_a_killed_build_has_done_is_kept(
    clip: CLIP, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "SHARD_ROWS", 4)
    run = embed._run
    calls = 0

    def stopped(clip: CLIP, pixels: list[torch.Tensor]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return run(clip, pixels)

    monkeypatch.setattr(embed, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        update(clip, photos, tmp_path / "idx", batch_size=2)
    with pytest.raises(UserError, match="or finish it"):
        ImageIndex.load(tmp_path / "idx")
    shards = sorted((tmp_path / "idx" / "pending").rglob("*.parquet"))
    assert len(shards) == 2  # four pictures, and the two that were done when it was stopped
    shards[1].write_bytes(b"half")  # a damaged one is made again
    report = update(clip, photos, tmp_path / "idx", batch_size=2)
    assert (report.pictures, report.embedded) == (12, 8)
    update(clip, photos, tmp_path / "fresh", batch_size=2)
    assert_same(tmp_path / "idx", tmp_path / "fresh")


def test_pictures_of_all_modes(clip: CLIP, tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "CMYK", "P"):
        Image.new(mode, (20, 40)).save(tmp_path / f"{mode}.tiff")
    index = ImageIndex.build(clip, tmp_path, tmp_path.with_name(tmp_path.name + "-idx"))
    assert {(hit.width, hit.height) for hit in index.search("a", 9)[0]} == {(20, 40)}
    assert len(index) == 4


# the text tower in the index


@pytest.fixture(scope="module")
def exported(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle `model`, its pictures `photos` and their index `idx`, with its text tower."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    towers = ImageTower.from_name("random:test_vit", 32), TextTower.from_name(f"random:{bert}")
    CLIP(*towers, embed_dim=16).save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for number in range(6):
        draw(0, number, 32).save(folder / "photos" / f"{number}.png")
    report = build_index(folder / "model", folder / "photos", folder / "idx", Options())
    assert report.text_tower == "onnx"
    return folder


@pytest.fixture
def indexed(exported: Path, tmp_path: Path) -> Path:
    """A copy of the index, which a test may spoil."""
    shutil.copytree(exported / "idx", tmp_path / "idx")
    return tmp_path / "idx"


QUERIES = [*SENTENCES, "a", "a red circle 🐶 " * 60, "Ünknown wörds"] * 20


def test_the_text_tower_finds_what_the_model_finds(exported: Path) -> None:
    light = ImageIndex.load(exported / "idx")
    found = light.search(QUERIES, 6)
    assert "clip" not in light.__dict__
    expected = ImageIndex.load(exported / "idx", exported / "model").search(QUERIES, 6)
    for hits, others in zip(found, expected, strict=True):
        assert [hit.path for hit in hits] == [hit.path for hit in others]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in others], abs=1e-5)
    assert light.search([]) == []


def test_a_sentence_needs_neither_torch_nor_the_model(exported: Path, indexed: Path) -> None:
    program = f"""
import sys
from clip_lightning.__main__ import main
assert main(["search", {str(indexed)!r}, "a red circle", "--k", "2"]) == 0
print("LOADED", *[name for name in ("torch", "transformers", "timm", "lightning") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert len(lines) == 2
    assert loaded == "LOADED"


def test_without_onnxruntime_the_model_answers(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ImageIndex.load(exported / "idx").search("a star")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    index = ImageIndex.load(exported / "idx")
    found = index.search("a star")
    assert "clip" in index.__dict__
    assert [hit.path for hit in found[0]] == [hit.path for hit in expected[0]]


def test_an_update_keeps_the_text_tower(
    exported: Path, indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(exported / "photos", tmp_path / "photos")
    monkeypatch.delattr(WRITER)  # it need not be written again
    before = carried(indexed)
    assert before is not None
    block = (before.folder / "text.onnx").stat().st_ino
    assert update(exported / "model", tmp_path / "photos", indexed).text_tower == "onnx"
    after = carried(indexed)
    assert after is not None and after.folder != before.folder
    assert (after.folder / "text.onnx").stat().st_ino == block
    assert update(exported / "model", tmp_path / "photos", indexed, onnx=False).text_tower == "--onnx false"
    assert carried(indexed) is None
    assert ImageIndex.load(indexed).manifest.text_tower is None


@pytest.mark.parametrize("change", [b"another tower", None], ids=["changed", "lost"])
def test_a_damaged_text_tower_is_named_and_mended(
    exported: Path, indexed: Path, change: bytes | None
) -> None:
    files = carried(indexed)
    assert files is not None
    whole = files.digest
    if change is None:
        (files.folder / "text.onnx").unlink()
    else:
        (files.folder / "text.onnx").write_bytes(change)
    with pytest.raises(UserError, match=r"text_tower is damaged; .* mends it"):
        ImageIndex.load(indexed).search("a star")
    assert ImageIndex.load(indexed, exported / "model").search("a star")
    assert update(exported / "model", exported / "photos", indexed).text_tower == "onnx"
    mended = carried(indexed)
    assert mended is not None and mended.folder != files.folder
    assert whole == mended.digest or ImageIndex.load(indexed).search("a star")


def test_a_tower_that_cannot_be_exported_is_left_out(clip: CLIP, photos: Path, tmp_path: Path) -> None:
    assert update(clip, photos, tmp_path / "idx").text_tower == "not in this test"
    assert carried(tmp_path / "idx") is None
    with pytest.raises(UserError, match="--onnx true: not in this test"):
        update(clip, photos, tmp_path / "idx", onnx=True)
