"""Which option names the data, and what is refused before anything is fetched."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.formats import read_captions
from clip_lightning.data.origin import Origin, find_origin
from clip_lightning.errors import UserError

NOTHING: dict[str, Any] = dict.fromkeys(
    (
        "root",
        "artifact",
        "url",
        "sha256",
        "hub",
    ),
    None,
)


def origin(**options: Any) -> Origin:
    return find_origin(**{**NOTHING, "scenes": False, **options})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "no data: give --data.root"),
        ({"root": Path("a"), "artifact": "a/b/c"}, "--data.root and --data.artifact each name data"),
        ({"hub": "a/b", "url": "file:///a.zip"}, "--data.url and --data.hub each name data"),
        ({"scenes": True, "hub": "a/b"}, "scenes needs no --data.hub"),
        ({"sha256": "0" * 64}, "give its --data.url too"),
        ({"artifact": "flickr8k"}, "--data.artifact 'flickr8k': expected ENTITY/PROJECT/NAME:ALIAS"),
        ({"url": "file:///a.zip"}, "sha256"),
    ],
)
def test_what_does_not_name_data(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        origin(**options)


def test_a_folder_is_where_it_is(scenes: Path) -> None:
    found = origin(root=scenes)
    found.fetch()
    assert (found.folder(), found.artifact) == (scenes, None)


def test_an_archive_is_trained_on(
    scenes: Path, make_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the data module reads is what the folder that was packed holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = Path(shutil.make_archive(str(tmp_path / "scenes"), "zip", scenes))
    module = make_module()
    data = CaptionDataModule(
        module.transform,
        module.tokenize,
        url=archive.as_uri(),
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        batch_size=4,
    )
    data.prepare_data()
    data.setup("fit")
    assert data.root != scenes
    assert data.digest == _digest(scenes, module)
    assert len(data.images("train")) == 32


def test_a_hub_data_set_is_trained_on(
    scenes: Path, make_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set saved by the datasets library gives the captions and pictures that it was made of."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = read_captions(scenes).images
    rows = {
        "image": [str(image.path) for image in images],
        "caption": [list(image.captions) for image in images],
        "split": ["train" if n % 4 else "validation" for n in range(len(images))],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    module = make_module()
    data = CaptionDataModule(module.transform, module.tokenize, hub=str(tmp_path / "saved"), batch_size=4)
    data.prepare_data()
    data.setup("fit")
    wanted = {image.captions: image.path.read_bytes() for n, image in enumerate(images) if n % 4}
    assert {image.captions: image.path.read_bytes() for image in data.images("train")} == wanted
    assert len(data.images("val")) == len(images) - len(wanted)


def _digest(root: Path, module: Any) -> str:
    data = CaptionDataModule(module.transform, module.tokenize, root=root, batch_size=4)
    data.setup("fit")
    return data.digest
