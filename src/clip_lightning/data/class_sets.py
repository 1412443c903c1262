"""Find classification data sets of torchvision and Hugging Face, whose images are read on demand."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_lightning.data.classes import ClassRow, ClassSet, check_name, read_classes
from clip_lightning.data.hub import HubDataset
from clip_lightning.data.images import BrokenImage
from clip_lightning.errors import UserError, reason_of
from clip_lightning.files import cache_folder, make_once

Splits = Mapping[str | None, Mapping[str, Any]]
"""Our split (None if the data set has no splits) → the arguments that select it."""

_BY_FLAG: Splits = {"train": {"train": True}, "test": {"train": False}}
_UNDIVIDED: Splits = {None: {}}
_THREE: Splits = {split: {"split": split} for split in ("train", "val", "test")}
_TWO: Splits = {split: {"split": split} for split in ("train", "test")}
TORCHVISION: dict[str, Splits] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"), _BY_FLAG),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SUN397"), _UNDIVIDED),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "RenderedSST2"), _THREE),
    **dict.fromkeys(("Food101", "STL10"), _TWO),
    "Country211": {**_TWO, "val": {"split": "valid"}},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
}
_LABELS = ("targets", "labels", "_labels", "y")


def find_classes(place: str, cache: Path | None = None) -> ClassSet:
    """Read images and their classes; data that is downloaded by name is cached on this machine.

    Args:
        place: a folder or table as for `read_classes`; `torchvision:NAME`; `hf:OWNER/NAME[:SUBSET]`; or `hf:`
            and a local folder of the package `datasets`.
        cache: folder for data sets of torchvision; by default in the user's cache folder. Hugging Face's
            packages have their own cache.

    Raises:
        UserError: the data does not exist, or cannot be downloaded.
    """
    check_name(place)
    kind, colon, name = place.partition(":")
    if not colon or Path(place).exists():
        return read_classes(Path(place))
    return read_torchvision(name, cache) if kind == "torchvision" else read_hub_classes(place)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a data set, with a name for messages."""

    name: str
    data: Any
    row: int
    column: str | int
    lock: contextlib.AbstractContextManager[Any]

    def read(self) -> Any:
        """Return a PIL image or the bytes of a file; several threads may call this."""
        with self.lock:
            value = self.data[self.row][self.column]
        if isinstance(value, dict):
            value = value["bytes"] or (value["path"] and Path(value["path"]).read_bytes())
        if value is None:
            raise BrokenImage("it has no image")
        return value


def read_torchvision(name: str, cache: Path | None = None) -> ClassSet:
    """Read a data set with its own splits, which torchvision downloads once and completely.

    Args:
        name: one of `TORCHVISION`.
        cache: folder for the data; by default in the user's cache folder.

    Raises:
        UserError: the name is unknown, or the download failed.
    """
    if name not in TORCHVISION:
        raise UserError(f"torchvision:{name} is unknown; expected one of {', '.join(sorted(TORCHVISION))}")
    from torchvision import datasets

    kind, splits = getattr(datasets, name), TORCHVISION[name]
    folder = (cache or cache_folder("data")) / f"torchvision-{name}"

    def download(draft: Path) -> Path:
        try:
            for options in splits.values():
                kind(draft, download=True, **options)
        except Exception as error:  # torchvision and its dependencies raise nearly every kind of error
            raise UserError(
                f"torchvision:{name} cannot be downloaded to {folder} ({reason_of(error)}); check the "
                "network and the disk, or give a folder with one folder per class"
            ) from error
        return draft

    with contextlib.redirect_stdout(sys.stderr):  # torchvision prints
        make_once(folder, download)
        try:
            parts = {split: kind(folder, **options) for split, options in splits.items()}
        except (RuntimeError, ImportError, OSError) as error:
            raise UserError(
                f"torchvision:{name} cannot be read ({reason_of(error)}); remove {folder} to download it "
                "again"
            ) from error
    first = next(iter(parts.values()))
    classes = [*map(str, getattr(first, "classes", None) or first.categories)]
    rows: list[ClassRow] = []
    for split, part in parts.items():
        # torchvision has several names for labels, and reading them image by image would decode all images.
        labels = next(getattr(part, name) for name in _LABELS if hasattr(part, name))
        for row, label in enumerate(labels):
            title = f"torchvision:{name} {split or 'image'} {row}"
            stored = StoredImage(title, part, row, 0, contextlib.nullcontext())
            rows.append((stored, classes[int(label)], split))
    return ClassSet.of(rows, classes, {})


def read_hub_classes(text: str) -> ClassSet:
    """Read a Hugging Face data set with a column of the type Image and one of the type ClassLabel.

    Args:
        text: as for `HubDataset.parse`.

    Raises:
        UserError: it cannot be loaded, or no column clearly holds images or classes.
    """
    rows: list[ClassRow] = []
    left_out: dict[str, str] = {}
    classes: list[str] = []
    for name, data, split in HubDataset.parse(text).splits():
        image, label = _column(text, data.features, "Image"), _column(text, data.features, "ClassLabel")
        classes = data.features[label].names
        images = data.cast_column(image, type(data.features[image])(decode=False)).select_columns([image])
        lock = threading.Lock()
        hidden = 0
        for row, number in enumerate(data[label]):
            if isinstance(number, int) and number >= 0:
                stored = StoredImage(f"{text} {name} {row}", images, row, image, lock)
                rows.append((stored, classes[number], split))
            else:  # None, or -1 for hidden labels
                hidden += 1
        if hidden:
            left_out[f"{hidden} images of {name}"] = "they have no class"
    if len(used := {number for _, number, _ in rows}) < 2:
        raise UserError(f"{text} has images of {len(used)} classes; expected two or more classes")
    return ClassSet.of(rows, classes, left_out)


def _column(text: str, features: Mapping[str, Any], kind: str) -> str:
    """Return the column of this type, or, among several, the one with a usual name."""
    typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
    usual = [name for name in typed if name.lower() in ("image", "img", "label", "fine_label", "class")]
    chosen = typed if len(typed) == 1 else usual
    if len(chosen) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(f"{text} has the columns {columns}; expected one column of the type {kind}")
    return chosen[0]
