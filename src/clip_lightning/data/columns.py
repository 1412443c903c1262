"""Find the columns of images, captions and splits, and the captions in a cell."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clip_lightning.data.captions import Splits
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
CLASS_NAMES = ("label", "class", "class_name", "category", "target")
_NUMBERED = re.compile(r"(caption|sentence|text)s?[ _-]?\d+", re.IGNORECASE)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


class NoColumn(UserError):
    """There is no column that clearly holds images or captions."""


@dataclass(frozen=True)
class Columns:
    """The names of columns; `split` is None if there is no such column."""

    image: str
    captions: tuple[str, ...]
    split: str | None

    def names(self) -> list[str]:
        """Return each name once."""
        return list(dict.fromkeys([self.image, *self.captions, *filter(None, [self.split])]))


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
        """Check the range."""
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"--data.read.max_broken {self.max_broken}: expected a fraction from 0 to 1")

    def find(
        self,
        source: object,
        record: Mapping[str, Any],
        images: Collection[str] | None = None,
        texts: Collection[str] | None = None,
    ) -> Columns:
        """Choose the columns of a record.

        Args:
            source: the file or data set, for messages.
            record: name → value of each column; if several columns have usual names for images, the first one
                with a file name is chosen.
            images: columns that can hold images; by default all.
            texts: columns that can hold texts; by default all.

        Raises:
            NoColumn: a given column does not exist, or no column has a usual name.
        """
        images, texts = record if images is None else images, record if texts is None else texts
        usual = _usual(IMAGE_NAMES, images)
        named = [name for name in usual if isinstance(record[name], str) and is_image(record[name])]
        image = (named or usual)[:1]
        if self.image_column is not None:
            image = [self.image_column] if self.image_column in images else []
        captions = _usual(CAPTION_NAMES, texts)[:1]
        captions += [name for name in texts if _NUMBERED.fullmatch(name) and name not in captions]
        if self.caption_column is not None:
            given = [name.strip() for name in self.caption_column.split(",")]
            captions = given if set(given) <= set(texts) else []
        for kind, option, columns, names in (
            ("image", self.image_column, image, IMAGE_NAMES),
            ("caption", self.caption_column, captions, CAPTION_NAMES),
        ):
            if not columns:
                flag = f"--data.read.{kind}_column"
                problem = (
                    f"{flag} {option} is not in {source}" if option else f"{source} has no {kind} column"
                )
                raise NoColumn(
                    f"{problem}: found {', '.join(map(str, record)) or 'nothing'}, expected one of "
                    f"{', '.join(names[:7])}; give {flag} COLUMN, or another --data.root"
                    + ("; to classify, use clip-lightning evaluate" if _usual(CLASS_NAMES, record) else "")
                )
        split = next((name for name in texts if name.lower() == "split"), None)
        return Columns(image[0], tuple(captions), split)


RECOGNIZED = ReadOptions()


def _usual(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """Return the columns with one of these names, in the order of the names."""
    lower = {column.lower(): column for column in reversed(list(columns))}
    return [lower[name] for name in names if name in lower]


def is_image_type(feature: Any) -> bool:
    """Return whether a feature has the type Image of the package `datasets`."""
    return type(feature).__name__ == "Image"


def find_typed_columns(source: str, features: Mapping[str, Any], options: ReadOptions) -> Columns:
    """Choose the columns of a Hugging Face data set by their types and usual names.

    Raises:
        NoColumn: a given column does not exist, or no column clearly holds images or captions.
    """
    images = [name for name, feature in features.items() if _holds_images(feature)]
    typed = [name for name in images if is_image_type(features[name])]
    texts = [name for name, feature in features.items() if _holds_texts(feature)]
    if options.image_column is None and len(typed) == 1:
        options = replace(options, image_column=typed[0])
    return options.find(source, features, images if options.image_column else typed or images, texts)


def _holds_images(feature: Any) -> bool:
    """Accept the type Image, and bytes by themselves or in a dictionary as Image stores them."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return is_image_type(feature) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _holds_texts(feature: Any) -> bool:
    """Accept strings, lists of strings, and, as in COCO, lists of dictionaries with `raw`."""
    while not isinstance(feature, dict) and hasattr(feature, "feature"):
        feature = feature.feature
    if isinstance(feature, dict):
        return "raw" in feature and _holds_texts(feature["raw"])
    return getattr(feature, "dtype", None) in ("string", "large_string")


# What a cell holds --------------------------------------------------------------------------------------


def sentences(value: Any) -> list[str]:
    """Return the captions in a cell.

    A cell may hold a sentence, a list of sentences (also in the form in which pandas and NumPy write lists to
    tables), dictionaries with `raw` as in COCO, or a conversation, whose answers are the captions.

    Raises:
        TypeError: the cell holds something else.
    """
    if isinstance(value, str):
        return _written_list(value) if "[" in value else [value]
    if isinstance(value, list):
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
    """Return the sentences of `['a dog', 'a hound']`, or the text itself."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [text]
    try:
        items = json.loads(stripped)
    except (ValueError, RecursionError):
        quoted = [] if _QUOTED.sub("", stripped[1:-1]).strip(", \t\r\n") else _QUOTED.findall(stripped)
        try:
            items = [ast.literal_eval(item) for item in quoted]
        except (ValueError, SyntaxError):
            items = []
    strings = isinstance(items, list) and all(isinstance(item, str) for item in items)
    return items if strings and (items or stripped == "[]") else [text]
