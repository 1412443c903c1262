"""Pictures with a class each: folders of classes or a table, and what the classes are called.

Data sets by name are in `named.py`, which calls `read_classes` for everything else.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from clip_lightning.data.formats import SPLIT_WORDS
from clip_lightning.data.readers import IMAGE_COLUMNS, PICTURE_SUFFIXES, read_lines
from clip_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CLASS_COLUMNS = ("label", "class", "class_name", "category", "target")
# Caltech-101's folder of whatever a search engine found: not a class, and left out by its authors' protocol.
_NO_CLASS = {"BACKGROUND_Google", "__MACOSX"}


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
            whose pictures are named from its own folder.

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
    folders = [folder for folder in _folders(root, left_out) if _has_pictures(folder)]
    if folders and all(folder.name.lower() in SPLIT_WORDS for folder in folders):
        parts = [(SPLIT_WORDS[folder.name.lower()], _folders(folder, left_out)) for folder in folders]
        return [row for split, inner in parts for folder in inner for row in _pictures(folder, split)]
    return [row for folder in folders for row in _pictures(folder, None)]


def _folders(root: Path, left_out: dict[str, str]) -> list[Path]:
    found = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    left_out |= {path.name: "it is no class" for path in found if path.name in _NO_CLASS}
    return [path for path in found if path.name not in _NO_CLASS]


def _has_pictures(folder: Path) -> bool:
    return any(_is_picture(file) for _, _, files in os.walk(folder) for file in files)


def _is_picture(file: str) -> bool:
    return file.lower().endswith(PICTURE_SUFFIXES) and not file.startswith(".")


def _pictures(folder: Path, split: str | None) -> list[_Row]:
    """All pictures below a class's folder."""
    found = sorted(
        Path(place, file) for place, _, files in os.walk(folder) for file in files if _is_picture(file)
    )
    return [(path, folder.name, split) for path in found]


def _table_rows(path: Path, left_out: dict[str, str]) -> list[_Row]:
    lines = list(read_lines(path))
    tabs = path.suffix.lower() == ".tsv" or "\t" in (lines or [""])[0]
    reader = csv.DictReader(lines, delimiter="\t" if tabs else ",")
    names = {name.strip().lower(): name for name in reader.fieldnames or []}
    image = next((names[name] for name in IMAGE_COLUMNS if name in names), None)
    label = next((names[name] for name in CLASS_COLUMNS if name in names), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(names) or 'of no table'}; expected image (or "
            f"{', '.join(IMAGE_COLUMNS[1:4])}) and label (or {', '.join(CLASS_COLUMNS[1:4])})"
        )
    rows: list[_Row] = []
    for record in reader:
        name, kind = (record[image] or "").strip(), (record[label] or "").strip()
        word = (record.get(names.get("split", "")) or "").strip().lower()
        if word and word not in SPLIT_WORDS:
            raise UserError(f"{path} has a split {word!r}; expected {', '.join(SPLIT_WORDS)}")
        if not name or not kind:
            left_out[f"{path.name} line {reader.line_num}"] = "it has no image or no label"
        elif not (path.parent / name).is_file():
            left_out[name] = "there is no such picture"
        else:
            rows.append((path.parent / name, kind, SPLIT_WORDS.get(word)))
    return rows


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers in their order, before words."""
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


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
    """The names of each class, with synonyms where a file has them.

    Args:
        classes: as the source calls them.
        file: `.json`: an object from class to a name or a list of names, or a list in the order of
            `classes`; `.csv` or `.tsv`: the class, then its names, no header; anything else: one line a class
            in the order of `classes`, with commas between its names.

    Raises:
        UserError: the file cannot be read, or does not fit the classes.
    """
    if file is None:
        return [[clean_name(name)] for name in classes]
    given = _read_names(file)
    if isinstance(given, dict):
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
    return given


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
