"""A fetched folder is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clip_lightning.data import sources
from clip_lightning.errors import UserError


def test_a_folder_appears_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, seen = tmp_path / "data" / "wanted", []
    replace = os.replace

    def look(made: Path, target: Path) -> None:
        seen.append(([path.name for path in Path(made).iterdir()], Path(target).exists()))
        replace(made, target)

    def make(draft: Path) -> Path:
        (draft / "files").mkdir()
        (draft / "files" / "a").touch()
        return draft / "files"

    monkeypatch.setattr(os, "replace", look)
    assert sources.make_once(folder, make) == folder
    assert seen == [(["a"], False)]
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert {path.name for path in folder.parent.iterdir()} == {"wanted", ".wanted.lock"}


def test_what_failed_is_gone_on_with(tmp_path: Path):
    folder = tmp_path / "wanted"

    def fail(draft: Path) -> Path:
        (draft / "begun").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sources.make_once(folder, fail)
    assert not folder.exists()
    assert sources.make_once(folder, lambda draft: draft) == folder
    assert [path.name for path in folder.iterdir()] == ["begun"]
    assert sources.make_once(folder, fail) == folder


def test_no_right_to_write(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data cannot be written to .*file \(.*; free some space"):
        sources.make_once(tmp_path / "file" / "wanted", lambda draft: draft)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sources.default_folder() == tmp_path / "clip-lightning" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.default_folder() == Path.home() / ".cache" / "clip-lightning" / "data"
