"""Read images with classes from folders and tables, and the names of the classes."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_lightning.data.captions import SPLIT_WORDS, parse_split
from clip_lightning.data.columns import CLASS_NAMES, IMAGE_NAMES, Columns
from clip_lightning.data.formats import Finder
from clip_lightning.data.image_formats import is_image, walk
from clip_lightning.data.readers import read_lines, read_table
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

# Caltech-101's folder of arbitrary search results is not a class, and its authors' protocol leaves it out.
_NO_CLASS = {"BACKGROUND_Google"}
_MOST_SHOWN = 30

ClassRow = tuple[Any, str, str | None]
"""A file or anything else that `to_pixels` accepts, its class, and `train`, `val`, `test` or None."""


@dataclass(frozen=True)
class ClassSet:
    """Images with a class each.

    Attributes:
        images: files, or anything else that `to_pixels` accepts.
        labels: the class of each image, as a position in `classes`.
        splits: the split of each image, `train`, `val` or `test`, or None if the source has no splits.
        classes: the names of the classes in the source, in order.
        left_out: name → reason, for images and rows that could not be used.
    """

    images: tuple[Any, ...]
    labels: tuple[int, ...]
    splits: tuple[str | None, ...]
    classes: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[ClassRow], classes: Sequence[str], left_out: dict[str, str]) -> ClassSet:
        """Combine rows whose labels are among `classes`."""
        number = {name: place for place, name in enumerate(classes)}
        images, names, splits = zip(*rows, strict=True)
        return cls(images, tuple(number[name] for name in names), splits, tuple(classes), left_out)

    def rows(self, split: str) -> list[int]:
        """Return the positions of the images of a split, or of all images for `all`."""
        return [row for row, name in enumerate(self.splits) if split in ("all", name)]


def check_name(place: str) -> None:
    """Raise UserError if a place is neither a file or folder nor a name with a known prefix."""
    if not Path(place).exists() and place.partition(":")[0] not in ("torchvision", "hf"):
        raise UserError(
            f"the folder or file {place} does not exist; give a folder with one folder per class, a CSV file "
            "with the columns image and label, torchvision:NAME or hf:OWNER/NAME"
        )


def read_classes(root: Path) -> ClassSet:
    """Read a folder with one folder per class, or with such folders in train, val and test, or a table.

    Args:
        root: the folder, or a CSV or TSV file with the columns `image`, `label` and optionally `split`, where
            images are named relative to the file's folder.

    Raises:
        UserError: the data does not exist, or has fewer than two classes.
    """
    check_name(str(root))
    left_out: dict[str, str] = {}
    rows = _folder_rows(root, left_out) if root.is_dir() else _table_rows(root, left_out)
    classes = tuple(sorted({label for _, label, _ in rows}, key=_natural))
    if len(classes) < 2:
        raise UserError(
            f"{root} has {len(classes)} classes with images; expected two or more folders of images, or a "
            "CSV file with the columns image and label"
        )
    return ClassSet.of(rows, classes, left_out)


def _folder_rows(root: Path, left_out: dict[str, str]) -> list[ClassRow]:
    passed_over: Counter[str] = Counter()
    images = {
        Path(folder, file): Path(folder).relative_to(root).parts
        for folder, files in walk(root, passed_over)
        for file in filter(is_image, files)
    }
    left_out |= {f"{count} {kind}": "they are skipped" for kind, count in passed_over.items()}
    for name in {name for parts in images.values() for name in parts[:2]} & _NO_CLASS:
        left_out[name] = "it is not a class"
    images = {image: parts for image, parts in images.items() if parts and _NO_CLASS.isdisjoint(parts[:2])}
    if images and all(parts[0].lower() in SPLIT_WORDS for parts in images.values()):
        splits = {image: SPLIT_WORDS[parts[0].lower()] for image, parts in images.items()}
        return [
            (image, images[image][1], splits[image]) for image in sorted(images) if len(images[image]) > 1
        ]
    return [(image, images[image][0], None) for image in sorted(images)]


def _table_rows(path: Path, left_out: dict[str, str]) -> list[ClassRow]:
    finder, columns = Finder([path.parent], path.parent), None
    rows: list[ClassRow] = []
    for number, record in enumerate(read_table(path, lambda record: _class_columns(path, record)), start=1):
        columns = columns or _class_columns(path, record)
        name, label = record[columns.image].strip(), record[columns.captions[0]].strip()
        split = parse_split(record[columns.split], path) if columns.split else None
        if not name or not label:
            left_out[f"{path.name} row {number}"] = "it has no image or no label"
        elif (image := finder.find(name)) is None:
            left_out[name] = finder.explain(name)
        else:
            rows.append((image, label, split))
    return rows


def _class_columns(path: Path, record: Mapping[str, str]) -> Columns:
    """Return the columns of a table of classes, with the label instead of a caption."""
    names = {name.lower(): name for name in record}
    image = next((names[name] for name in IMAGE_NAMES if name in names), None)
    label = next((names[name] for name in CLASS_NAMES if name in names), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(names) or '(none)'}; expected image (or "
            f"{', '.join(IMAGE_NAMES[1:4])}) and label (or {', '.join(CLASS_NAMES[1:4])})"
        )
    return Columns(image, (label,), names.get("split"))


def _natural(name: str) -> tuple[bool, list[tuple[int, str]], str]:
    """Return a key that sorts numbers in names by value, and names that are numbers before others."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    numbers = [(int(part), "") if part[0].isascii() and part.isdigit() else (-1, part) for part in parts]
    return not (name.isascii() and name.isdigit()), numbers, name


