"""Read samples from WebDataset tars, as img2dataset and `data convert` write them.

A sample consists of consecutive files `KEY.jpg`, `KEY.txt` and `KEY.json`. It is read by its span in the tar,
from the header of the first of these files to the end of the last.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, groupby
from operator import eq, ge, gt, itemgetter, le, lt, ne
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from clip_lightning.data.image_formats import IMAGE_SUFFIXES
from clip_lightning.data.images import open_image
from clip_lightning.errors import RunFailed, UserError

OFFSET, BYTES, BROKEN = "__offset__", "__bytes__", b"broken"
LARGEST_SAMPLE = 128 << 20
_COLUMNS = {"key": pa.string(), OFFSET: pa.int64(), BYTES: pa.int64()}
_BLOCK = tarfile.BLOCKSIZE
_OCTAL = re.compile(rb" *([0-7]+)[\0 ]*")
_HEADER = struct.Struct("100s 24x 12s 20x c 100x 5s 83x 155s 12x")  # name, size, type, magic, prefix
_LONGEST_TEXT, _LARGEST_NUMBER = 64, 1e300
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# As in WebDataset, the key ends at the first dot, and `__NAME__/` and hidden files are not samples.
_NAME = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)\.([^/]*)")
_IMAGE = re.compile(r"(.*\.)?(jpe?g|png|webp|gif|bmp|tiff?|ppm)")
# The default fields for captions: the one that `data convert` writes, then those of img2dataset.
_CAPTION_FIELDS = ("captions", "txt", "caption")
_FILTER = re.compile(r"\s*([\w.\-]+)\s*(>=|<=|==|!=|>|<)\s*(.*\S)\s*")
_COMPARISONS: Any = {">=": ge, "<=": le, ">": gt, "<": lt, "==": eq, "!=": ne}

Places = dict[str, tuple[int, int]]
"""Suffix → offset and size of the content of the image, text and JSON files of a sample."""


class BrokenRecord(ValueError):
    """A sample, or the rest of a tar, cannot be used; the message is a short reason."""


@dataclass(frozen=True)
class Record:
    """A sample as stored in a tar."""

    name: str  # the tar and the key, for messages
    image: bytes  # encoded
    fields: dict[str, Any]  # of `KEY.json`, with the content of `KEY.txt` as `txt`

    def suffix(self) -> str:
        """Return the suffix of the image's format, or raise BrokenImage."""
        return IMAGE_SUFFIXES.get(open_image(self.image).format or "", ".jpg").removeprefix(".")


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
    if texts:
        return texts
    raise BrokenRecord(f"no caption in {', '.join(names or _CAPTION_FIELDS)}")


def draw_captions(
    fields: Mapping[str, Any], probabilities: Mapping[str, float], count: int, rng: np.random.Generator
) -> list[str]:
    """Draw `count` captions, without repetition within a field as long as it has enough."""
    texts = captions_of(fields, probabilities)
    weights = np.array([probabilities.get(name, 1.0) for name in texts])
    chosen = rng.choice(len(texts), count, p=weights / weights.sum()) if len(texts) > 1 else [0] * count
    shuffled = [cycle([part[i] for i in rng.permutation(len(part))]) for part in texts.values()]
    return [next(shuffled[number]) for number in chosen]


@dataclass(frozen=True)
class Filter:
    """A condition on a field: `width >= 200`, `similarity > 0.28`, `LICENSE != ?`."""

    field: str
    comparison: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Parse a condition, or raise UserError."""
        if match := _FILTER.fullmatch(text):
            field, comparison, value = match.groups()
            if math.isfinite(number := _number(value)):
                return cls(field, comparison, number)
            if comparison in ("==", "!="):
                return cls(field, comparison, value.strip("'\""))
        raise UserError(
            f"--data.shards.filters {text!r}: expected FIELD COMPARISON VALUE, such as 'width >= 200' or "
            f"'similarity > 0.28', with one of {' '.join(_COMPARISONS)} (only == and != for texts)"
        )

    def __call__(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return which of N values pass (N,); None, and texts that are compared with numbers, do not."""
        compare = _COMPARISONS[self.comparison]
        if isinstance(self.value, str):
            # a missing value is None, or NaN in a column of numbers
            return np.array([v is not None and v == v and compare(str(v), self.value) for v in values], bool)
        is_float = isinstance(values, np.ndarray) and values.dtype == float
        numbers = values if is_float else np.array([*map(_number, values)], float)
        passing: np.ndarray = compare(numbers, self.value) & np.isfinite(numbers)
        return passing


