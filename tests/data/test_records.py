"""Captioned images from Python are read like files, in whatever form people hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_lightning import CLIP, CaptionDataModule
from clip_lightning.data.formats import read_captions
from clip_lightning.errors import UserError


@pytest.fixture
def rows(scenes: Path) -> list[tuple[Path, tuple[str, ...], str | None]]:
    return [(image.path, image.captions, image.split) for image in read_captions(scenes).images]


@pytest.fixture
def data(
    make_clip: Callable[..., CLIP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clip = make_clip()

    def read(records: Any, **options: Any) -> CaptionDataModule:
        module = CaptionDataModule(
            clip.transform,
            clip.tokenize,
            records=records,
            batch_size=8,
            num_workers=0,
            cache="off",
            **options,
        )
        module.prepare_data()
        module.setup("fit")
        return module

    return read


FORMS: dict[str, Callable[[Path], Any]] = {
    "name": str,
    "bytes": Path.read_bytes,
    "PIL": Image.open,
    "array": lambda path: np.array(Image.open(path)),
    "tensor": lambda path: torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form_equal_the_files(form: str, rows: list[Any], data: Callable[..., Any]) -> None:
    records = [(FORMS[form](path), captions, split) for path, captions, split in rows]
    module = data(records)
    for split in ("train", "val", "test"):
        wanted = [(path, captions) for path, captions, named in rows if named == split]
        assert [image.captions for image in module.images(split)] == [captions for _, captions in wanted]
        for image, (path, _) in zip(module.images(split), wanted, strict=True):
            assert np.array_equal(np.array(Image.open(image.path)), np.array(Image.open(path)))
    assert len(next(iter(module.train_dataloader()))["image_id"]) == 8
    assert data(records).root == module.root  # nothing is written again
    assert "records" not in module.options, "loggers would record all captions"


class Pairs(torch.utils.data.Dataset[tuple[Image.Image, str]]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Image.Image, str]:
        path, captions, _ = self.rows[row]
        return Image.open(path), captions[0]


def test_data_sets_tables_and_splits(rows: list[Any], data: Callable[..., Any]) -> None:
    table = [{"file_name": str(path), "text": captions[0], "split": split} for path, captions, split in rows]
    expected = [len(data(rows).images(split)) for split in ("train", "val", "test")]
    for records in (pd.DataFrame(table), table, iter(table)):
        module = data(records)
        assert [len(module.images(split)) for split in ("train", "val", "test")] == expected
    module = data({"train": Pairs(rows[:20]), "val": Pairs(rows[20:30])})
    assert [len(module.images(split)) for split in ("train", "val", "test")] == [20, 10, 0]
    drawn = data(Pairs(rows))  # without splits, they are drawn as for files
    assert sum(len(drawn.images(split)) for split in ("train", "val", "test")) == 40


def test_a_hugging_face_data_set(rows: list[Any], data: Callable[..., Any]) -> None:
    datasets = pytest.importorskip("datasets")
    table = {"image": [str(path) for path, _, _ in rows], "caption": [texts[0] for _, texts, _ in rows]}
    held = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    assert sum(len(data(held).images(split)) for split in ("train", "val", "test")) == 40


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([("a.png", 3)], "record 0: expected .image, captions."),
        ([7], "record 0: expected .image, captions."),
        ([{"image": "a.png"}], "records has no caption column"),
        ([], "no usable image with a caption"),
    ],
)
def test_invalid_records_are_one_line(records: Any, said: str, data: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=said):
        data(records)


def test_broken_and_missing_images_are_counted(rows: list[Any], data: Callable[..., Any]) -> None:
    records = [*rows, (b"nothing", "a", "train"), ("gone.png", "b", "train"), (3.0, "c", "train")]
    with pytest.raises(UserError, match=r"3 of 43 images or rows.*max_broken"):
        data(records)
