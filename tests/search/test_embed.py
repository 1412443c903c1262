"""Embeddings on disk are the model's own, whoever wrote them and however often they were stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from pyarrow import parquet

from clip_lightning import CLIP, ImageIndex
from clip_lightning.commands.embed import run
from clip_lightning.data.formats import read_captions
from clip_lightning.errors import UserError
from clip_lightning.model import encode
from clip_lightning.search import embed

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(make_clip: Callable[..., CLIP], tmp_path: Path) -> Path:
    return make_clip().save_pretrained(tmp_path / "model")


@pytest.fixture
def images(scenes: Path, tmp_path: Path) -> Path:
    """40 scenes with captions, the 4th of which cannot be decoded."""
    root = shutil.copytree(scenes, tmp_path / "images")
    read_captions(root).images[3].path.write_bytes(b"nothing")
    return root


@pytest.fixture
def stop_at() -> list[int]:
    """The number of the batch at which the command is stopped."""
    return [0]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch, stop_at: list[int]) -> list[int]:
    """The size of each batch that goes through the image tower."""
    sizes: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        for batch in encode.encode_images(*arguments, **options):
            sizes.append(batch.size)
            if len(sizes) == stop_at[0]:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(embed, "encode_images", counted)
    return sizes


def embedded(capsys: Printed, *words: str | Path | int) -> dict[str, Any]:
    capsys.readouterr()
    run(["embed", *map(str, words), "--num_workers", "1", "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".lock"
    }


def test_embeddings_are_the_models_own(bundle: Path, images: Path, tmp_path: Path, capsys: Printed) -> None:
    out = tmp_path / "out"
    words = (bundle, images, "--out", out, "--what", "both", "--shard_size", 16, "--batch_size", 5)
    found = embedded(capsys, *words)
    data = read_captions(images).images
    assert (found["images"], found["captions"]) == (39, 200)
    assert found["shards"] == 3 + 13 and found["width"] == 16
    assert found["broken"] == {str(data[3].path): "not an image of a known format"}
    assert json.loads((out / "broken.json").read_text()) == found["broken"]
    readable = [image for i, image in enumerate(data) if i != 3]
    clip = CLIP.from_pretrained(bundle)
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("images-*-of-00003-*.npy"))])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, clip.embed_images([each.path for each in readable]), atol=1e-5)
    texts = [path.read_text() for path in sorted(out.glob("images-*.jsonl"))]
    lines = [json.loads(line) for line in "".join(texts).splitlines()]
    assert [(line["path"], tuple(line["captions"])) for line in lines] == [
        (str(each.path), each.captions) for each in readable
    ]
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("captions-*-of-00013-*.npy"))])
    texts = [caption for image in data for caption in image.captions]
    np.testing.assert_allclose(vectors, clip.embed_texts(texts), atol=1e-5)
    assert ImageIndex.load(out).search("a star")[0]  # what was embedded can be searched
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-*")}
    assert embedded(capsys, *words)["embedded"] == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*-*")}.items()


def test_parquet_has_all_in_one_file(bundle: Path, images: Path, tmp_path: Path, capsys: Printed) -> None:
    words = (bundle, images, "--out", tmp_path / "out")
    embedded(capsys, *words, "--format", "parquet", "--what", "both", "--shard_size", 25)
    [first] = (tmp_path / "out").glob("images-00000-of-00002-*.parquet")
    table = parquet.read_table(first)
    assert {"path", "captions", "embedding"} <= {*table.column_names} and len(table) == 24
    clip = CLIP.from_pretrained(bundle)
    vectors = np.array(table["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, clip.embed_images(table["path"].to_pylist()), atol=1e-5)
    [last] = (tmp_path / "out").glob("captions-00007-of-00008-*.parquet")
    texts = parquet.read_table(last)
    assert texts.column_names == ["path", "caption", "embedding"] and len(texts) == 25
    vectors = np.array(texts["embedding"].to_pylist())
    np.testing.assert_allclose(vectors, clip.embed_texts(texts["caption"].to_pylist()), atol=1e-5)
    found = ImageIndex.load(tmp_path / "out", clip).search_by_image(table["path"][0].as_py(), 1)
    assert str(found[0][0].path) == table["path"][0].as_py()
    # one part holds nothing but a broken image, and nothing is embedded for another division
    again = embedded(capsys, *words, "--shard_size", 1)
    assert (again["embedded"], len(again["broken"])) == (0, 1)
    tables = [parquet.read_table(file) for file in (tmp_path / "out").glob("images-*.parquet")]
    assert sorted(len(table) for table in tables) == [0] + [1] * 39
    assert all(each.schema.equals(table.schema) for each in tables)


def test_several_processes_write_what_one_does(
    bundle: Path,
    images: Path,
    tmp_path: Path,
    capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
    batches: list[int],
) -> None:
    words = (bundle, images, "--what", "both", "--shard_size", "16", "--batch_size", "5", "--out")
    embedded(capsys, *words, tmp_path / "one")
    one, out = files(tmp_path / "one"), tmp_path / "two"
    out.mkdir()
    # a helper that torchrun started leaves the part that another one is embedding, and publishes nothing
    batches.clear()
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with FileLock(out / ".images-00001-of-00003.lock"):
        run(["embed", *map(str, words), str(out), "--json"])
    assert not capsys.readouterr().out and not (out / "manifest.json").exists()
    assert sum(batches) == 24 and len({*out.glob("*.npy")}) == 15
    monkeypatch.undo()
    assert embedded(capsys, *words, out)["embedded"] == 16
    assert files(out) == one
    command = [sys.executable, "-m", "clip_lightning", "embed", *map(str, words), str(tmp_path / "three")]
    done = subprocess.run([*command, "--devices", "2", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["captions"] == 200
    assert files(tmp_path / "three") == one


def test_a_stopped_command_resumes(
    bundle: Path,
    images: Path,
    tmp_path: Path,
    capsys: Printed,
    batches: list[int],
    stop_at: list[int],
) -> None:
    words = (bundle, images, "--shard_size", 8, "--batch_size", 4, "--out")
    embedded(capsys, *words, tmp_path / "whole")
    out = tmp_path / "out"
    batches.clear()
    stop_at[0] = 6  # in the middle of the third of five parts
    with pytest.raises(KeyboardInterrupt):
        embedded(capsys, *words, out)
    stop_at[0] = 0
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


def test_another_model_or_precision_is_refused_and_other_data_is_embedded(
    bundle: Path, images: Path, make_clip: Callable[..., CLIP], tmp_path: Path, capsys: Printed
) -> None:
    out = tmp_path / "out"
    embedded(capsys, bundle, images, "--out", out)
    before = files(out)
    other = make_clip(embed_dim=8).save_pretrained(tmp_path / "other")
    for words in ((other, images, "--out", out), (bundle, images, "--out", out, "--precision", "bf16-mixed")):
        with pytest.raises(UserError, match=r"another model or precision \(.*, 32-true\)"):
            embedded(capsys, *words)
    assert files(out) == before
    copy = shutil.copytree(bundle, tmp_path / "copy")  # the same model
    data = read_captions(images).images
    data[0].path.write_bytes(data[1].path.read_bytes())
    data[5].path.unlink()
    assert embedded(capsys, copy, images, "--out", out)["images"] == 38
    near = embedded(capsys, bundle, images, "--out", tmp_path / "bf16", "--precision", "bf16-mixed")
    assert near["images"] == 38


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("M D --out O --shard_size 0", "--shard_size 0"),
        ("M D --out O --batch_size 0", "--batch_size 0"),
        ("M D --out D", "contains something other than embeddings"),
        ("M D --out D/captions.csv", "cannot be written"),
        ("M D --out D/captions.csv/o", "cannot be written"),
        ("M nothing --out O", "no folder or file nothing"),
        ("M U --out O --what captions", "has no readable captions"),
        ("D D --out O", "is not a clip-lightning bundle"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    bundle: Path, images: Path, tmp_path: Path, words: str, said: str
) -> None:
    shutil.copytree(images, tmp_path / "u", ignore=shutil.ignore_patterns("*.csv"))
    places = {"M": bundle, "D": images, "O": tmp_path / "o", "U": tmp_path / "u"}
    places |= {name: images / name[2:] for name in ("D/captions.csv", "D/captions.csv/o")}
    with pytest.raises(UserError, match=said):
        run(["embed", *(str(places.get(word, word)) for word in words.split())])
    assert not (tmp_path / "o").exists()