# Names of classes ------------------------------------------------------------------------------------------


def clean_name(name: str) -> str:
    """Return the name of a class folder as it would be written in a caption.

    Leading WordNet ids and counting numbers are removed, underscores become spaces and joined words are
    separated: `n02123045_tabby` becomes `tabby`, `017.Cardinal` becomes `Cardinal`, and `AnnualCrop` becomes
    `annual crop`. If nothing would be left, the name is unchanged.
    """
    words = re.sub(r"^(n\d{8}|\d+)[._\- ]+(?=.*[^\W\d_])", "", name)
    if not re.search(r"[_\s]", words) and re.fullmatch(r"(?:[A-Z][a-z]+){2,}", words):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).lower()
    return " ".join(words.replace("_", " ").split()) or name


def class_names(classes: Sequence[str], file: Path | None = None) -> list[list[str]]:
    """Return the names of each class, including synonyms from a file; a match by order is printed.

    Args:
        classes: the names of the classes in the source.
        file: `.json`: an object from class to a name or a list of names, or a list in the order of
            `classes`; `.csv` or `.tsv`: the class, then its names, without a header; any other suffix: one
            line per class, in the order of `classes`, with names separated by commas, or with the class
            first. ImageNet's `imagenet_class_index.json` and `LOC_synset_mapping.txt` can be read, too.

    Raises:
        UserError: the file cannot be read, or does not match the classes.
    """
    if file is None:
        if any(re.fullmatch(r"n\d{8}|\d+", clean_name(name)) for name in classes):
            print(
                f"warning: the class names are numbers ({', '.join(classes[:3])}, ...), which mean nothing "
                "to a model; give names with --names FILE",
                file=sys.stderr,
            )
        return [[clean_name(name)] for name in classes]
    given = _read_names(file, classes)
    if isinstance(given, dict):
        if (ids := {names[0]: names[1:] for names in given.values()}).keys() >= set(classes):
            given = ids  # imagenet_class_index.json: {"0": ["n01440764", "tench"]}
        if not given.keys() & set(classes):
            raise UserError(
                f"--names {file} has none of the {len(classes)} classes ({classes[0]}, ...); expected the "
                f"classes of the data as keys, but the first key is {next(iter(given), 'missing')}"
            )
        return [given.get(name) or [clean_name(name)] for name in classes]
    if len(given) != len(classes):
        raise UserError(
            f"--names {file} has {len(given)} entries for {len(classes)} classes; give one entry per class, "
            "in order, or a JSON object from class to name"
        )
    pairs = [f"{name} = {names[0]}" for name, names in zip(classes, given, strict=True)]
    shown = pairs if len(pairs) <= _MOST_SHOWN else [*pairs[: _MOST_SHOWN - 1], "...", pairs[-1]]
    print(one_line(f"--names {file} is matched by order: {', '.join(shown)}"), file=sys.stderr)
    return given


def _read_names(file: Path, classes: Sequence[str]) -> dict[str, list[str]] | list[list[str]]:
    """Return class → names, or a list of names in the order of the classes."""
    if not file.is_file():
        raise UserError(f"--names {file} does not exist; give a JSON, CSV or text file")
    lines, suffix = [line.strip() for line in read_lines(file) if line.strip()], file.suffix.lower()
    if suffix == ".json":
        return _parse_names(file, "\n".join(lines))
    if suffix in (".csv", ".tsv"):
        rows = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",")
        cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        return {key: names for key, *names in filter(None, cells) if names}
    names = [[name.strip() for name in line.split(",") if name.strip()] or [line] for line in lines]
    # Every line may begin with its class: `n01440764 tench, Tinca tinca`.
    parts = [(first.partition("\t" if "\t" in first else " "), others) for first, *others in names]
    keyed = {key: [name, *others] for (key, _, name), others in parts if name.strip()}
    return keyed if keyed.keys() >= set(classes) else names


def _parse_names(file: Path, text: str) -> dict[str, list[str]] | list[list[str]]:
    wrong = f"--names {file}: expected a JSON object from class to name or names, or a list of names"
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{wrong} ({error})") from error
    if not isinstance(given, (dict, list)):
        raise UserError(wrong)
    values = given.values() if isinstance(given, dict) else given
    names = [[value] if isinstance(value, str) else value for value in values]
    for entry in names:
        if not isinstance(entry, list) or not entry or not all(isinstance(name, str) for name in entry):
            raise UserError(f"{wrong}, got {json.dumps(entry)[:60]}")
    return dict(zip(given, names, strict=True)) if isinstance(given, dict) else names
