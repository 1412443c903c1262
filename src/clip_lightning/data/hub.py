"""Read Hugging Face data sets from the hub or from this machine.

A captioned data set is written once as a folder of images with a `captions.jsonl`. All other code then reads
these files like any other data, and training needs neither the hub nor the package `datasets`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from clip_lightning.data.captions import SPLIT_WORDS, parse_split, unreadable
from clip_lightning.data.columns import RECOGNIZED, ReadOptions, find_typed_columns, is_image_type, sentences
from clip_lightning.data.image_formats import IMAGE_FORMATS, IMAGE_SUFFIXES
from clip_lightning.errors import UserError, reason_of
from clip_lightning.files import cache_folder, make_once

_LAYOUT = 1
"""Part of the folder's name: increase it when data sets are written differently."""


class HubSplit(NamedTuple):
    """The name of a split, its rows (a `datasets.Dataset`), and `train`, `val`, `test` or None."""

    name: str
    rows: Any
    split: str | None


@dataclass(frozen=True)
class HubDataset:
    """A Hugging Face data set.

    Attributes:
        name: `OWNER/NAME`, or a local folder or Parquet file.
        subset: the subset, if one was given.
        revision: the revision, if one was given.
        read: the columns, if they are not recognized by type and name.
    """

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

    @property
    def path(self) -> Path | None:
        """The local folder (of `save_to_disk` or of files that `load_dataset` reads) or Parquet file."""
        return Path(self.name) if os.path.isabs(self.name) else None

    def folder(self) -> Path:
        """Return the folder to which the data set is written; needs neither network nor `datasets`.

        A local data set that has changed has a different folder. A data set of the hub keeps its folder, and
        the version that was downloaded first; `@REVISION` selects another version.
        """
        key: list[Any] = [self.name, self.subset, self.revision]
        if self.path is not None:
            files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
            stats = [(str(file.relative_to(self.path)), file.stat()) for file in files if file.is_file()]
            key = [self.name, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
        text = json.dumps([_LAYOUT, *key, self.read.image_column, self.read.caption_column])
        return cache_folder("data") / f"hub-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def fetch(self) -> None:
        """Write the data set as a folder that `read_captions` reads, once per machine.

        Images are stored unchanged and named by their content, so rows that repeat an image become captions
        of one image. Rows without a readable image are counted and stay in the table, so that `max_broken`
        applies to them. Splits come from a `split` column, or else from the data set's own splits.

        Raises:
            UserError: the data set or a column does not exist, cannot be downloaded, or has no usable row.
        """
        make_once(self.folder(), self._write)

    def splits(self) -> list[HubSplit]:
        """Load the splits with a usual name, or the only split whatever its name, without decoding images.

        Raises:
            UserError: the data set does not exist, or cannot be downloaded.
        """
        loaded = self._load()
        splits = [HubSplit(name, rows, SPLIT_WORDS.get(name.lower())) for name, rows in loaded.items()]
        if len(splits) == 1:  # on the hub, data without splits is all in `train`
            return [splits[0]._replace(split=None)] if splits[0].split == "train" else splits
        if others := [part.name for part in splits if part.split is None]:
            if len(others) == len(splits):
                raise UserError(
                    f"hf:{self.name} has the splits {', '.join(others)}; expected {', '.join(SPLIT_WORDS)}"
                )
            print(f"hf:{self.name}: left out the splits {', '.join(others)}", file=sys.stderr)
        return [part for part in splits if part.split]

    def _load(self) -> dict[str, Any]:
        datasets = _import_datasets()
        try:  # the data set's own code is never run, because `datasets` 4 and newer cannot run it
            if self.path is None:
                loaded = datasets.load_dataset(self.name, self.subset, revision=self.revision)
            elif self.path.is_file():
                loaded = datasets.load_dataset("parquet", data_files=self.name)
            elif any((self.path / name).exists() for name in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(self.name)
            else:
                loaded = datasets.load_dataset(self.name)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = reason_of(error)
            hint = "check the name, the network and HF_HUB_OFFLINE"
            if "script" in reason:
                hint = f"try the hub's own conversion: hf:{self.name}@refs/convert/parquet"
            elif "onfig name" in reason:
                hint = f"give a subset: hf:{self.name}:SUBSET"
            raise UserError(f"hf:{self.name} cannot be loaded ({reason}); {hint}") from error
        if isinstance(loaded, datasets.DatasetDict):
            return {str(split): rows for split, rows in loaded.items()}
        return {str(loaded.split or "train"): loaded}

    def _write(self, draft: Path) -> Path:
        datasets, missing, splits = _import_datasets(), [], self.splits()
        # A data set from the hub must not make us copy arbitrary images of this machine.
        trusted = None if self.path else _hub_caches(datasets)
        total = sum(len(split.rows) for split in splits)
        bar = tqdm(total=total, desc="images", unit=" rows")
        with bar, (draft / "captions.jsonl").open("w") as file:
            for name, rows, split in splits:
                columns = find_typed_columns(f"hf:{self.name}", rows.features, self.read)
                if is_image_type(rows.features[columns.image]):
                    rows = rows.cast_column(columns.image, datasets.Image(decode=False))
                for number, row in enumerate(rows.select_columns(columns.names())):
                    if columns.split:
                        split = parse_split(row[columns.split], f"hf:{self.name}")
                    try:
                        image = store_image(_image(row[columns.image], trusted), draft, split or "all")
                    except NoImage as error:
                        # `read_captions` counts and reports this name, as there is no such file
                        missing.append(image := f"{name} row {number} ({error})")
                    captions = [text for column in columns.captions for text in sentences(row[column])]
                    file.write(json.dumps({"image": image, "captions": captions, "split": split}) + "\n")
                    bar.update()
        if missing or not total:
            example = f" (first {missing[0]})" if missing else ""
            message = f"hf:{self.name}: {len(missing)} of {total} rows have no readable image{example}"
            if len(missing) == total:
                raise UserError(f"{message}; give other data")
            print(message, file=sys.stderr)
        return draft


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("hf:NAME needs the package datasets; run `pip install datasets`") from None
    return datasets


def _hub_caches(datasets: Any) -> list[Path]:
    """Return the folders in which `datasets` and the hub's client store downloaded and unpacked files."""
    from huggingface_hub import constants

    config = datasets.config
    folders = constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH
    return [Path(os.path.realpath(folder)) for folder in folders]


class NoImage(ValueError):
    """The reason why a row has no image."""


def _image(value: Any, trusted: Sequence[Path] | None) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is not None:
        return bytes(data)
    if not path:
        raise NoImage("it has no image")
    resolved = Path(path).resolve()
    if trusted is not None and not any(resolved.is_relative_to(folder) for folder in trusted):
        raise NoImage("its image is not in the data set")
    try:
        return resolved.read_bytes()
    except FileNotFoundError as error:
        raise NoImage(error.strerror) from error
    except OSError as error:  # not a property of the data set
        raise unreadable(resolved, error.strerror) from error


def store_image(data: bytes, folder: Path, split: str) -> str:
    """Write an image unchanged, under a name with the suffix of its format, and return that name.

    Raises:
        NoImage: the format is unknown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:  # reads only the header; the rest is checked when the image is decoded
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                kind = image.format or ""
        except Exception as error:  # Pillow raises nearly every kind of error for broken files
            raise NoImage("not an image of a known format") from error
    suffix = IMAGE_SUFFIXES.get(kind, ".jpg")  # JPEG has variants with other names, such as MPO
    path = folder / "images" / split / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path.relative_to(folder).as_posix()
