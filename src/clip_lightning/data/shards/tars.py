"""WebDataset tars, as img2dataset and `data convert` write them: what is in one, and where.

A sample is the files `KEY.jpg`, `KEY.txt`, `KEY.json`, which follow each other. It is found again by its
place in the tar, which reaches from the header of the first of these to the end of the last.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet

from clip_lightning.data.shards.record import BrokenRecord, Record, fields_of
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically

OFFSET, BYTES, BROKEN = "__offset__", "__bytes__", b"broken"
LARGEST_SAMPLE = 128 << 20
_BLOCK = 512
_LARGEST_HEADER = 1 << 20
_LONGEST_TEXT, _LARGEST_NUMBER = 64, 1e300
_ROWS = 10_000
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# As WebDataset divides names: the key ends at the first dot; `__NAME__/` and hidden files are not samples.
_NAME = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)\.([^/]*)")
_IMAGE = re.compile(r"(.*\.)?(jpe?g|png|webp|gif|bmp|tiff?|ppm)")

Sample = tuple[str, int, dict[str, tuple[int, int]]]
"""Key, beginning, and suffix → place and size of the content of the image, the text and the JSON."""


class DamagedTar(ValueError):
    """A file that is not a tar, or not all of one; the message is a short reason."""


def read_record(span: bytes, tar: str) -> Record:
    """Read a sample from its place in a tar, or raise DamagedTar if there is none."""
    try:
        end = bytes(_BLOCK + -len(span) % _BLOCK)
        key, _, places = next(_samples(io.BytesIO(span + end)))
        files = {suffix: span[start : start + size] for suffix, (start, size) in places.items()}
        return Record(f"{tar}#{key}", files[_image(files)], fields_of(files))
    except (BrokenRecord, DamagedTar, StopIteration) as error:
        raise DamagedTar("a sample is not where it was, so the tar has changed") from error


def scan(file: BinaryIO, tar: str) -> pa.Table:
    """Go through a tar once, and make a table of its samples; `tar` is its address, for messages.

    A row has the key of a sample, its place, and the numbers and short texts of its fields. What cannot be
    used is in the schema's metadata, under BROKEN, as JSON: name → reason.

    Raises:
        UserError: the tar is compressed.
    """
    if file.read(6).startswith(_COMPRESSED):
        raise UserError(f"{tar} is compressed, so no sample can be read on its own; unpack it to a .tar")
    broken: dict[str, str] = {}
    rows = _rows(file, tar, broken)
    tables = [_table(part) for part in iter(lambda: list(islice(rows, _ROWS)), [])]
    if not tables and not broken:
        broken[tar] = "it holds no sample"
    return joined(tables or [_table([])]).replace_schema_metadata({BROKEN: json.dumps(broken)})


def _rows(file: BinaryIO, tar: str, broken: dict[str, str]) -> Iterator[dict[str, Any]]:
    try:
        for key, offset, places in _samples(file):
            try:
                _image(places)
                length = max(map(sum, places.values())) - offset
                if length > LARGEST_SAMPLE:
                    raise BrokenRecord(f"its {length:,} bytes are more than {LARGEST_SAMPLE:,}")
                texts = {}
                for suffix in {"json", "txt"} & places.keys():
                    file.seek(places[suffix][0])
                    texts[suffix] = file.read(places[suffix][1])
                yield fields_of(texts) | {"key": key, OFFSET: offset, BYTES: length}
            except BrokenRecord as error:
                broken[f"{tar}#{key}"] = str(error)
    except DamagedTar as error:
        broken[tar] = str(error)


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Make a table of keys and places, and of the fields that are numbers or short texts."""
    types = {"key": pa.string(), OFFSET: pa.int64(), BYTES: pa.int64()}
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()}
    for name in dict.fromkeys(
        name for row in rows for name in row if name.isprintable() and name not in types
    ):
        values = [row[name] if _is_short(row.get(name)) else None for row in rows]
        if any(isinstance(value, str) for value in values):
            texts = [None if value is None else str(value).encode(errors="replace") for value in values]
            columns[name] = pa.array(texts, pa.binary()).cast(pa.string())
        elif any(value is not None for value in values):
            columns[name] = pa.array([None if value is None else float(value) for value in values])
    return pa.table(columns)


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_TEXT
    return isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Put tables together; a column that is one of texts anywhere is one of texts."""
    texts = {each.name for part in tables for each in part.schema if each.type == pa.string()}
    alike = [
        part.cast(
            pa.schema([(each.name, pa.string() if each.name in texts else each.type) for each in part.schema])
        )
        for part in tables
    ]
    return pa.concat_tables(alike, promote_options="default")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table as a Parquet file, which is there whole or not at all."""
    content = io.BytesIO()
    parquet.write_table(table, content)
    write_atomically(path, content.getvalue())


# Headers ------------------------------------------------------------------------------------------------


def _image(suffixes: Iterable[str]) -> str:
    for suffix in filter(_IMAGE.fullmatch, suffixes):
        return suffix
    raise BrokenRecord("no image")


def _samples(file: BinaryIO) -> Iterator[Sample]:
    """Find the samples of a tar by its headers; raise DamagedTar after the last that is surely complete."""
    key, begin = "", 0
    places: dict[str, tuple[int, int]] = {}
    for name, offset, start, size in _members(file):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if match[1] != key:
            if key:
                yield key, begin, places
            key, places = match[1], {}
        suffix = match[2].lower()
        if suffix in ("json", "txt") or _IMAGE.fullmatch(suffix):
            begin = begin if places else offset
            places.setdefault(suffix, (start, size))
    if key:
        yield key, begin, places


def _members(file: BinaryIO) -> Iterator[tuple[str, int, int, int]]:
    """Yield the name of each plain file, where its headers begin, where its content begins, and its size.

    This is several times as fast as `tarfile`, and keeps no list of the members.
    """
    end = file.seek(0, io.SEEK_END)
    begin = place = 0
    extended: dict[str, str] = {}
    while place < end:
        file.seek(place)
        header = file.read(_BLOCK)
        if not header.strip(b"\0"):
            return
        try:
            size = int(extended["size"]) if "size" in extended else _number(header[124:136])
            if sum(header) - sum(header[148:156]) + 8 * ord(" ") != _number(header[148:156]) or size < 0:
                raise ValueError
        except (ValueError, IndexError) as error:
            raise DamagedTar(f"not a tar, or damaged at byte {place:,}") from error
        start, kind = place + _BLOCK, header[156:157]
        place = start + -(-size // _BLOCK) * _BLOCK
        if start + size > end:
            raise DamagedTar("it is cut off")
        if kind in (b"x", b"L") and size <= _LARGEST_HEADER:
            content = file.read(size)  # pax's or GNU's header, which says more about the next file
            found = (
                {b"path": content} if kind == b"L" else dict(re.findall(rb"\d+ (path|size)=(.*)", content))
            )
            extended |= {name.decode(): _text(value) for name, value in found.items()}
            continue
        if kind in (b"0", b"\0"):
            name, prefix = _text(header[:100]), _text(header[345:500])
            name = f"{prefix}/{name}" if prefix and header.startswith(b"ustar\0", 257) else name
            yield extended.get("path", name), begin, start, size
        begin, extended = place, {}
    raise DamagedTar("it is cut off")


def _number(digits: bytes) -> int:
    """Read an octal number, or a large one as GNU tar writes it."""
    return int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b" \0") or b"0", 8)


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode(errors="replace")
