"""Data sets of classes by name: torchvision's, from an archive in its own format, and those of `datasets`."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from clip_lightning import CLIP
from clip_lightning.__main__ import main
from clip_lightning.data.classes import TORCHVISION, find_classes
from clip_lightning.data.images import BrokenImage, to_pixels
from clip_lightning.errors import UserError
from clip_lightning.model.encode import Encoded, encode_images

Printed = pytest.CaptureFixture[str]
CLASSES = ["airplane", "big_cat", "ship"]
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)


def cifar_archive(folder: Path) -> dict[str, str]:
    """`cifar-10-python.tar.gz` with 4 pictures in each of its six batches; name → MD5 of what is in it."""

    def batch(number: int) -> dict[str, Any]:
        rows = range(4 * number, 4 * number + 4)
        return {"data": PIXELS[rows].reshape(4, -1), "labels": [row % 3 for row in rows]}

    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    content = {name: pickle.dumps(batch(number)) for number, name in enumerate(names)}
    content["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return {name: hashlib.md5(data).hexdigest() for name, data in content.items()}


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Torchvision's CIFAR-10, with a smaller archive on a server of this machine; what it was asked for."""
    served = tmp_path / "served"
    served.mkdir()
    digests = cifar_archive(served)
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    handler = partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kind = torchvision.datasets.CIFAR10
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
        archive = (served / "cifar-10-python.tar.gz").read_bytes()
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive).hexdigest())
        batches = [[name, digests[name]] for name in digests if name != "batches.meta"]
        monkeypatch.setattr(kind, "train_list", batches[:-1])
        monkeypatch.setattr(kind, "test_list", batches[-1:])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digests["batches.meta"]})
        yield asked
        server.shutdown()


def test_a_torchvision_data_set(
    cifar: list[str], tmp_path: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
        with pytest.raises(UserError, match=r"cannot be downloaded .*File not found or corrupted\)"):
            find_classes("torchvision:CIFAR10", tmp_path / "cache")
        patched.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/nobody-listens.tar.gz")
        with pytest.raises(UserError, match=r"cannot be downloaded .*refused.*; check the network"):
            find_classes("torchvision:CIFAR10", tmp_path / "cache")
    assert not (tmp_path / "cache" / "torchvision-CIFAR10").exists()
    found = find_classes("torchvision:CIFAR10", tmp_path / "cache")
    assert found.classes == tuple(CLASSES) and len(found.images) == 24
    assert found.splits == ("train",) * 20 + ("test",) * 4
    assert found.labels == tuple(row % 3 for row in range(24))
    for row in (0, 7, 23):
        assert torch.equal(to_pixels(found.images[row]), torch.from_numpy(PIXELS[row]))
    assert found.images[23].name == "torchvision:CIFAR10 test 3"
    assert capsys.readouterr().out == ""
    asked = len(cifar)
    find_classes("torchvision:CIFAR10", tmp_path / "cache")
    assert len(cifar) == asked > 0, "it was downloaded again"


def test_evaluated_by_name(cifar: list[str], bundle: Path, tmp_path: Path, capsys: Printed):
    words = [str(bundle), "torchvision:CIFAR10", "--data_cache", str(tmp_path / "cache"), "--json"]
    assert main(["evaluate", "zero-shot", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"], found["classes"]) == ("test", 4, 3)
    folder = tmp_path / "as_files"
    for row in range(20, 24):
        file = folder / CLASSES[row % 3] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[row].transpose(1, 2, 0)).save(file)
    assert main(["evaluate", "zero-shot", str(bundle), str(folder), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    for name in ("zero_shot_top1", "zero_shot_top5", "expected_calibration_error"):
        assert same[name] == pytest.approx(found[name], abs=1e-4)
    assert main(["evaluate", "linear-probe", *words, "--shots", "1"]) == 0
    probed = json.loads(capsys.readouterr().out)
    assert (probed["train_images"], probed["test_images"]) == (20, 4)


def test_the_table_matches_torchvision(tmp_path: Path):
    """Every set of the table is one of torchvision, and takes these arguments: it looks for its files."""
    for name, splits in TORCHVISION.items():
        for number, options in enumerate(splits.values()):
            with pytest.raises((RuntimeError, FileNotFoundError)):
                getattr(torchvision.datasets, name)(tmp_path / f"{name}{number}", **options)


# Hugging Face ---------------------------------------------------------------------------------------------


def png(number: int) -> dict[str, Any]:
    data = io.BytesIO()
    Image.new("RGB", (20, 30), (10 * number, 0, 255 - 10 * number)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def hub_folder(folder: Path, parts: dict[str, list[int]]) -> Path:
    """A folder of `save_to_disk`; row i of a split has picture i and the class given for it."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    types = datasets.Image(), datasets.ClassLabel(names=CLASSES), datasets.Value("string")
    features = datasets.Features(zip(("photo", "kind", "note"), types, strict=True))

    def part(labels: list[int]) -> Any:
        pictures = [png(i) for i in range(len(labels))]
        columns = {"photo": pictures, "kind": labels, "note": ["x"] * len(labels)}
        return datasets.Dataset.from_dict(columns, features=features)

    datasets.DatasetDict({name: part(labels) for name, labels in parts.items()}).save_to_disk(str(folder))
    return folder


def test_a_folder_of_datasets(tmp_path: Path, make_clip: Callable[..., CLIP], capsys: Any):
    folder = hub_folder(tmp_path / "hub", {"train": [0, 1, 2], "validation": [2, 1], "extra": [0]})
    found = find_classes(f"hf:{folder}")
    assert "left out the splits extra" in capsys.readouterr().err
    assert found.classes == tuple(CLASSES) and found.labels == (0, 1, 2, 2, 1)
    assert found.splits == ("train",) * 3 + ("val",) * 2
    pixels = to_pixels(found.images[4])
    assert pixels.shape == (3, 30, 20) and pixels[:, 0, 0].tolist() == [10, 0, 245]
    assert found.images[4].name == f"hf:{folder} validation 1"
    clip = make_clip().eval()
    (tmp_path / "one.png").write_bytes(png(1)["bytes"])
    images = [found.images[4], tmp_path / "one.png"]
    features = Encoded.join(encode_images(clip.image_tower, images)).features
    assert torch.equal(features[0], features[1])


def test_hidden_labels_and_broken_images(tmp_path: Path):
    folder = hub_folder(tmp_path / "hub", {"train": [0, 1, 2], "test": [-1, -1]})
    found = find_classes(f"hf:{folder}")
    assert found.splits == ("train",) * 3 and found.left_out == {"2 images of test": "they have no class"}
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": b"nothing", "path": None}, None, png(1)], "label": [0, 1, 1]}
    types = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(types))
    table.save_to_disk(str(tmp_path / "broken"))
    found = find_classes(f"hf:{tmp_path / 'broken'}")
    assert found.splits == (None,) * 3, "all in train means not split"
    for row, reason in enumerate(("not an image", "it has no image")):
        with pytest.raises(BrokenImage, match=reason):
            to_pixels(found.images[row])


def test_missing_columns(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "texts"))
    said = r"has the columns .*'text': 'Value'.*expected one column of the type Image"
    with pytest.raises(UserError, match=said):
        find_classes(f"hf:{tmp_path / 'texts'}")
    with pytest.raises(UserError, match="has 1 classes with images; expected two or more"):
        find_classes(f"hf:{hub_folder(tmp_path / 'one', {'train': [1, 1]})}")
