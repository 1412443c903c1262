"""Data sets of classes by name, those of `datasets`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_lightning import CLIP
from clip_lightning.__main__ import main
from clip_lightning.data.classes import find_classes
from clip_lightning.data.images import BrokenImage, to_pixels
from clip_lightning.errors import UserError
from clip_lightning.model.encode import Encoded, encode_images

Printed = pytest.CaptureFixture[str]
CLASSES = ["airplane", "big_cat", "ship"]


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


def test_evaluated_by_name(bundle: Path, tmp_path: Path, capsys: Printed):
    labels = [0, 1, 2, 1]
    place = f"hf:{hub_folder(tmp_path / 'hub', {'train': [0, 1, 2, 0, 1, 2], 'test': labels})}"
    assert main(["evaluate", "zero-shot", str(bundle), place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["images"], found["classes"]) == ("test", 4, 3)
    folder = tmp_path / "as_files"
    for row, label in enumerate(labels):
        file = folder / CLASSES[label] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(row)["bytes"])
    assert main(["evaluate", "zero-shot", str(bundle), str(folder), "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    for name in ("zero_shot_top1", "zero_shot_top5", "expected_calibration_error"):
        assert same[name] == pytest.approx(found[name], abs=1e-4)
    assert main(["evaluate", "linear-probe", str(bundle), place, "--shots", "1", "--json"]) == 0
    probed = json.loads(capsys.readouterr().out)
    assert (probed["train_images"], probed["test_images"]) == (6, 4)


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