def _number(value: Any) -> float:
    """Convert a number, or a text with a number, to float; return NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def read_record(span: bytes, tar: str) -> Record:
    """Read a sample from its span in a tar, or raise RunFailed if there is no sample."""
    try:
        key, places = _plain_sample(span) or next(_samples(io.BytesIO(span + bytes(2 * _BLOCK))))[::2]
        files = {suffix: span[start : start + size] for suffix, (start, size) in places.items()}
        return Record(f"{tar}#{key}", files[next(filter(_IMAGE.fullmatch, files))], _fields(files))
    except (BrokenRecord, StopIteration) as error:
        raise RunFailed(
            f"{tar} cannot be read: a sample is not at its indexed position, so the tar has changed"
        ) from error


def _fields(files: Mapping[str, bytes]) -> dict[str, Any]:
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


def _plain_sample(span: bytes) -> tuple[str, Places] | None:
    """Return the key and the places in a sample whose headers are plain, which takes tarfile much longer."""
    key, start, places = "", 0, Places()
    while start + _BLOCK <= len(span):
        name, size, kind, magic, prefix = _HEADER.unpack_from(span, start)
        match = _NAME.fullmatch(name.rstrip(b"\0").decode(errors="replace"))
        length = _OCTAL.fullmatch(size)
        if not (match and length and kind in b"0\0" and magic == b"ustar") or prefix.strip(b"\0"):
            return None
        key, begin, end = match[1], start + _BLOCK, start + _BLOCK + int(length[1], 8)
        places.setdefault(match[2].lower(), (begin, end - begin))
        start = end + -end % _BLOCK
    return (key, places) if start - _BLOCK < len(span) <= start else None


def scan(file: BinaryIO, tar: str) -> pa.Table:
    """Scan a tar once, and return a table of its samples; `tar` is its address, for messages.

    A row has the key of a sample, its span, and those of its fields that are numbers or short texts. Samples
    that cannot be used are in the schema's metadata, under BROKEN, as JSON: name → reason.
    """
    if file.read(6).startswith(_COMPRESSED):
        raise UserError(f"{tar} is compressed, so samples cannot be read at random; convert it to .tar")
    file.seek(0)
    rows: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    try:
        for key, offset, places in _samples(file):
            try:
                rows.append(_row(file, key, offset, places))
            except BrokenRecord as error:
                broken[f"{tar}#{key}"] = str(error)
    except BrokenRecord as error:
        broken[tar] = str(error)
    if not rows and not broken:
        broken[tar] = "it has no sample"
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in _COLUMNS.items()}
    for name in dict.fromkeys(chain(*rows)):
        values = [row.get(name) for row in rows]
        if any(isinstance(value, str) for value in values):
            texts = [None if value is None else str(value).encode(errors="replace") for value in values]
            columns[name] = pa.array(texts, pa.binary()).cast(pa.string())
        elif name not in columns:
            columns[name] = pa.array([None if value is None else float(value) for value in values])
    return pa.table(columns, metadata={BROKEN: json.dumps(broken)})


def _row(file: BinaryIO, key: str, offset: int, places: Places) -> dict[str, Any]:
    """Return the row of a sample, or raise BrokenRecord."""
    if not any(map(_IMAGE.fullmatch, places)):
        raise BrokenRecord("no image")
    length = max(map(sum, places.values())) - offset
    if length > LARGEST_SAMPLE:
        raise BrokenRecord(f"its {length:,} bytes are more than {LARGEST_SAMPLE:,}")
    texts = {}
    for suffix in {"json", "txt"} & places.keys():
        file.seek(places[suffix][0])
        texts[suffix] = file.read(places[suffix][1])
    short = {
        name: value
        for name, value in _fields(texts).items()
        if name.isprintable()
        and (len(value) <= _LONGEST_TEXT if isinstance(value, str) else abs(_number(value)) < _LARGEST_NUMBER)
    }
    return short | {"key": key, OFFSET: offset, BYTES: length}


def _samples(file: BinaryIO) -> Iterator[tuple[str, int, Places]]:
    """Yield key, offset and places of each sample; raise BrokenRecord after the last complete one."""
    for key, files in groupby(_files(file), itemgetter(0)):
        begin, places = 0, Places()
        for _, suffix, header in files:
            if suffix in ("json", "txt") or _IMAGE.fullmatch(suffix):
                begin = begin if places else header.offset
                places.setdefault(suffix, (header.offset_data, header.size))
        yield key, begin, places


def _files(file: BinaryIO) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield the key, the suffix and the header of every file that belongs to a sample."""
    try:
        tar: Any = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace")
        for header in iter(tar.next, None):
            tar.members.clear()  # they would fill the memory
            if header.size < 0:  # else it would be read again and again
                raise tarfile.ReadError("a negative size")
            if header.isreg() and (match := _NAME.fullmatch(header.name)):
                yield match[1], match[2].lower(), header
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise BrokenRecord(f"it is not a tar, or is damaged: {error}") from error
    file.seek(tar.offset)
    if (end := file.read(_BLOCK)).strip(b"\0") or not end:  # where tarfile stops in silence
        raise BrokenRecord(f"it is truncated or damaged at byte {tar.offset:,}")
