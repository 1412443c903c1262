"""Hugging Face data sets, from the hub or from this machine.

They are written once as a folder of pictures and a `captions.jsonl`. Everything downstream then reads files,
as it does for any other data, and training needs neither the hub nor the package `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.columns import RECOGNISED, ReadOptions, find_typed_columns, is_image_type
from clip_lightning.data.materialise import Part, materialise
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, make_once

_LAYOUT = 1
"""Part of the folder's name: raise it when the same data set would be written differently."""


@dataclass(frozen=True)
class HubDataset:
    """A data set of Hugging Face, from the hub or this machine, written as a folder of images.

    Attributes:
        name: `OWNER/NAME`, `OWNER/NAME:SUBSET@REVISION`, a folder (from `save_to_disk`, or of any files that
            `load_dataset` reads) or a Parquet file.
        read: its columns, if they are not recognised by type and name.
    """

    name: str
    read: ReadOptions = RECOGNISED

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """Read `hf:NAME`."""
        name = text.removeprefix("hf:")
        _Source.parse(name)
        return cls(name)

    def folder(self) -> Path:
        """Return where the data set is once it is written; needs no network and no package `datasets`.

        A local data set that has changed has another folder. One of the hub has not: what was fetched first
        is kept, and `@REVISION` asks for another.
        """
        columns = self.read.image_column, self.read.caption_column
        key = json.dumps([_LAYOUT, *_Source.parse(self.name).key(), *columns])
        return cache_folder("data") / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def fetch(self) -> None:
        """Write the data set as a folder that `read_captions` reads, once per machine.

        Images are stored byte for byte, named by their content: rows that repeat an image are captions of one
        image. Rows without a readable image are counted, and stay in the list, where `--data.max_broken` sees
        them. Splits come from a `split` column, or else from the data set's own; if all is `train`, the data
        set is not split.

        Raises:
            UserError: there is no such data set or column, it cannot be fetched, or holds no usable row.
        """
        make_once(self.folder(), self._fill)

    def _fill(self, draft: Path) -> Path:
        source = _Source.parse(self.name)
        datasets = _import_datasets("--data.root hf:")
        loaded = _load(datasets, source, "--data.root hf:")
        parts = _parts(self.name, loaded, self.read, datasets.Image(decode=False))
        # A data set from elsewhere must not make us copy any image of this machine.
        trusted = None if source.path else _hub_caches(datasets)
        materialise(self.name, parts, draft, trusted)
        return draft


def load_splits(name: str, option: str) -> dict[str, Any]:
    """The splits of a data set by their own names, as `datasets.Dataset`; nothing is decoded yet.

    Args:
        name: as for `HubDataset`.
        option: that named it, for messages.

    Raises:
        UserError: there is no such data set, or it cannot be fetched.
    """
    datasets = _import_datasets(option)
    return _load(datasets, _Source.parse(name, option), option)


@dataclass(frozen=True)
class _Source:
    name: str
    subset: str | None = None
    revision: str | None = None
    path: Path | None = None
    """Of a local data set."""

    @classmethod
    def parse(cls, name: str, option: str = "--data.root hf:") -> _Source:
        path = Path(name).expanduser()
        if name and path.exists():
            return cls(name, path=path.resolve())
        found = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?:@([\w./-]+))?", name)
        if not found:
            raise UserError(
                f"{option}{name}: expected OWNER/NAME, OWNER/NAME:SUBSET@REVISION, or a folder or Parquet "
                "file that exists"
            )
        return cls(found[1], found[2], found[3])

    def key(self) -> list[Any]:
        """What tells this data set from others; of a local one its files' sizes and times as well."""
        if self.path is None:
            return [self.name, self.subset, self.revision]
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        stats = [(str(file.relative_to(self.path)), file.stat()) for file in files if file.is_file()]
        return [str(self.path), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]


def _import_datasets(option: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{option}NAME needs the package datasets: pip install datasets") from None
    return datasets


def _load(datasets: Any, source: _Source, option: str) -> dict[str, Any]:
    """The data set's splits by name."""
    try:
        loaded = _load_any(datasets, source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        hint = "check the name, the network and HF_HUB_OFFLINE"
        if "script" in reason:
            hint = f"the hub's own conversion may do: {source.name}@refs/convert/parquet"
        elif "onfig name" in reason:
            hint = f"name a subset: {source.name}:SUBSET"
        raise UserError(f"{option}{source.name} cannot be loaded ({reason}); {hint}") from error
    if isinstance(loaded, datasets.DatasetDict):
        return {str(split): data for split, data in loaded.items()}
    return {str(loaded.split or "train"): loaded}


def _load_any(datasets: Any, source: _Source) -> Any:
    """Code that comes with a data set is never run: `datasets` 4 and newer cannot."""
    path = source.path
    if path is None:
        return datasets.load_dataset(source.name, source.subset, revision=source.revision)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path))


def _parts(name: str, loaded: dict[str, Any], read: ReadOptions, undecoded: Any) -> list[Part]:
    """The splits that are some of ours, or the only one whatever it is called."""
    words = {part: SPLIT_WORDS.get(part.lower()) for part in loaded}
    if len(loaded) == 1:
        # All in `train` is how the hub shows data that is not split.
        words = {part: None if word == "train" else word for part, word in words.items()}
    else:
        others = [part for part, word in words.items() if word is None]
        if len(others) == len(loaded):
            raise UserError(
                f"--data.root hf:{name} has the splits {', '.join(loaded)}; expected some of "
                f"{', '.join(SPLIT_WORDS)}, or a single one"
            )
        if others:
            print(f"--data.root hf:{name}: left out the splits {', '.join(others)}", file=sys.stderr)
        loaded = {part: data for part, data in loaded.items() if words[part]}
    parts = []
    for part, data in loaded.items():
        columns = find_typed_columns(f"--data.root hf:{name}", data.features, read)
        if is_image_type(data.features[columns.image]):
            data = data.cast_column(columns.image, undecoded)
        parts.append(Part(part, data.select_columns(columns.names()), columns, words[part]))
    return parts


def _hub_caches(datasets: Any) -> list[Path]:
    """Where `datasets` and the hub's client keep what they fetched and unpacked."""
    from huggingface_hub import constants

    config = datasets.config
    folders = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
    return [Path(os.path.realpath(folder)) for folder in folders]
