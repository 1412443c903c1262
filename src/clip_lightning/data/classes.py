"""Pictures with a class each: folders of classes or a table, and what the classes are called.

Data sets by name are in `named.py`, which calls `read_classes` for everything else.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.columns import IMAGE_NAMES, Columns
from clip_lightning.data.formats import Finder
from clip_lightning.data.image_formats import is_image, walk
from clip_lightning.data.readers import read_lines, read_table
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

if TYPE_CHECKING:
    from torch import Tensor

CLASS_COLUMNS = ("label", "class", "class_name", "category", "target")
# Caltech-101's folder of whatever a search engine found: not a class, and left out by its authors' protocol.
_NO_CLASS = {"BACKGROUND_Google"}
_MOST_SHOWN = 30


class StoredPicture(Protocol):
    """A picture within a larger file, read when it is asked for; `str()` names it."""

    def pixels(self) -> Tensor:
        """RGB, uint8 (3, H, W), or BrokenImage; called from several threads."""
        ...


Picture = Path | StoredPicture


@dataclass(frozen=True)
class ClassSet:
    """Pictures of classes.

    Attributes:
        pictures: files, or what else gives pixels.
        labels: for each its class, a position in `classes`.
        splits: for each `train`, `val` or `test`, None where the source names none.
        classes: as the source calls them, in order.
        left_out: name → reason, for what could not be used.
    """

    pictures: tuple[Picture, ...]
    labels: tuple[int, ...]
    splits: tuple[str | None, ...]
    classes: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    def rows(self, split: str) -> list[int]:
        """The positions of the pictures of a split, or of `all`."""
        return [row for row, name in enumerate(self.splits) if split in ("all", name)]


def read_classes(root: Path) -> ClassSet:
    """Read a folder of class folders, such folders below train, val and test, or a table.

    Args:
        root: the folder, or a CSV or TSV file with the columns `image` and `label` (an optional `split`),
            whose images are named from its own folder.

    Raises:
        UserError: there is nothing to read, or fewer than two classes.
    """
    if not root.exists():
        raise UserError(
            f"there is no folder or file {root}; give a folder of class folders, or a CSV with the columns "
            "image and label"
        )
    left_out: dict[str, str] = {}
    rows = _folder_rows(root, left_out) if root.is_dir() else _table_rows(root, left_out)
    classes = tuple(sorted({label for _, label, _ in rows}, key=_natural))
    if len(classes) < 2:
        raise UserError(
            f"{root} holds {len(classes)} classes with pictures; expected two or more folders of pictures, "
            "or a CSV with the columns image and label"
        )
    number = {name: place for place, name in enumerate(classes)}
    paths, names, splits = zip(*rows, strict=True)
    return ClassSet(paths, tuple(number[name] for name in names), splits, classes, left_out)


_Row = tuple[Path, str, str | None]


def _folder_rows(root: Path, left_out: dict[str, str]) -> list[_Row]:
    passed_over: Counter[str] = Counter()
    images = [
        Path(folder, file) for folder, files in walk(root, passed_over) for file in files if is_image(file)
    ]
    folders = {image: image.relative_to(root).parts[:-1] for image in images}
    left_out |= {f"{count} {what}": "they are passed over" for what, count in passed_over.items()}
    left_out |= {
        name: "it is not a class" for parts in folders.values() for name in parts[:2] if name in _NO_CLASS
    }
    folders = {image: parts for image, parts in folders.items() if parts and _NO_CLASS.isdisjoint(parts[:2])}
    if folders and all(parts[0].lower() in SPLIT_WORDS for parts in folders.values()):
        parted = {image: parts for image, parts in sorted(folders.items()) if len(parts) > 1}
        return [(image, parts[1], SPLIT_WORDS[parts[0].lower()]) for image, parts in parted.items()]
    return [(image, parts[0], None) for image, parts in sorted(folders.items())]


def _table_rows(path: Path, left_out: dict[str, str]) -> list[_Row]:
    finder, columns = Finder([path.parent], path.parent), None
    rows: list[_Row] = []
    for number, record in enumerate(read_table(path, lambda record: _class_columns(path, record)), start=1):
        columns = columns or _class_columns(path, record)
        name, kind = record[columns.image].strip(), record[columns.captions[0]].strip()
        word = record[columns.split].strip().lower() if columns.split else ""
        if word and word not in SPLIT_WORDS:
            raise UserError(f"{path} has a split {word!r}; expected {', '.join(SPLIT_WORDS)}")
        if not name or not kind:
            left_out[f"{path.name} row {number}"] = "it has no image or no label"
        elif (image := finder.find(name)) is None:
            left_out[name] = finder.explain(name)
        else:
            rows.append((image, kind, SPLIT_WORDS.get(word)))
    return rows


def _class_columns(path: Path, record: Mapping[str, str]) -> Columns:
    """The columns of a table of classes, the label in place of a caption."""
    names = {name.lower(): name for name in record}
    image = next((names[name] for name in IMAGE_NAMES if name in names), None)
    label = next((names[name] for name in CLASS_COLUMNS if name in names), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(names) or 'of no table'}; expected image (or "
            f"{', '.join(IMAGE_NAMES[1:4])}) and label (or {', '.join(CLASS_COLUMNS[1:4])})"
        )
    return Columns(image, (label,), names.get("split"))


def _natural(name: str) -> tuple[bool, list[tuple[int, str]], str]:
    """Sort numbers within a name by their value, and names that are numbers before others."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    numbers = [(int(part), "") if part[0].isascii() and part.isdigit() else (-1, part) for part in parts]
    return not (name.isascii() and name.isdigit()), numbers, name


