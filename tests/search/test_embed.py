"""Embeddings on disk are the model's own, whoever wrote them and however often they were stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_lightning import CLIP, ImageIndex
from clip_lightning.commands.embed import run
from clip_lightning.data.formats import read_captions
from clip_lightning.errors import UserError
from clip_lightning.model import encode
from clip_lightning.search import build
from clip_lightning.search.folder import as_int8, from_int8

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def images(scenes: Path, tmp_path: Path) -> Path:
    """40 scenes with captions, the 4th of which cannot be decoded."""
    root = shutil.copytree(scenes, tmp_path / "images")
    read_captions(root).images[3].path.write_bytes(b"nothing")
    return root


def embedded(capsys: Printed, *words: str | Path | int) -> dict[str, Any]:
    capsys.readouterr()
    run(["embed", *map(str, words), "--num_workers", "1", "--json=true"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"
    }


def stored(out: Path, kind: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows and the vectors of one kind, as other programs read them."""
    lines = [line for file in sorted(out.glob(f"{kind}-*.jsonl")) for line in file.read_bytes().splitlines()]
    vectors = np.concatenate([np.load(file) for file in sorted(out.glob(f"{kind}-*.npy"))])
    assert vectors.dtype in (np.float32, np.int8)
    return [json.loads(line) for line in lines], vectors


