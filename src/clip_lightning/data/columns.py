"""Find the image, the captions and the split in a record: a row of a table, or a JSON object."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clip_lightning.data.captions import Splits, check_fraction
from clip_lightning.data.image_formats import is_image
from clip_lightning.errors import UserError

IMAGE_NAMES = (
    *("image", "filepath", "file_name", "filename", "path", "image_path", "image_name"),
    *("images", "img", "picture", "photo", "jpg", "png"),
)
CAPTION_NAMES = (
    *("caption", "captions", "text", "title", "comment", "texts", "sentences", "sentence", "raw", "txt"),
    *("description", "prompt", "conversations"),
)
_NUMBERED = re.compile(r"(caption|sentence|text)s?[ _-]?\d+", re.IGNORECASE)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)

Record = Mapping[str, Any]
Row = tuple[str, list[str], str | None]
"""The name of an image, its captions, and its split or None."""


class NoColumn(UserError):
    """There is no column that clearly holds images or captions."""


class Columns(NamedTuple):
    """The names of columns; `split` is None if there is no such column."""

    image: str
    captions: list[str]
    split: str | None

    def read(
        self, source: object, record: Record, images: type | tuple[type, ...] = str
    ) -> tuple[Any, list[str], str | None]:
        """Return the image, which is None or one of the types `images`, the captions and the split."""
        image, cells = record[self.image], [record[name] for name in self.captions]
        split = record[self.split] if self.split else None
        try:
            if not (isinstance(image, images) or image is None) or not isinstance(split, str | None):
                raise TypeError
            return image, [caption for cell in cells for caption in sentences(cell)], split
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):  # ValueError: NumPy arrays
            types = ", ".join(type(value).__name__ for value in (image, *cells, split))
            expected = "a file name" if images is str else "an image"
            hint = f", or hf:{source} if it contains the images themselves"
            raise UserError(
                f"{source} has values of the types {types} as image, caption and split; expected "
                f"{expected}, a sentence or a list of sentences, and train, val or test; give another "
                "--data.root" + (hint if images is str and isinstance(image, dict | bytes) else "")
            ) from None


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading and splitting captioned images.

    Attributes:
        layout: layout of the files; by default it is recognized. `captions` is a table of your own, `folder`
            has pairs of name.jpg and name.txt.
        image_column: column with the images; by default it is recognized by its name or type.
        caption_column: column with the captions, or several columns separated by commas; by default it is
            recognized by its name, as are numbered columns such as `caption_0`.
        image_folder: folder with the images if they are not next to the annotations; if the folders in an
            image's name do not exist there, the image is searched for by the last parts of its name.
        max_broken: largest fraction of images and rows that may be unusable, from 0 to 1; the run stops with
            an error if there are more.
        splits: fractions and seed of random splits, for data without splits.
    """

    layout: Literal["auto", "flickr8k", "flickr30k", "captions", "folder"] = "auto"
    image_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None
    max_broken: float = 0.01
    splits: Splits = field(default_factory=Splits)

    def __post_init__(self) -> None:
        check_fraction("max_broken", self.max_broken)

    def find(self, source: object, record: Record, images: Collection[str] = ()) -> Columns:
        """Choose the columns of a record; of several with usual names for images, the first with a file name.

        Args:
            source: the file or data set, for messages.
            record: name → value of each column.
            images: the columns that are known to hold images, if any.
        """
        usual = find_names(IMAGE_NAMES, images or record)
        if not usual and len(images) == 1:
            usual = [*images]
        image = [name for name in usual if is_image(str(record[name]))] or usual
        if self.image_column:
            image = [self.image_column]
        captions = find_names(CAPTION_NAMES, record)[:1]
        captions += [name for name in record if _NUMBERED.fullmatch(name) and name not in captions]
        if self.caption_column:
            captions = [name.strip() for name in self.caption_column.split(",")]
        for kind, given, columns, names in (
            ("image", self.image_column, image, IMAGE_NAMES),
            ("caption", self.caption_column, captions, CAPTION_NAMES),
        ):
            if not columns or not set(columns) <= record.keys():
                raise NoColumn(
                    f"{source} has no {kind} column{f' {given}' if given else ''}: found "
                    f"{', '.join(record) or 'nothing'}, expected one of {', '.join(names[:7])}; give "
                    f"--data.read.{kind}_column COLUMN, or another --data.root"
                )
        return Columns(image[0], captions, next(iter(find_names(("split",), record)), None))


RECOGNIZED = ReadOptions()


def find_names(names: Iterable[str], columns: Iterable[str]) -> list[str]:
    """Return the columns with one of these names, regardless of case, in the order of the names."""
    lower = {column.lower(): column for column in reversed([*columns])}
    return [lower[name] for name in names if name in lower]


def read_records(
    source: object, records: Iterable[Record], options: ReadOptions, images: type = str
) -> Iterator[tuple[Any, list[str], str | None]]:
    """Yield the image, the captions and the split of each record; records may have different columns."""
    known: dict[tuple[str, ...], Columns] = {}
    for record in records:
        names = tuple(record)
        columns = known.get(names) or known.setdefault(names, options.find(source, record))
        yield columns.read(source, record, images)


def sentences(value: Any) -> list[str]:
    """Return the captions in a cell.

    A cell may hold a sentence, a list of sentences (also in the form in which pandas and NumPy write lists to
    tables), dictionaries with `raw` as in COCO, or a conversation, whose answers are the captions. Raise
    TypeError for anything else.
    """
    if isinstance(value, str):
        return _written_list(value) if "[" in value else [value]
    if isinstance(value, list | tuple):
        return [sentence for item in value for sentence in sentences(item)]
    if isinstance(value, dict):
        speaker = value.get("from", value.get("role"))
        if speaker is None:
            return sentences(value["raw"])
        return sentences(value.get("value", value.get("content"))) if speaker in ("gpt", "assistant") else []
    if value is None or value != value:  # NaN
        return []
    raise TypeError(type(value).__name__)


def _written_list(text: str) -> list[str]:
    """Return the sentences of `['a dog', "a hound"]`, also without the commas, or else the text itself."""
    if re.fullmatch(r"\s*\[[\s,]*\]\s*", _QUOTED.sub("", text)) is None:
        return [text]
    try:
        items: list[str] = json.loads(text)
    except ValueError:
        try:
            items = [ast.literal_eval(item) for item in _QUOTED.findall(text)]
        except (ValueError, SyntaxError):
            items = [text]
    return items