# What classes are called ----------------------------------------------------------------------------------


def clean_name(name: str) -> str:
    """A folder's name as one would write it in a caption.

    WordNet ids and counting numbers in front go, underscores and joined Words are taken apart:
    `n02123045_tabby` is `tabby`, `017.Cardinal` is `Cardinal`, `AnnualCrop` is `annual crop`. A name of which
    nothing would be left stays as it is.
    """
    words = re.sub(r"^(n\d{8}|\d+)[._\- ]+(?=.*[^\W\d_])", "", name)
    if not re.search(r"[_\s]", words) and re.fullmatch(r"(?:[A-Z][a-z]+){2,}", words):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).lower()
    return " ".join(words.replace("_", " ").split()) or name


def class_names(classes: Sequence[str], file: Path | None = None) -> list[list[str]]:
    """Return the names of each class, with synonyms if a file has them; a pairing by order is printed.

    Args:
        classes: as the source calls them.
        file: `.json`: an object from class to a name or a list of names, or a list in the order of
            `classes`; `.csv` or `.tsv`: the class, then its names, no header; anything else: one line per
            class in the order of `classes`, names separated by commas, or with the class in front. ImageNet's
            `imagenet_class_index.json` and `LOC_synset_mapping.txt` are read too.

    Raises:
        UserError: the file cannot be read, or does not fit the classes.
    """
    if file is None:
        if any(re.fullmatch(r"n\d{8}|\d+", clean_name(name)) for name in classes):
            print(
                f"warning: classes are called by numbers ({', '.join(classes[:3])}, ...), which mean nothing "
                "to a model; name them by --names FILE",
                file=sys.stderr,
            )
        return [[clean_name(name)] for name in classes]
    given = _read_names(file)
    if isinstance(given, list):
        given = _keyed(given, classes)
    if isinstance(given, dict):
        if (ids := {names[0]: names[1:] for names in given.values()}).keys() >= set(classes):
            given = ids  # imagenet_class_index.json: {"0": ["n01440764", "tench"]}
        if not given.keys() & set(classes):
            raise UserError(
                f"--names {file} names none of the {len(classes)} classes ({classes[0]} ...); its keys must "
                f"be the classes of the data, and {next(iter(given), 'nothing')} is the first"
            )
        return [given.get(name) or [clean_name(name)] for name in classes]
    if len(given) != len(classes):
        raise UserError(
            f"--names {file} has {len(given)} entries for {len(classes)} classes; give one for each, in "
            "order, or a JSON object from class to name"
        )
    pairs = [f"{name} = {names[0]}" for name, names in zip(classes, given, strict=True)]
    shown = pairs if len(pairs) <= _MOST_SHOWN else [*pairs[: _MOST_SHOWN - 1], "...", pairs[-1]]
    print(one_line(f"--names {file} by order: {', '.join(shown)}"), file=sys.stderr)
    return given


def _keyed(lines: list[list[str]], classes: Sequence[str]) -> dict[str, list[str]] | list[list[str]]:
    """Take the class from the front of every line, if all are there: `n01440764 tench, Tinca tinca`."""
    split = [names[0].partition("\t" if "\t" in names[0] else " ") for names in lines]
    keyed = {
        key: [name, *names[1:]] for (key, _, name), names in zip(split, lines, strict=True) if name.strip()
    }
    return keyed if keyed.keys() >= set(classes) else lines


def _read_names(file: Path) -> dict[str, list[str]] | list[list[str]]:
    if not file.is_file():
        raise UserError(f"--names {file}: there is no such file")
    lines = [line for line in read_lines(file) if line.strip()]
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv"):
        rows = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",")
        cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        return {key: names for key, *names in filter(None, cells) if names}
    if suffix != ".json":
        return [
            [name.strip() for name in line.split(",") if name.strip()] or [line.strip()] for line in lines
        ]
    wrong = f"--names {file} is not a JSON object from class to name or names, nor a list of them"
    try:
        given = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{wrong}: {error}") from error
    if not isinstance(given, (dict, list)):
        raise UserError(wrong)
    values = list(given.values()) if isinstance(given, dict) else given
    names = [[value] if isinstance(value, str) else value for value in values]
    for entry in names:
        if not isinstance(entry, list) or not entry or not all(isinstance(name, str) for name in entry):
            raise UserError(f"{wrong}: it holds {json.dumps(entry)[:60]}")
    return dict(zip(given, names, strict=True)) if isinstance(given, dict) else names