def test_embeddings_are_the_models_own(bundle: Path, images: Path, tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "out"
    words = (bundle, images, "--out", out, "--what", "both", "--batch_size", 5)
    found = embedded(capsys, *words, "--shard_size", 16)
    data = read_captions(images).images
    assert (found["images"], found["captions"], found["shards"], found["width"]) == (39, 200, 3 + 13, 16)
    assert found["broken"] == {str(data[3].path): "not an image of a known format"}
    assert json.loads((out / "broken.json").read_text()) == found["broken"]
    readable = [image for image in data if image is not data[3]]
    clip = CLIP.from_pretrained(bundle)
    rows, vectors = stored(out, "images")
    np.testing.assert_allclose(vectors, clip.embed_images([image.path for image in readable]), atol=1e-5)
    assert [(row["path"], tuple(row["captions"])) for row in rows] == [
        (str(image.path), image.captions) for image in readable
    ]
    rows, vectors = stored(out, "captions")
    texts = [caption for image in data for caption in image.captions]
    assert [row["caption"] for row in rows] == texts
    np.testing.assert_allclose(vectors, clip.embed_texts(texts), atol=1e-5)
    # what was embedded can be searched
    assert ImageIndex.load(out).search_by_image(data[5].path, 1)[0][0].path == data[5].path
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-*")}
    assert embedded(capsys, *words)["embedded"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*-*")}
    # one part holds nothing but a broken image, and nothing is embedded for another division
    again = embedded(capsys, *words, "--shard_size", 1)
    assert (again["embedded"], again["shards"], len(again["broken"])) == (0, 240, 1)
    assert len(stored(out, "images")[0]) == 39


def test_a_stopped_command_resumes(
    bundle: Path, images: Path, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    stop_at = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        for batch in encode.encode_images(*arguments, **options):
            batches.append(batch.size)
            if len(batches) == stop_at:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(build, "encode_images", counted)
    words = (bundle, images, "--shard_size", 8, "--batch_size", 4, "--out")
    embedded(capsys, *words, tmp_path / "whole")
    out = tmp_path / "out"
    batches.clear()
    stop_at = 6  # in the middle of the third of five parts
    with pytest.raises(KeyboardInterrupt):
        embedded(capsys, *words, out)
    stop_at = 0
    assert not json.loads((out / "manifest.json").read_text())["finished"]
    with pytest.raises(UserError, match="no finished index"):
        ImageIndex.load(out)
    assert len([*out.glob("*.npy")]) == 3
    (out / ".images-00002-of-00005.npy.1.tmp").write_bytes(b"half")
    next(out.glob("images-00001-*.npy")).write_bytes(b"damaged")
    (out / "mine").mkdir()
    (out / "mine" / ".lecture.tmp").touch()
    batches.clear()
    embedded(capsys, *words, out)
    assert batches == [1, *[4] * 7]  # the broken image, the damaged part, half of the third, and the others
    assert files(out) == files(tmp_path / "whole")
    assert (out / "mine" / ".lecture.tmp").exists()


def test_another_precision_is_refused(bundle: Path, images: Path, tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "out"
    embedded(capsys, bundle, images, "--out", out)
    before = files(out)
    near = ("--precision", "bf16-mixed")
    for other in (near, ("--dims", 8), ("--dtype", "int8")):
        with pytest.raises(UserError, match=r"another model, .*dims or dtype \(.*, 32-true, 16, float32\)"):
            embedded(capsys, bundle, images, "--out", out, *other)
    assert files(out) == before
    assert embedded(capsys, bundle, images, "--out", tmp_path / "bf16", *near)["images"] == 39


def test_short_vectors_and_int8_take_less_space(
    bundle: Path, images: Path, tmp_path: Path, capsys: Printed
) -> None:
    words = (bundle, images, "--what", "both", "--shard_size", 16, "--out")
    for dims, dtype in ((4, "float32"), (16, "int8"), (4, "int8")):
        out = tmp_path / f"{dims}-{dtype}"
        assert embedded(capsys, *words, out, "--dims", dims, "--dtype", dtype)["width"] == dims
        sizes = sum(np.load(file).nbytes for file in out.glob("*.npy"))
        assert sizes == (39 + 200) * dims * (4 if dtype == "float32" else 1)
        before = files(out)
        # the folder remembers both, and what is embedded is reused exactly
        assert embedded(capsys, bundle, images, "--out", out, "--shard_size", 1)["embedded"] == 0
        assert embedded(capsys, *words, out)["embedded"] == 0 and files(out) == before
        with pytest.raises(UserError, match=rf"\(.*, 32-true, {dims}, {dtype}\)"):
            embedded(capsys, *words, out, "--dims", 2)
        clip = CLIP.from_pretrained(bundle).with_dims(dims)
        index, path = ImageIndex.load(out), stored(out, "images")[0][0]["path"]
        for query in ("a star", clip.embed_texts("a star")):
            scores = {hit.path: hit.score for hit in index.search(query, 39)[0]}
            exact = (clip.embed_images([*scores]) @ clip.embed_texts("a star").T).flatten().tolist()
            assert [*scores.values()] == pytest.approx(exact, abs=1e-5 if dtype == "float32" else 0.02)
        assert index.search_by_image(path, 1)[0][0].score > 0.999
        with pytest.raises(UserError, match=rf"expected \(queries, {dims}\)"):
            index.search(np.zeros((1, 3)))


def test_a_cut_model_is_the_model_of_its_short_index(
    bundle: Path, images: Path, tmp_path: Path, capsys: Printed
) -> None:
    cut = CLIP.from_pretrained(bundle).with_dims(4).save_pretrained(tmp_path / "cut")
    embedded(capsys, bundle, images, "--out", tmp_path / "out", "--dims", 4)
    assert embedded(capsys, cut, images, "--out", tmp_path / "out")["embedded"] == 0
    found = ImageIndex.load(tmp_path / "out", cut).search("a star")
    assert found == ImageIndex.load(tmp_path / "out", bundle).search("a star")
    with pytest.raises(UserError, match="--dims 5: expected a number from 1 to 4"):
        embedded(capsys, cut, images, "--out", tmp_path / "new", "--dims", 5)


def test_int8_rounds_to_the_nearest_and_is_read_as_unit_vectors() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    rows[:3] = np.eye(7)[:3]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    integers, largest = as_int8(rows), np.abs(rows).max(axis=1, keepdims=True)
    assert integers.dtype == np.int8 and (np.abs(integers).max(axis=1) == 127).all()
    assert (np.abs(integers / 127 * largest - rows) <= largest / 254 + 1e-7).all()
    again = from_int8(integers)
    assert np.linalg.norm(again, axis=1) == pytest.approx(np.ones(200))
    assert np.array_equal(as_int8(again), integers)
