"""Data sets of classes that torchvision downloads by itself, such as `torchvision:CIFAR10`."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_lightning.data.classes import ClassSet
from clip_lightning.data.images import BrokenImage
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, make_once

Splits = Mapping[str | None, Mapping[str, Any]]
"""Our split (None: the data set has no splits) → the arguments that choose it."""

_BY_FLAG: Splits = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: Splits = {None: {}}
_THREE: Splits = {split: {"split": split} for split in ("train", "val", "test")}
_TWO: Splits = {split: {"split": split} for split in ("train", "test")}
SETS: dict[str, Splits] = {
    "CIFAR10": _BY_FLAG,
    "CIFAR100": _BY_FLAG,
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": {**_TWO, "val": {"split": "valid"}},
    "DTD": _THREE,
    "EuroSAT": _WHOLE,
    "FGVCAircraft": _THREE,
    "FashionMNIST": _BY_FLAG,
    "Flowers102": _THREE,
    "Food101": _TWO,
    "MNIST": _BY_FLAG,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "RenderedSST2": _THREE,
    "STL10": _TWO,
    "SUN397": _WHOLE,
}
# Faults of this machine, which `make_once` tells by themselves; a server that is away has others.
_LOCAL = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def read_torchvision(name: str, cache: Path | None = None) -> ClassSet:
    """The data set of this name, with its own splits; downloaded once, whole or not at all.

    Args:
        name: one of `SETS`.
        cache: folder that keeps it; the user's cache folder by default.

    Raises:
        UserError: the name is unknown, or the download failed.
    """
    if name not in SETS:
        raise UserError(f"torchvision:{name} is unknown; expected one of {', '.join(SETS)}")
    from torchvision import datasets

    kind, splits = getattr(datasets, name), SETS[name]

    def download(draft: Path) -> Path:
        try:
            for options in splits.values():
                kind(draft, download=True, **options)
        except Exception as error:  # torchvision and what it calls raise nearly every kind
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise
            raise UserError(
                f"torchvision:{name} cannot be downloaded ({_reason(error)}); check the network, or give a "
                "folder of class folders"
            ) from error
        return draft

    with contextlib.redirect_stdout(sys.stderr):  # torchvision prints
        folder = (cache or cache_folder("data")) / f"torchvision-{name}"
        make_once(folder, download)
        try:
            parts = {split: kind(folder, **options) for split, options in splits.items()}
        except (RuntimeError, ImportError, OSError) as error:
            raise UserError(
                f"torchvision:{name} cannot be read ({_reason(error)}); remove {folder}, and it is "
                "downloaded again"
            ) from error
    return _class_set(name, parts)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


@dataclass(frozen=True, slots=True)
class _Item:
    """One picture, read as torchvision reads it."""

    source: Any
    row: int
    name: str

    def pixels(self) -> Tensor:
        try:
            image, _ = self.source[self.row]
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:  # files make Pillow raise nearly every kind of error
            raise BrokenImage(_reason(error)) from error

    def __str__(self) -> str:
        return f"{self.name} {self.row}"


def _class_set(name: str, parts: Mapping[str | None, Any]) -> ClassSet:
    pictures: list[_Item] = []
    labels: list[int] = []
    splits: list[str | None] = []
    for split, part in parts.items():
        found = [int(label) for label in _labels(part)]
        title = f"torchvision:{name} {split or 'picture'}"
        pictures += [_Item(part, row, title) for row in range(len(found))]
        labels += found
        splits += [split] * len(found)
    first = next(iter(parts.values()))
    classes = getattr(first, "classes", None) or first.categories
    return ClassSet(tuple(pictures), tuple(labels), tuple(splits), tuple(map(str, classes)))


def _labels(part: Any) -> Any:
    """Torchvision has no one name for them; to ask for the pictures' own would decode them all."""
    return next(getattr(part, name) for name in ("targets", "labels", "_labels", "y") if hasattr(part, name))
