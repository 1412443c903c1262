"""Which columns hold images, captions and splits, by their usual names; and the captions of a cell."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


class NoColumn(UserError):
    """No column is clearly that of images, or of captions."""


@dataclass(frozen=True)
class Columns:
    """Names of columns; `split` is None if there is none."""

    image: str
    captions: tuple[str, ...]
    split: str | None

    def names(self) -> list[str]:
        """Each of them once."""
        return list(dict.fromkeys([self.image, *self.captions, *filter(None, [self.split])]))


@dataclass(frozen=True)
class ReadOptions:
    """How tables are read, if their columns and images are not recognised.

    Attributes:
        image_column: column of images; by default recognised by its name or type.
        caption_column: column of captions, or several separated by commas; by default recognised by name, as
            are numbered ones such as `caption_0`.
        image_folder: folder of the images, if they are not beside the annotations; of names with folders that
            are not there, the last parts are looked for.
    """

    image_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None

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
            record: name → value (or type) of each column; of several usual columns for images, the first one
                that holds a file name is taken.
            images: columns that can hold images; all of them if None.
            texts: likewise for captions.

        Raises:
            NoColumn: a column that was asked for is missing, or none has a usual name.
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
            asked = [name.strip() for name in self.caption_column.split(",")]
            captions = asked if set(asked) <= set(texts) else []
        for option, kind, asked_for, found, names in (
            ("--data.read.image_column", "image", self.image_column, image, IMAGE_NAMES),
            ("--data.read.caption_column", "caption", self.caption_column, captions, CAPTION_NAMES),
        ):
            if not found:
                wrong = (
                    f"{option} {asked_for} is not in {source}"
                    if asked_for
                    else f"{source} has no {kind} column"
                )
                raise NoColumn(
                    f"{wrong}: found {', '.join(map(str, record)) or 'nothing'}, expected one of "
                    f"{', '.join(names[:7])}; give {option} COLUMN, or another --data.root"
                )
        split = next((name for name in texts if name.lower() == "split"), None)
        return Columns(image[0], tuple(captions), split)


RECOGNISED = ReadOptions()


def _usual(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """The columns that have one of these names, in the order of the names."""
    lower = {column.lower(): column for column in reversed(list(columns))}
    return [lower[name] for name in names if name in lower]


def is_image_type(feature: Any) -> bool:
    """Check for the type Image of the package `datasets`."""
    return type(feature).__name__ == "Image"


def find_typed_columns(source: str, features: Mapping[str, Any], options: ReadOptions) -> Columns:
    """Choose the columns of a Hugging Face data set, by their types and usual names.

    Raises:
        NoColumn: likewise; the message lists the columns with their types.
    """
    images = [name for name, feature in features.items() if _holds_images(feature)]
    typed = [name for name in images if is_image_type(features[name])]
    texts = [name for name, feature in features.items() if _holds_texts(feature)]
    if options.image_column is None and len(typed) == 1:
        options = replace(options, image_column=typed[0])
    try:
        return options.find(source, features, images if options.image_column else typed or images, texts)
    except NoColumn as error:
        there = ", ".join(f"{name} ({_type(feature)})" for name, feature in features.items())
        raise NoColumn(f"{error}; its types are {there}") from None


def _holds_images(feature: Any) -> bool:
    """The type Image, or bytes, bare or as Image keeps them."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return is_image_type(feature) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _holds_texts(feature: Any) -> bool:
    """Strings, lists of strings, and lists of what COCO has: dictionaries with `raw`."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _holds_texts(inner)
    if isinstance(feature, dict):
        return "raw" in feature and _holds_texts(feature["raw"])
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _type(feature: Any) -> str:
    if is_image_type(feature):
        return "Image"
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


# What a cell holds --------------------------------------------------------------------------------------


def sentences(value: Any) -> list[str]:
    """Return the captions of a cell.

    A cell may hold a sentence, a list of them (also as pandas and NumPy write lists into tables),
    dictionaries with `raw` as in COCO's splits, or a conversation, of which the answers are captions.

    Raises:
        TypeError: it holds something else.
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
    """The sentences of `['a dog', 'a hound']`, or the text itself."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return [text]
    try:
        found = json.loads(stripped)
    except (ValueError, RecursionError):
        quoted = [] if _QUOTED.sub("", stripped[1:-1]).strip(", \t\r\n") else _QUOTED.findall(stripped)
        try:
            found = [ast.literal_eval(item) for item in quoted]
        except (ValueError, SyntaxError):
            found = []
    strings = isinstance(found, list) and all(isinstance(item, str) for item in found)
    return found if strings and (found or stripped == "[]") else [text]
