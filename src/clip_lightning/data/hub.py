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
from clip_lightning.data.columns import ReadOptions, find_typed_columns, is_image_type
from clip_lightning.data.materialise import Part, materialise
from clip_lightning.data.sources import default_folder, make_once
from clip_lightning.errors import UserError

_LAYOUT = 1
"""Part of the folder's name: raise it when the same data set would be written differently."""


def hub_folder(name: str, image: str | None = None, captions: str | None = None) -> Path:
    """Where this data set lies once it is written; needs neither the network nor the package `datasets`.

    A local data set that has changed lies elsewhere. One of the hub does not: what was fetched first is kept;
    `@REVISION` asks for another.

    Raises:
        UserError: the name is none.
    """
    key = json.dumps([_LAYOUT, *_Source.parse(name).key(), image, captions])
    return default_folder() / f"hub-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def fetch_hub(name: str, image: str | None = None, captions: str | None = None) -> Path:
    """Write the data set as a folder that `read_captions` reads; a killed process's work is kept.

    Pictures are stored byte for byte, named by their content: rows that repeat a picture are captions of one
    picture. Rows without a readable picture are counted, and stay in the list, where `--data.max_broken` sees
    them. Splits come from a `split` column, or else from the data set's own; all in `train` means on the hub:
    not split.

    Args:
        name: hub id `OWNER/NAME`, perhaps with a subset and a revision, `OWNER/NAME:SUBSET@REVISION`; or a
            folder (from `save_to_disk`, or of any files that `load_dataset` reads) or a Parquet file.
        image: the column of pictures; by default the one of that type, or of a usual name.
        captions: the column of captions, or several with commas between; by default of a usual name, or
            numbered like `caption_0`.

    Returns:
        `hub_folder(name, image, captions)`.

    Raises:
        UserError: there is no such data set or column, it cannot be fetched, or holds no usable row.
    """
    source = _Source.parse(name)

    def make(draft: Path) -> Path:
        datasets = _import_datasets("--data.hub")
        parts = _parts(
            name, _load(datasets, source, "--data.hub"), image, captions, datasets.Image(decode=False)
        )
        # A data set from elsewhere must not make us copy any picture of this machine.
        trusted = None if source.path else _hub_caches(datasets)
        materialise(name, parts, draft, trusted)
        return draft

    return make_once(hub_folder(name, image, captions), make)


def load_splits(name: str, option: str) -> dict[str, Any]:
    """The splits of a data set by their own names, as `datasets.Dataset`; nothing is decoded yet.

    Args:
        name: as for `fetch_hub`.
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
    def parse(cls, name: str, option: str = "--data.hub") -> _Source:
        path = Path(name).expanduser()
        if name and path.exists():
            return cls(name, path=path.resolve())
        found = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?:@([\w./-]+))?", name)
        if not found:
            raise UserError(
                f"{option} {name}: expected OWNER/NAME, OWNER/NAME:SUBSET@REVISION, or a folder or Parquet "
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
        raise UserError(f"{option} needs the package datasets: pip install 'clip-lightning[hub]'") from None
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
        raise UserError(f"{option} {source.name} cannot be loaded ({reason}); {hint}") from error
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


def _parts(
    name: str, loaded: dict[str, Any], image: str | None, captions: str | None, undecoded: Any
) -> list[Part]:
    """The splits that are some of ours, or the only one whatever it is called."""
    words = {part: SPLIT_WORDS.get(part.lower()) for part in loaded}
    if len(loaded) == 1:
        # All in `train` is how the hub shows data that is not split.
        words = {part: None if word == "train" else word for part, word in words.items()}
    else:
        others = [part for part, word in words.items() if word is None]
        if len(others) == len(loaded):
            raise UserError(
                f"--data.hub {name} has the splits {', '.join(loaded)}; expected some of "
                f"{', '.join(SPLIT_WORDS)}, or a single one"
            )
        if others:
            print(f"--data.hub {name}: left out the splits {', '.join(others)}", file=sys.stderr)
        loaded = {part: data for part, data in loaded.items() if words[part]}
    parts = []
    for part, data in loaded.items():
        columns = find_typed_columns(f"--data.hub {name}", data.features, ReadOptions(image, captions))
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
