"""Read images with classes from folders, tables and Hugging Face data sets, and the classes' names."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.formats import NothingFound, read_captions
from clip_lightning.data.image_formats import is_image, walk
from clip_lightning.data.images import BrokenImage
from clip_lightning.data.readers import NoColumn, ReadOptions, file_head, find_names, read_lines
from clip_lightning.data.sources import HubDataset, undecoded
from clip_lightning.errors import UserError, as_user_error
from clip_lightning.terminal import note

_CLASS_NAMES = ("label", "class", "class_name", "category", "target")
# Caltech-101's folder of arbitrary search results is not a class, and its authors' protocol leaves it out.
_NO_CLASS = "BACKGROUND_Google"

ClassRow = tuple[Any, str, str | None]
"""A file or anything else that `to_pixels` accepts, its class, and `train`, `val`, `test` or None."""


@dataclass(frozen=True)
class ClassSet:
    """Images with a class each.

    Attributes:
        labels: the class of each image, as a position in `classes`.
        splits: `train`, `val`, `test` or None for each image.
        left_out: name → reason, for images and rows that could not be used.
    """

    images: tuple[Any, ...]
    labels: tuple[int, ...]
    splits: tuple[str | None, ...]
    classes: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    def rows(self, split: str) -> list[int]:
        """Return the positions of the images of a split, or of all images for `all`."""
        return [row for row, name in enumerate(self.splits) if split in ("all", name)]


def check_name(place: str) -> None:
    """Raise UserError if a place is neither a file or folder nor the name of a Hugging Face data set."""
    if not Path(place).exists() and not place.startswith("hf:"):
        raise UserError(
            f"the folder or file {place} does not exist; give a folder with one folder per class, a CSV file "
            "with the columns image and label, or hf:OWNER/NAME, such as hf:uoft-cs/cifar10"
        )


def find_classes(place: str | Path) -> ClassSet:
    """Read images and their classes; data that is downloaded by name is cached on this machine.

    Args:
        place: a folder of class folders, also in train, val and test; a table with the columns `image`
            (relative to its folder), `label` and optionally `split`; or `hf:OWNER/NAME[:SUBSET]`, also with
            a local folder of the package `datasets`.
    """
    check_name(str(place))
    root = Path(place)
    left_out: dict[str, str] = {}
    classes: Sequence[str] = ()
    if root.exists():
        rows = (_folder_rows if root.is_dir() else _table_rows)(root, left_out)
    else:
        rows, classes = _read_hub(str(place), left_out)
    used = {label for _, label, _ in rows}
    if len(used) < 2:
        raise UserError(
            f"{place} has {len(used)} classes with images; expected two or more folders of images, or a CSV "
            "file with the columns image and label"
        )

    def natural(name: str) -> tuple[list[str | int], str]:  # numbers are sorted by value
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name

    classes = tuple(classes or sorted(used, key=natural))
    number = {name: place for place, name in enumerate(classes)}
    images, names, splits = zip(*rows, strict=True)
    return ClassSet(images, tuple(number[name] for name in names), splits, classes, left_out)


def _folder_rows(root: Path, left_out: dict[str, str]) -> list[ClassRow]:
    skipped: Counter[str] = Counter()
    found = [
        (Path(folder, file), Path(folder).relative_to(root).parts)
        for folder, files in walk(root, skipped)
        for file in filter(is_image, files)
    ]
    left_out |= {f"{count} {kind}": "they are skipped" for kind, count in skipped.items()}
    if any(_NO_CLASS in parts[:2] for _, parts in found):
        left_out[_NO_CLASS] = "it is not a class"
    images = sorted((image, parts) for image, parts in found if parts and _NO_CLASS not in parts[:2])
    if images and all(parts[0].lower() in SPLIT_WORDS for _, parts in images):
        return [(image, parts[1], SPLIT_WORDS[parts[0].lower()]) for image, parts in images if parts[1:]]
    return [(image, parts[0], None) for image, parts in images]


def _table_rows(path: Path, left_out: dict[str, str]) -> list[ClassRow]:
    """Read a table like one of captions, with the label as the caption."""
    header = file_head(path).partition("\n")[0].strip()
    label = next(iter(find_names(_CLASS_NAMES, re.findall(r"\w+", header))), "label")
    try:
        data = read_captions(path, ReadOptions(caption_column=label))
    except NothingFound:
        return []
    except NoColumn:
        raise UserError(
            f"{path} begins with {header[:80]!r}; expected the columns image and label (or "
            f"{', '.join(_CLASS_NAMES[1:])})"
        ) from None
    left_out |= {name: reason.replace("no caption", "no label") for name, reason in data.left_out.items()}
    return [(image.path, name, image.split) for image in data.images for name in image.captions]


# Hugging Face data sets, whose images are read on demand ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a data set, with a name for messages."""

    name: str
    source: HubDataset
    data: Any
    row: int
    column: str
    lock: threading.Lock

    def read(self) -> bytes:
        """Return the encoded image; several threads may call this."""
        with self.lock:
            value = self.data[self.row][self.column]
        content = self.source.content(value)
        if isinstance(content, str):
            raise BrokenImage(content)
        return content


