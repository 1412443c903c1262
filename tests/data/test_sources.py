"""Which data `--data.root` names, what is refused before anything is fetched, and what is fetched once."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from clip_lightning.data.archive import Archive
from clip_lightning.data.captions import Splits
from clip_lightning.data.columns import ReadOptions
from clip_lightning.data.datamodule import CaptionDataModule
from clip_lightning.data.features import CacheOptions
from clip_lightning.data.formats import read_captions
from clip_lightning.data.hub import HubDataset
from clip_lightning.data.sources import Artifact, Folder, Scenes, find_source, names_tars
from clip_lightning.errors import UserError
from clip_lightning.files import make_once
from clip_lightning.wandb_fetch import ArtifactName


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
    ("options", "line"),
    [
        ({"root": None}, "--data.root is missing; give a folder, hf:OWNER/NAME, wandb:"),
        ({"root": "hf:me/data/more"}, "hf:me/data/more: expected hf:OWNER/NAME"),
        ({"root": "wandb:flickr8k"}, "--data.root wandb: 'flickr8k': expected ENTITY/PROJECT/NAME:ALIAS"),
        ({"root": "file:///a.zip"}, "sha256"),
    ],
)
def test_invalid_sources_are_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as raised:
        find_source(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Splits(val_fraction=2), r"--data\.read\.splits\.val_fraction 2: expected a fraction"),
        (lambda: ReadOptions(max_broken=-1), r"--data\.read\.max_broken -1: expected a fraction"),
        (lambda: CacheOptions(gigabytes=-1), r"--data\.cache_options\.gigabytes -1: expected 0 or more"),
        (lambda: CacheOptions(views=0), r"--data\.cache_options\.views 0: expected 1 or more"),
        (
            lambda: make_once(Path(__file__) / "wanted", Path),
            r"data cannot be written to .*; free some space",
        ),
    ],
)
def test_options_out_of_range_are_one_line(make: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        make()


def test_an_archive_is_trained_on(
    scenes: Path, make_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the data module reads is what the folder that was packed holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = Path(shutil.make_archive(str(tmp_path / "scenes"), "zip", scenes))
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    module, found = make_module(), []
    for root in (f"{archive.as_uri()}#sha256={checksum}", scenes):
        data = CaptionDataModule(module.transform, module.tokenize, root=root, batch_size=4)
        data.prepare_data()
        data.setup("fit")
        found.append((data.digest, len(data.images("train")), data.root == scenes))
    assert found == [(found[1][0], 32, False), (found[1][0], 32, True)]


def test_a_hub_data_set_is_trained_on(
    scenes: Path, make_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set saved by the datasets library gives the captions and images that it was made of."""
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
    data = CaptionDataModule(module.transform, module.tokenize, f"hf:{tmp_path / 'saved'}", batch_size=4)
    data.prepare_data()
    data.setup("fit")
    wanted = {image.captions: image.path.read_bytes() for n, image in enumerate(images) if n % 4}
    assert {image.captions: image.path.read_bytes() for image in data.images("train")} == wanted
    assert len(data.images("val")) == len(images) - len(wanted)


# Once per machine, complete or not at all ---------------------------------------------------------------


def test_a_folder_is_created_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = tmp_path / "data" / "wanted", []
    replace = os.replace

    def look(made: Path, target: Path) -> None:
        seen.append(([path.name for path in Path(made).iterdir()], Path(target).exists()))
        replace(made, target)

    def fill(draft: Path) -> Path:
        (draft / "files").mkdir()
        (draft / "files" / "a").touch()
        return draft / "files"

    monkeypatch.setattr(os, "replace", look)
    make_once(folder, fill)
    assert seen == [(["a"], False)]
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert {path.name for path in folder.parent.iterdir()} == {"wanted", ".wanted.lock"}


def test_failed_folders_are_removed_and_existing_ones_kept(tmp_path: Path) -> None:
    folder, draft = tmp_path / "wanted", tmp_path / ".wanted.draft"

    def fail(draft: Path) -> Path:
        (draft / "begun").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once(folder, fail)
    assert not folder.exists() and not draft.exists()
    (draft / "of a killed process").mkdir(parents=True)
    make_once(folder, lambda draft: draft)
    assert not list(folder.iterdir()) and not draft.exists()
    make_once(folder, fail)
