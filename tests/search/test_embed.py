"""`embed`: the model's own embeddings, the same for one process, two, or one that was stopped.

Run as a program, this file is the command: Lightning starts it again for the second process.
"""

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
from pyarrow import parquet

from clip_lightning import CLIP
from clip_lightning.commands.embed import run
from clip_lightning.data.formats import read_captions
from clip_lightning.errors import UserError
from clip_lightning.search.predict import Embedder

Printed = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(make_clip: Callable[..., CLIP], tmp_path: Path) -> Path:
    return make_clip().save_pretrained(tmp_path / "model")


@pytest.fixture
def pictures(scenes: Path, tmp_path: Path) -> Path:
    """40 scenes with captions, the 4th of which cannot be read."""
    root = shutil.copytree(scenes, tmp_path / "pictures")
    read_captions(root).images[3].path.write_bytes(b"nothing")
    return root


def embedded(capsys: Printed, *words: str | Path | int) -> dict[str, Any]:
    capsys.readouterr()
    run(["embed", *map(str, words), "--num_workers", "0", "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"
    }


def test_embeddings_are_the_models_own(bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed):
    out = tmp_path / "out"
    words = (bundle, pictures, "--out", out, "--what", "both", "--shard_size", 16, "--batch_size", 5)
    found = embedded(capsys, *words)
    assert (found["images"], found["captions"], found["broken"]) == (39, 200, 1)
    assert found["shards"] == 3 + 13 and found["width"] == 16
    images = read_captions(pictures).images
    readable = [image for i, image in enumerate(images) if i != 3]
    clip = CLIP.from_pretrained(bundle)
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("images-*-of-00003.npy"))])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, clip.embed_images([each.path for each in readable]), atol=1e-5)
    lines = [
        json.loads(line)
        for path in sorted(out.glob("images-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert lines == [{"path": str(each.path), "captions": list(each.captions)} for each in readable]
    texts = [caption for image in images for caption in image.captions]
    vectors = np.concatenate([np.load(path) for path in sorted(out.glob("captions-*-of-00013.npy"))])
    np.testing.assert_allclose(vectors, clip.embed_texts(texts), atol=1e-5)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["finished"] and manifest["shards"]["images-00000-of-00003"]["rows"] == 15
    assert json.loads((out / "broken.json").read_text()) == {
        str(images[3].path): "not a picture of a known format"
    }
    assert not (out / "progress").exists()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    again = embedded(capsys, *words)
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*.npy")}


def test_parquet_has_all_in_one_file(bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed):
    out = tmp_path / "out"
    words = (bundle, pictures, "--out", out, "--format", "parquet", "--what", "both", "--shard_size", 25)
    embedded(capsys, *words)
    first = parquet.read_table(out / "images-00000-of-00002.parquet")
    assert first.column_names == ["path", "captions", "embedding"] and len(first) == 24
    clip = CLIP.from_pretrained(bundle)
    vectors = np.array(first["embedding"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, clip.embed_images(first["path"].to_pylist()), atol=1e-5)
    texts = parquet.read_table(out / "captions-00007-of-00008.parquet")
    assert texts.column_names == ["path", "caption", "embedding"] and len(texts) == 25
    np.testing.assert_allclose(
        np.array(texts["embedding"].to_pylist()), clip.embed_texts(texts["caption"].to_pylist()), atol=1e-5
    )


@pytest.mark.slow
def test_parquet_of_nothing_but_broken_pictures_has_the_same_columns(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed
):
    out = tmp_path / "out"
    embedded(capsys, bundle, pictures, "--out", out, "--format", "parquet", "--shard_size", 1)
    tables = [parquet.read_table(file) for file in sorted(out.glob("*.parquet"))]
    assert [len(table) for table in tables].count(0) == 1
    assert all(table.schema.equals(tables[0].schema) for table in tables)


def test_two_processes_write_what_one_does(bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed):
    options = ("--what", "both", "--shard_size", "16", "--batch_size", "5")
    embedded(capsys, bundle, pictures, "--out", tmp_path / "one", *options)
    words = ["embed", bundle, pictures, "--out", tmp_path / "two", *options, "--devices", "2", "--json"]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words), "--num_workers", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["captions"], found["broken"]) == (39, 200, 1)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys() and len([name for name in one if name.endswith(".npy")]) == 16
    for name, content in one.items():
        assert two[name] == content, name


def test_a_stopped_command_goes_on(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
):
    words = (bundle, pictures, "--shard_size", 8, "--batch_size", 4, "--out")
    embedded(capsys, *words, tmp_path / "whole")
    out = tmp_path / "out"
    predict, seen = Embedder.predict_step, []

    def step(self: Embedder, batch: Any, batch_idx: int) -> Any:
        seen.append(batch["shard"])
        if len(seen) == 6:  # in the middle of the third of five shards
            raise RuntimeError("killed")
        return predict(self, batch, batch_idx)

    monkeypatch.setattr(Embedder, "predict_step", step)
    with pytest.raises(RuntimeError, match="killed"):
        embedded(capsys, *words, out)
    assert seen == [0, 0, 1, 1, 2, 2]
    assert {path.name for path in out.glob("*.npy")} == {f"images-0000{i}-of-00005.npy" for i in (0, 1)}
    assert not json.loads((out / "manifest.json").read_text())["finished"]
    (out / ".images-00002-of-00005.npy.1.tmp").write_bytes(b"half")
    (out / "images-00001-of-00005.npy").write_bytes(b"damaged")
    monkeypatch.setattr(
        Embedder, "predict_step", lambda *args: seen.append(args[1]["shard"]) or predict(*args)
    )
    seen.clear()
    embedded(capsys, *words, out)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4]
    assert files(out) == files(tmp_path / "whole")


def test_another_model_data_or_setting_is_refused(
    bundle: Path, pictures: Path, make_clip: Callable[..., CLIP], tmp_path: Path, capsys: Printed
):
    out = tmp_path / "out"
    embedded(capsys, bundle, pictures, "--out", out)
    (out / "mine").mkdir()
    (out / "mine" / ".lecture.tmp").touch()
    before = files(out)
    other = make_clip(embed_dim=8).save_pretrained(tmp_path / "other")
    copy = shutil.copytree(bundle, tmp_path / "copy")
    embedded(capsys, copy, pictures, "--out", out)  # the same model, elsewhere
    with pytest.raises(UserError, match="holds embeddings of another model"):
        embedded(capsys, other, pictures, "--out", out)
    with pytest.raises(UserError, match=r"other settings \(shard_size 4096, not 7\)"):
        embedded(capsys, bundle, pictures, "--out", out, "--shard_size", 7)
    read_captions(pictures).images[0].path.write_bytes(b"something else")
    with pytest.raises(UserError, match="other data, or data that has changed"):
        embedded(capsys, bundle, pictures, "--out", out)
    assert {name: content for name, content in files(out).items() if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert (out / "mine" / ".lecture.tmp").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("M D --out O --shard_size 0", "--shard_size 0"),
        ("M D --out O --batch_size 0", "--batch_size 0"),
        ("M D --out O --devices 0", "--devices 0"),
        ("M D --out D", "holds something else than embeddings"),
        ("M D --out D/captions.csv", "is a file"),
        ("M D --out D/captions.csv/o", "cannot be written"),
        ("M nothing --out O", "no folder or file nothing"),
        ("M D/images --out O --what captions", "has no captions"),
        ("D D --out O", "no clip-lightning bundle"),
    ],
)
def test_mistakes(bundle: Path, pictures: Path, tmp_path: Path, words: str, said: str):
    folder = read_captions(pictures).images[0].path.parent
    places = {"M": bundle, "D": pictures, "O": tmp_path / "o"}
    places |= {"D/captions.csv": pictures / "captions.csv", "D/images": folder}
    places["D/captions.csv/o"] = pictures / "captions.csv" / "o"
    if folder == pictures and "D/images" in words:
        (pictures / "captions.csv").unlink()
    with pytest.raises(UserError, match=said):
        run(["embed", *(str(places.get(word, word)) for word in words.split())])
    assert not (tmp_path / "o").exists()


def test_one_writer_at_a_time(bundle: Path, pictures: Path, tmp_path: Path, capsys: Printed):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another process is writing"):
        embedded(capsys, bundle, pictures, "--out", tmp_path / "out")


if __name__ == "__main__":
    run(sys.argv[1:])
