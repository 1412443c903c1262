"""Represent samples of tars (encoded images with fields), choose their captions, and filter them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from clip_lightning.data.image_formats import IMAGE_FORMATS, IMAGE_SUFFIXES
from clip_lightning.errors import UserError

# The default fields for captions: the one that `data convert` writes, then those of img2dataset.
_CAPTION_FIELDS = ("captions", "txt", "caption")
_MOST_PIXELS = 100_000_000


class BrokenRecord(ValueError):
    """A sample cannot be used; the message is a short reason."""


@dataclass(frozen=True)
class Record:
    """A sample as stored in a tar.

    Attributes:
        name: the tar and the key of the sample, for messages.
        image: the encoded image.
        fields: the content of `KEY.json`, with the content of `KEY.txt` as the field `txt`.
    """

    name: str
    image: bytes
    fields: dict[str, Any]

    @property
    def image_id(self) -> int:
        """A hash of 64 bits (BLAKE2b) of the encoded image, which is equal for copies in all tars."""
        return int.from_bytes(hashlib.blake2b(self.image, digest_size=8).digest(), "big", signed=True)

    def opened(self) -> Image.Image:
        """Open the image and read its header, or raise BrokenRecord."""
        try:
            image = Image.open(io.BytesIO(self.image), formats=IMAGE_FORMATS)
        except Exception as error:  # Pillow raises nearly every kind of error for broken files
            raise BrokenRecord("not an image of a known format") from error
        if image.width * image.height > _MOST_PIXELS:
            raise BrokenRecord(f"{image.width}x{image.height} pixels are more than {_MOST_PIXELS}")
        return image

    def suffix(self) -> str:
        """Return the suffix of the image's format, or raise BrokenRecord."""
        return IMAGE_SUFFIXES.get(self.opened().format or "", ".jpg").removeprefix(".")


def fields_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields in the JSON and text files of a sample, or raise BrokenRecord."""
    try:
        fields = json.loads(files.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise BrokenRecord("its JSON cannot be read") from error
    if not isinstance(fields, dict):
        raise BrokenRecord("its JSON is not an object")
    if "txt" in files:
        fields["txt"] = files["txt"].decode(errors="replace")
    return fields


@dataclass(frozen=True)
class CaptionChoice:
    """The fields that contain the captions.

    Attributes:
        probabilities: field → relative probability of drawing a caption from it; if a sample lacks a field,
            the others replace it. If empty, the first of `captions`, `txt` and `caption` is used.
    """

    probabilities: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the probabilities."""
        for name, probability in self.probabilities.items():
            if not (math.isfinite(probability) and probability > 0):
                raise UserError(
                    f"--data.shards.captions has {probability} for {name}: expected a number above 0"
                )

    def all(self, fields: Mapping[str, Any]) -> list[str]:
        """Return all captions that can be drawn, or raise BrokenRecord if there are none."""
        return [text for texts in self._texts(fields).values() for text in texts]

    def draw(self, fields: Mapping[str, Any], count: int, rng: np.random.Generator) -> list[str]:
        """Draw `count` captions, without repetition within a field as long as it has enough.

        Raises:
            BrokenRecord: there is no caption.
        """
        texts = self._texts(fields)
        weights = np.array([self.probabilities.get(name, 1.0) for name in texts])
        chosen = rng.choice(len(texts), count, p=weights / weights.sum()) if len(texts) > 1 else [0] * count
        shuffled = [cycle([part[i] for i in rng.permutation(len(part))]) for part in texts.values()]
        return [next(shuffled[number]) for number in chosen]

    def _texts(self, fields: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return the captions of each field that has any, with collapsed whitespace."""
        texts: dict[str, list[str]] = {}
        for name in self.probabilities or _CAPTION_FIELDS:
            value = fields.get(name)
            values = value if isinstance(value, list) else [value]
            sentences = [" ".join(text.split()) for text in values if isinstance(text, str) and text.strip()]
            if sentences and (self.probabilities or not texts):
                texts[name] = sentences
        if not texts:
            raise BrokenRecord(f"no caption in {', '.join(self.probabilities or _CAPTION_FIELDS)}")
        return texts


_FILTER = re.compile(r"\s*([\w.\-]+)\s*(>=|<=|==|!=|>|<)\s*(.*\S)\s*")
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Filter:
    """A condition on a field: `width >= 200`, `similarity > 0.28`, `LICENSE != ?`."""

    field: str
    comparison: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Parse a condition, or raise UserError."""
        match = _FILTER.fullmatch(text)
        if match is None:
            raise UserError(
                f"--data.shards.filters {text!r}: expected FIELD COMPARISON VALUE, such as 'width >= 200' or "
                f"'similarity > 0.28', with one of the comparisons {' '.join(_COMPARISONS)}"
            )
        name, comparison, value = match.groups()
        if math.isfinite(number := _number(value)):
            return cls(name, comparison, number)
        if comparison not in ("==", "!="):
            raise UserError(
                f"--data.shards.filters {text!r}: {value} is not a number; compare texts with == or !="
            )
        return cls(name, comparison, value.strip("'\""))

    def __call__(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return which of N values pass (N,); None, and texts that are compared with numbers, do not."""
        compare = _COMPARISONS[self.comparison]
        if isinstance(self.value, str):
            return np.array([value is not None and compare(str(value), self.value) for value in values], bool)
        numbers = values if isinstance(values, np.ndarray) else np.array([*map(_number, values)], float)
        passing: np.ndarray = compare(numbers, self.value) & np.isfinite(numbers)
        return passing


def _number(value: Any) -> float:
    """Convert a number, or a text with a number, to float; return NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
