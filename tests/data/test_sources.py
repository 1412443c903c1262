"""Which data `--data.root` and `records` name, and what is refused before anything is fetched."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from clip_lightning import CLIP, CaptionDataModule
from clip_lightning.data.features import CacheOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.readers import ReadOptions
from clip_lightning.data.sources import Archive, Artifact, Folder, HubDataset, Scenes, find_source, names_tars
from clip_lightning.errors import UserError
from clip_lightning.files import make_once
from clip_lightning.wandb_fetch import ArtifactName

MakeClip = Callable[..., CLIP]


def test_names_of_sources_unless_the_path_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("photos/captions.csv") == find_source(Path("photos/captions.csv"))
    assert find_source("c:/photos") == Folder(Path("c:/photos"))
    assert find_source("hf:me/data:sub@v1") == HubDataset("me/data", "sub", "v1")
    assert find_source("wandb:me/p/data:v3") == Artifact(ArtifactName("me", "p", "data", "v3"))
    url = "https://a.example/x.zip"
    assert find_source(f"{url}#sha256={'A' * 64}") == Archive(url, "a" * 64)
    assert find_source("scenes:drawn") == Scenes(Path("drawn")) and isinstance(find_source("scenes"), Scenes)
    for name in ("hf:me", "scenes", "photos.tar"):
        (tmp_path / name).mkdir()
        assert find_source(name) == Folder(Path(name)) and not names_tars(name)
    tars = ["s3://x/y", "https://x/00000.tar?key=z", "file:///x", "x/{00..09}.tar", "x/0.tar.gz"]
    assert all(map(names_tars, tars))
    others = [f"{url}#sha256=00", f"{url}?key=a.tar", "x", "hf:me/data", "wandb:a/b/c", None]
    assert not any(map(names_tars, others))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: ReadOptions(max_broken=-1), r"--data\.read\.max_broken -1: expected a fraction"),
        (lambda: CacheOptions(gigabytes=-1), r"--data\.cache_options\.gigabytes -1: expected 0 or more"),
        (lambda: CacheOptions(views=0), r"--data\.cache_options\.views 0: expected 1 or more"),
        (lambda: make_once(Path(__file__) / "a", Path), r"data cannot be written to .*; free some space"),
    ],
)
def test_invalid_options_are_one_line(make: Callable[[], object], line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.fixture
def data(make_clip: MakeClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Reads data as `fit` does, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clip = make_clip()

    def read(records: Any = None, **options: Any) -> CaptionDataModule:
        options = {"batch_size": 8, "num_workers": 0, "cache": "off", **options}
        module = CaptionDataModule(clip.transform, clip.tokenize, records=records, **options)
        module.prepare_data()
        module.setup("fit")
        return module

    return read


# Data from Python ---------------------------------------------------------------------------------------


@pytest.fixture
def rows(scenes: Path) -> list[tuple[Path, tuple[str, ...], str | None]]:
    return [(image.path, image.captions, image.split) for image in read_captions(scenes).images]


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
        for image, (path, captions) in zip(module.images(split), wanted, strict=True):
            assert image.captions == captions
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
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(path) for path, _, _ in rows], "caption": [texts[0] for _, texts, _ in rows]}
    held = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for records in (Pairs(rows), held):  # without splits, they are drawn as for files
        drawn = data(records)
        assert sum(len(drawn.images(split)) for split in ("train", "val", "test")) == 40


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([("a.png", 3)], "records has values of the types str, int"),
        ([("a.png", np.array(["a", "b"]))], "types str, ndarray, NoneType .*; expected an image, a sentence"),
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


def test_an_annotation_file_is_not_uploaded_alone(scenes: Path, refused: Callable[..., str]) -> None:
    said = refused("data", "upload", scenes / "captions.csv", "--artifact=scenes")
    assert "captions.csv is not a folder; give the folder of the data set" in said
