"""One sample of a shard: an encoded picture and what is written beside it; which captions, which samples."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_lightning.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
# Where a sample's captions are if nobody says: what `data convert` writes, then img2dataset's.
_CAPTION_FIELDS = ("captions", "txt", "caption")


class BrokenRecord(ValueError):
    """A sample that cannot be used; the message is a short reason."""


@dataclass(frozen=True)
class Record:
    """A sample as it lies in a shard.

    Attributes:
        key: its name, unique in its shard.
        image: the encoded picture.
        fields: of the JSON beside it; `txt` is the text file beside it.
        shard: the file it comes from.
    """

    key: str
    image: bytes
    fields: dict[str, Any]
    shard: str = ""

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return f"{self.shard}#{self.key}"

    @property
    def image_id(self) -> int:
        """64 bits of the picture's content (BLAKE2b), so that copies of it are known as such anywhere."""
        return int.from_bytes(hashlib.blake2b(self.image, digest_size=8).digest(), "big", signed=True)

    @classmethod
    def from_files(cls, key: str, files: Mapping[str, Any], shard: str) -> Record:
        """The sample made of files that share a name: suffix → content, as WebDataset groups them.

        Raises:
            BrokenRecord: there is no picture, or the JSON or the text is none.
        """
        suffix = next((s for s in files if s.rpartition(".")[2] in IMAGE_SUFFIXES), None)
        if suffix is None:
            raise BrokenRecord("no picture")
        fields = fields_of(files["json"]) if "json" in files else {}
        if "txt" in files:
            fields["txt"] = bytes(files["txt"]).decode(errors="replace")
        return cls(key, files[suffix], fields, shard)


def fields_of(data: bytes) -> dict[str, Any]:
    """What the JSON of a sample says.

    Raises:
        BrokenRecord: it is no JSON object.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenRecord("its JSON cannot be read") from error
    if not isinstance(fields, dict):
        raise BrokenRecord("its JSON is no object")
    return fields


# Which captions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionChoice:
    """Which fields captions are taken from.

    Attributes:
        probabilities: field → how often a caption is taken from it, in proportion; a field that a sample
            lacks leaves its share to the others. Empty for the first there is of `captions`, `txt` and
            `caption`.
    """

    probabilities: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the probabilities."""
        for name, share in self.probabilities.items():
            if not (math.isfinite(share) and share > 0):
                raise UserError(f"--data.shards.captions gives {name} {share}; expected a share above 0")

    def all(self, fields: Mapping[str, Any]) -> list[str]:
        """Every caption that may be drawn.

        Raises:
            BrokenRecord: there is none.
        """
        return [text for texts in self._texts(fields).values() for text in texts]

    def draw(self, fields: Mapping[str, Any], count: int, rng: np.random.Generator) -> list[str]:
        """`count` captions: of each field all different while there are enough.

        Raises:
            BrokenRecord: there is none.
        """
        texts = self._texts(fields)
        names = list(texts)
        shares = np.array([self.probabilities.get(name, 1.0) for name in names])
        chosen = (
            rng.choice(len(names), size=count, p=shares / shares.sum()) if len(names) > 1 else [0] * count
        )
        orders = {name: rng.permutation(len(texts[name])) for name in names}
        drawn, taken = [], dict.fromkeys(names, 0)
        for number in chosen:
            name = names[number]
            drawn.append(texts[name][orders[name][taken[name] % len(texts[name])]])
            taken[name] += 1
        return drawn

    def _texts(self, fields: Mapping[str, Any]) -> dict[str, list[str]]:
        """The captions of each field that has some."""
        if self.probabilities:
            texts = {name: _sentences(fields.get(name)) for name in self.probabilities}
            texts = {name: found for name, found in texts.items() if found}
        else:
            found = ((name, _sentences(fields.get(name))) for name in _CAPTION_FIELDS)
            texts = dict([next(((name, some) for name, some in found if some), ("", []))])
            texts.pop("", None)
        if not texts:
            raise BrokenRecord(f"no caption in {', '.join(self.probabilities or _CAPTION_FIELDS)}")
        return texts


def _sentences(value: Any) -> list[str]:
    """One caption, or several, with their whitespace collapsed."""
    values = value if isinstance(value, list) else [value]
    return [text for each in values if isinstance(each, str) and (text := " ".join(each.split()))]


# Which samples ------------------------------------------------------------------------------------------

_FILTER = re.compile(r"\s*([\w.\-]+)\s*(>=|<=|==|!=|>|<)\s*(.*\S)\s*")
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Filter:
    """A condition on a field: `width >= 200`, `similarity > 0.28`, `LICENSE != ?`.

    Attributes:
        field: its name.
        comparison: one of `>= <= > < == !=`.
        value: a number, or for `==` and `!=` a text too.
    """

    field: str
    comparison: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read one.

        Raises:
            UserError: it is none.
        """
        match = _FILTER.fullmatch(text)
        if match is None:
            raise UserError(
                f"--data.shards.filters {text!r}: expected FIELD COMPARISON VALUE, as in 'width >= 200' or "
                f"'similarity > 0.28'; comparisons are {' '.join(_COMPARISONS)}"
            )
        name, comparison, word = match.groups()
        value = _number(word)
        if value is not None:
            return cls(name, comparison, value)
        if comparison not in ("==", "!="):
            raise UserError(
                f"--data.shards.filters {text!r}: {word} is no number, and texts can only be compared by == "
                "and !="
            )
        return cls(name, comparison, word.strip("'\""))

    def __call__(self, fields: Mapping[str, Any]) -> bool:
        """Whether a sample with these fields passes; one that lacks the field, or has no number, does not."""
        value = fields.get(self.field)
        if value is None:
            return False
        if isinstance(self.value, str):
            return _COMPARISONS[self.comparison](str(value), self.value)
        number = _number(value)
        return number is not None and _COMPARISONS[self.comparison](number, self.value)

    def of_numbers(self, values: np.ndarray) -> np.ndarray:
        """Likewise for many values (N,), NaN where a sample lacks the field."""
        return _COMPARISONS[self.comparison](values, self.value) & np.isfinite(values)


def passes(filters: Sequence[Filter], fields: Mapping[str, Any]) -> bool:
    """Whether a sample passes them all."""
    return all(condition(fields) for condition in filters)


def _number(value: Any) -> float | None:
    """As a finite number, also where a text spells it."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