def _read_hub(text: str, left_out: dict[str, str]) -> tuple[list[ClassRow], list[str]]:
    """Read a Hugging Face data set with a column of the type Image and one of the type ClassLabel."""
    rows: list[ClassRow] = []
    classes: list[str] = []
    source = HubDataset.parse(text)
    for name, data, split in source.splits():
        image, label = _column(text, data.features, "Image"), _column(text, data.features, "ClassLabel")
        classes = data.features[label].names
        images, lock = undecoded(data, image).select_columns([image]), threading.Lock()
        before = len(rows)
        for row, number in enumerate(data[label]):
            if number is not None and number >= 0:  # -1 stands for a hidden label
                stored = StoredImage(f"{text} {name} {row}", source, images, row, image, lock)
                rows.append((stored, classes[number], split))
        if hidden := len(data) - len(rows) + before:
            left_out[f"{hidden} images of {name}"] = "they have no class"
    return rows, classes


def _column(text: str, features: Mapping[str, Any], kind: str) -> str:
    """Return the column of this type, or, among several, the one with a usual name."""
    types = {name: type(feature).__name__ for name, feature in features.items()}
    typed = [name for name in types if types[name] == kind]
    usual = [name for name in typed if name.lower() in ("image", "img", "label", "fine_label", "class")]
    if len(typed) != 1 and len(usual) != 1:
        raise UserError(f"{text} has the columns {types}; expected one column of the type {kind}")
    return (usual or typed)[0]


# Names of classes ------------------------------------------------------------------------------------------


def clean_name(name: str) -> str:
    """Return the name of a class folder as it would be written in a caption.

    `n02123045_tabby` becomes `tabby`, `017.Fox_Sparrow` becomes `Fox Sparrow`, and `AnnualCrop` becomes
    `annual crop`. If nothing would be left, the name is unchanged.
    """
    words = re.sub(r"^(n\d{8}|\d+)[._\- ]+(?=.*[^\W\d_])", "", name)
    if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", words):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).lower()
    return " ".join(words.replace("_", " ").split()) or name


def class_names(classes: Sequence[str], file: Path | None = None) -> list[list[str]]:
    """Return the names of each class, including synonyms from a file; a match by order is printed.

    A `.json` file is an object from class to a name or a list of names, or a list in the order of `classes`.
    A text file has one line per class, in the order of `classes` or with the class first, with names
    separated by commas. ImageNet's `imagenet_class_index.json` and `LOC_synset_mapping.txt` can be read, too.
    """
    if file is None:
        if any(re.fullmatch(r"n\d{8}|\d+", clean_name(name)) for name in classes):
            note(
                f"warning: the class names are numbers ({', '.join(classes[:3])}, ...), which mean nothing "
                "to a model; give names with --names FILE"
            )
        return [[clean_name(name)] for name in classes]
    given = _read_names(file, classes)
    if isinstance(given, list) and len(given) == len(classes):
        given = dict(zip(classes, given, strict=True))
        pairs = [f"{name} = {names[0]}" for name, names in given.items()]
        shown = pairs if len(pairs) <= 30 else [*pairs[:29], "...", pairs[-1]]
        note(f"--names {file} is matched by order: {', '.join(shown)}")
    if isinstance(given, list) or not given.keys() & set(classes):
        raise UserError(
            f"--names {file} has {len(given)} entries (first: {next(iter(given), 'none')}) that do not match "
            f"the {len(classes)} classes ({classes[0]}, ...); give one entry per class, in order, or an "
            "object from class to name"
        )
    if lacking := [name for name in classes if name not in given]:
        note(
            f"warning: --names {file} has no names for {len(lacking)} of {len(classes)} classes "
            f"({', '.join(lacking[:3])}), which keep the names of their folders"
        )
    return [given.get(name) or [clean_name(name)] for name in classes]


def _read_names(file: Path, classes: Sequence[str]) -> dict[str, list[str]] | list[list[str]]:
    """Return class → names, or a list of names in the order of the classes."""
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv") or not file.is_file():
        problem = "is a table" if file.is_file() else "does not exist"
        raise UserError(f"--names {file} {problem}; give a JSON file or a text file with one line per class")
    lines = [line.strip() for line in read_lines(file) if line.strip()]
    if suffix == ".json":
        with as_user_error(
            f"--names {file}", "expected a JSON object from class to name or names, or a list of names"
        ):
            given = json.loads("\n".join(lines))
            entries = [*(given.values() if isinstance(given, dict) else given)]
            names = [[entry] if isinstance(entry, str) else [*map(str.strip, entry)] for entry in entries]
            if not all(entry and all(entry) for entry in names):
                raise ValueError(f"got {lines[0][:60]}")
        if isinstance(given, list):
            return names
        ids = {key: others for key, *others in names}  # imagenet_class_index.json has number → [id, name]
        return ids if ids.keys() >= set(classes) else dict(zip(given, names, strict=True))
    names = [[name.strip() for name in line.split(",") if name.strip()] or [line] for line in lines]
    # Every line may begin with its class: `n01440764 tench, Tinca tinca`.
    parts = [(first.split("\t" if "\t" in first else " ", 1), others) for first, *others in names]
    keyed = {key: [name.strip(), *others] for (key, *rest), others in parts for name in rest}
    return keyed if keyed.keys() >= set(classes) else names
