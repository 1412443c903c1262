"""Represent samples of tars (encoded images with fields), choose their captions, and filter them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import eq, ge, gt, le, lt, ne
from typing import Any

import numpy as np

from clip_lightning.data.image_formats import IMAGE_SUFFIXES
from clip_lightning.data.images import open_image
from clip_lightning.errors import UserError

# The default fields for captions: the one that `data convert` writes, then those of img2dataset.
_CAPTION_FIELDS = ("captions", "txt", "caption")


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

    def suffix(self) -> str:
        """Return the suffix of the image's format, or raise BrokenImage."""
        return IMAGE_SUFFIXES.get(open_image(self.image).format or "", ".jpg").removeprefix(".")


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


def captions_of(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, list[str]]:
    """Return the captions, with collapsed whitespace, of each field in `names` that has any.

    Without names, return those of the first of `captions`, `txt` and `caption` that has any.
    """
    texts: dict[str, list[str]] = {}
    for name in names or _CAPTION_FIELDS:
        value = fields.get(name)
        values = value if isinstance(value, list) else [value]
        captions = [" ".join(text.split()) for text in values if isinstance(text, str) and text.strip()]
        if captions and (names or not texts):
            texts[name] = captions
    if not texts:
        raise BrokenRecord(f"no caption in {', '.join(names or _CAPTION_FIELDS)}")
    return texts


def draw_captions(
    fields: Mapping[str, Any], probabilities: Mapping[str, float], count: int, rng: np.random.Generator
) -> list[str]:
    """Draw `count` captions, without repetition within a field as long as it has enough."""
    texts = captions_of(fields, probabilities)
    weights = np.array([probabilities.get(name, 1.0) for name in texts])
    chosen = rng.choice(len(texts), count, p=weights / weights.sum()) if len(texts) > 1 else [0] * count
    shuffled = [cycle([part[i] for i in rng.permutation(len(part))]) for part in texts.values()]
    return [next(shuffled[number]) for number in chosen]


_FILTER = re.compile(r"\s*([\w.\-]+)\s*(>=|<=|==|!=|>|<)\s*(.*\S)\s*")
_COMPARISONS: Any = {">=": ge, "<=": le, ">": gt, "<": lt, "==": eq, "!=": ne}


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
        number = _number(match[3]) if match else math.nan
        if match and math.isfinite(number):
            return cls(match[1], match[2], number)
        if match and match[2] in ("==", "!="):
            return cls(match[1], match[2], match[3].strip("'\""))
        raise UserError(
            f"--data.shards.filters {text!r}: expected FIELD COMPARISON VALUE, such as 'width >= 200' or "
            f"'similarity > 0.28', with one of {' '.join(_COMPARISONS)} (only == and != for texts)"
        )

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
