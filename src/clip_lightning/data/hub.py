"""Read Hugging Face data sets from the hub or from this machine.

A captioned data set is written once as a folder of images with a `captions.jsonl`. All other code then reads
these files like any other data, and training needs neither the hub nor the package `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_lightning.data.captions import SPLIT_WORDS, parse_split, unreadable
from clip_lightning.data.columns import RECOGNIZED, ReadOptions
from clip_lightning.data.image_formats import IMAGE_SUFFIXES
from clip_lightning.data.images import BrokenImage, open_image
from clip_lightning.errors import UserError, reason_of
from clip_lightning.files import cache_folder, make_once

_LAYOUT = 1
"""Part of the folder's name: increase it when data sets are written differently."""


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face data set: `OWNER/NAME`, or the absolute path of a folder or Parquet file."""

    name: str
    subset: str | None = None
    revision: str | None = None
    read: ReadOptions = RECOGNIZED

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """Read `hf:OWNER/NAME`, `hf:OWNER/NAME:SUBSET@REVISION`, or `hf:` and a path."""
        name = text.removeprefix("hf:")
        if name and Path(name).exists():
            return cls(str(Path(name).resolve()))
        match = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?:@([\w./-]+))?", name)
        if not match:
            raise UserError(
                f"{text}: expected hf:OWNER/NAME, hf:OWNER/NAME:SUBSET@REVISION, or hf: and an existing "
                "folder or Parquet file"
            )
        return cls(match[1], match[2], match[3])

    def folder(self) -> Path:
        """Return the folder to which the data set is written; needs neither network nor `datasets`.

        A local data set that has changed has a different folder. A data set of the hub keeps its folder, and
        the version that was downloaded first; `@REVISION` selects another version.
        """
        key: list[Any] = [self.name, self.subset, self.revision]
        if os.path.isabs(self.name):
            path = Path(self.name)
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
            key = [self.name, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
        text = json.dumps([_LAYOUT, *key, self.read.image_column, self.read.caption_column])
        return cache_folder("data") / f"hub-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def fetch(self) -> None:
        """Write the data set as a folder that `read_captions` reads, once per machine."""
        make_once(self.folder(), lambda draft: write_rows(draft, self._rows()))

    def _rows(self) -> Iterator[tuple[str, bytes | str, list[str], str | None]]:
        splits = self.splits()
        # A data set from the hub must not make us copy arbitrary images of this machine.
        trusted = None if os.path.isabs(self.name) else _hub_caches()
        for name, rows, split in splits:
            source = f"hf:{self.name}"
            typed = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
            columns = self.read.find(source, rows.features, typed)
            rows = undecoded(rows, {columns.image} & {*typed})
            names = dict.fromkeys([columns.image, *columns.captions, *filter(None, [columns.split])])
            for number, record in enumerate(tqdm(rows.select_columns([*names]), name, unit=" rows")):
                image, captions, own_split = columns.read(source, record, (dict, bytes))
                if columns.split:
                    split = parse_split(own_split, source)
                place = f"{name} row {number}"
                content = _content(image, trusted)
                image = content if isinstance(content, bytes) else f"{place} ({content})"
                yield place, image, captions, split

    def splits(self) -> list[tuple[str, Any, str | None]]:
        """Load the splits with a usual name, or the only split whatever its name, without decoding images.

        Returns:
            the name of each split, its rows (a `datasets.Dataset`), and `train`, `val`, `test` or None.
        """
        splits = [(name, rows, SPLIT_WORDS.get(name.lower())) for name, rows in self._load().items()]
        if len(splits) == 1:  # on the hub, data without splits is all in `train`
            return [(name, rows, None if split == "train" else split) for name, rows, split in splits]
        if others := [name for name, _, split in splits if split is None]:
            print(f"hf:{self.name}: left out the splits {', '.join(others)}", file=sys.stderr)
        if len(others) == len(splits):
            raise UserError(f"hf:{self.name} has no split named {', '.join(SPLIT_WORDS)}; give other data")
        return [part for part in splits if part[2]]

    def _load(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError:
            raise UserError("hf:NAME needs the package datasets; run `pip install datasets`") from None
        path = Path(self.name)
        try:  # the data set's own code is never run, because `datasets` 4 and newer cannot run it
            if not path.is_absolute():
                loaded = datasets.load_dataset(self.name, self.subset, revision=self.revision)
            elif path.is_file():
                loaded = datasets.load_dataset("parquet", data_files=self.name)
            elif any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(self.name)
            else:
                loaded = datasets.load_dataset(self.name)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"hf:{self.name} cannot be loaded ({reason_of(error)}); check the name, the network and "
                "HF_HUB_OFFLINE, give a subset as hf:NAME:SUBSET, or, for data with a loading script, try "
                "hf:NAME@refs/convert/parquet"
            ) from error
        if isinstance(loaded, datasets.DatasetDict):
            return {str(split): rows for split, rows in loaded.items()}
        return {str(loaded.split or "train"): loaded}


def undecoded(rows: Any, columns: Iterable[str]) -> Any:
    """Return the rows with the encoded images of these columns."""
    for column in columns:
        rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    return rows


def _hub_caches() -> list[Path]:
    """Return the folders in which `datasets` and the hub's client store downloaded and unpacked files."""
    from datasets import config
    from huggingface_hub import constants

    folders = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
    return [Path(os.path.realpath(folder)) for folder in folders]


def _content(value: Any, trusted: Sequence[Path] | None) -> bytes | str:
    """Return an encoded image, or the reason why there is none."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is not None:
        return bytes(data)
    if not path:
        return "it has no image"
    resolved = Path(path).resolve()
    if trusted is not None and not any(resolved.is_relative_to(folder) for folder in trusted):
        return "its image is not in the data set"
    try:
        return resolved.read_bytes()
    except FileNotFoundError as error:
        return str(error.strerror)
    except OSError as error:  # not a property of the data set
        raise unreadable(resolved, error.strerror) from error


def write_rows(folder: Path, rows: Iterable[tuple[str, bytes | str, list[str], str | None]]) -> Path:
    """Write rows as a folder of images with a `captions.jsonl`.

    Images are stored unchanged and named by their content, so rows that repeat an image become captions of
    one image. Rows without an image stay in the table with the reason as the image's name: as there is no
    such file, `read_captions` counts them, and `max_broken` applies to them.

    Args:
        folder: an empty folder.
        rows: a name for messages, the content of an image or the name of a file, its captions and split.
    """
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for place, image, captions, split in rows:
            if isinstance(image, bytes):
                try:  # JPEG has variants with other names, such as MPO
                    suffix = IMAGE_SUFFIXES.get(open_image(image).format or "", ".jpg")
                    name = f"images/{split or 'all'}/{hashlib.sha256(image).hexdigest()[:32]}{suffix}"
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(image)
                    image = name
                except BrokenImage as error:
                    image = f"{place} ({error})"
            file.write(json.dumps({"image": image, "captions": captions, "split": split}) + "\n")
    return folder
