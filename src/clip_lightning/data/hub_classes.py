"""Hugging Face data sets of classes, from the hub or this machine; pictures are read when asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.classes import ClassSet
from clip_lightning.data.columns import is_image_type
from clip_lightning.data.hub import load_splits
from clip_lightning.data.images import BrokenImage, decode_bytes, decode_image
from clip_lightning.errors import UserError


def read_hub_classes(name: str) -> ClassSet:
    """A data set with a column of the type Image and one of the type ClassLabel.

    Splits called as ours are (or `validation`, `dev`, ...) are taken; all in `train` means: not split.

    Args:
        name: `OWNER/NAME`, `OWNER/NAME:SUBSET@REVISION`, or a local folder or Parquet file.

    Raises:
        UserError: it cannot be loaded, or no column is clearly that of pictures or of classes.
    """
    loaded = load_splits(name, "hf:")
    words = _words(name, loaded)
    pictures: list[_Row] = []
    labels: list[int] = []
    splits: list[str | None] = []
    left_out: dict[str, str] = {}
    classes: tuple[str, ...] = ()
    for part, split in words.items():
        image, label = (
            _column(name, loaded[part], is_image_type, "Image"),
            _column(name, loaded[part], _is_label, "ClassLabel"),
        )
        classes = tuple(loaded[part].features[label].names)
        rows = _Rows(_undecoded(loaded[part], image), image)
        known = [(row, number) for row, number in enumerate(loaded[part][label]) if _is_class(number)]
        if missing := len(loaded[part]) - len(known):
            left_out[f"{missing} pictures of {part}"] = "they have no class"
        pictures += [_Row(rows, row, f"hf:{name} {part} {row}") for row, _ in known]
        labels += [number for _, number in known]
        splits += [split] * len(known)
    if len(set(labels)) < 2:
        raise UserError(f"hf:{name} has pictures of {len(set(labels))} classes; expected two or more")
    return ClassSet(tuple(pictures), tuple(labels), tuple(splits), classes, left_out)


def _words(name: str, loaded: Mapping[str, Any]) -> dict[str, str | None]:
    """Our word for each of its splits that is used."""
    if len(loaded) == 1:
        return {part: None if part == "train" else SPLIT_WORDS.get(part.lower()) for part in loaded}
    known: dict[str, str | None] = {
        part: SPLIT_WORDS[part.lower()] for part in loaded if part.lower() in SPLIT_WORDS
    }
    if not known:
        raise UserError(
            f"hf:{name} has the splits {', '.join(loaded)}; expected some of {', '.join(SPLIT_WORDS)}, or one"
        )
    if others := [part for part in loaded if part not in known]:
        print(f"hf:{name}: left out the splits {', '.join(others)}", file=sys.stderr)
    return known


def _is_label(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _is_class(number: Any) -> bool:
    """Not None, and not the -1 that hidden labels have."""
    return isinstance(number, int) and number >= 0


def _column(name: str, part: Any, wanted: Any, kind: str) -> str:
    """The column of this type; of several, the one with the usual name."""
    found = [column for column, feature in part.features.items() if wanted(feature)]
    usual = [column for column in found if column.lower() in ("image", "img", "label", "fine_label", "class")]
    chosen = found if len(found) == 1 else usual
    if len(chosen) != 1:
        there = ", ".join(f"{column} ({type(kind_).__name__})" for column, kind_ in part.features.items())
        raise UserError(f"hf:{name} needs one column of the type {kind}, and has {there}; give other data")
    return chosen[0]


def _undecoded(part: Any, column: str) -> Any:
    return part.cast_column(column, type(part.features[column])(decode=False)).select_columns([column])


@dataclass(frozen=True)
class _Rows:
    """Rows of one split, fetched by one thread at a time."""

    data: Any
    column: str
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self.lock:
            found: dict[str, Any] = self.data[row][self.column] or {}
        return found


@dataclass(frozen=True, slots=True)
class _Row:
    rows: _Rows
    row: int
    name: str

    def pixels(self) -> Tensor:
        value = self.rows[self.row]
        if value.get("bytes") is not None:
            return decode_bytes(value["bytes"])
        if not value.get("path"):
            raise BrokenImage("it has no picture")
        return decode_image(Path(value["path"]))

    def __str__(self) -> str:
        return self.name
