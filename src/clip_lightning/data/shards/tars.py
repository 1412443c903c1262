"""Scan WebDataset tars, as img2dataset and `data convert` write them, for their samples.

A sample consists of consecutive files `KEY.jpg`, `KEY.txt` and `KEY.json`. It is read by its span in the tar,
from the header of the first of these files to the end of the last.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet

from clip_lightning.data.shards.record import BrokenRecord, Record, fields_of
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically

OFFSET, BYTES, BROKEN = "__offset__", "__bytes__", b"broken"
LARGEST_SAMPLE = 128 << 20
_ROWS = 10_000
_BLOCK = tarfile.BLOCKSIZE
_OCTAL = re.compile(rb" *([0-7]+)[\0 ]*")
_HEADER = struct.Struct("100s 24x 12s 20x c 100x 5s 83x 155s 12x")  # name, size, type, magic, prefix
_LONGEST_TEXT, _LARGEST_NUMBER = 64, 1e300
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
# As in WebDataset, the key ends at the first dot, and `__NAME__/` and hidden files are not samples.
_NAME = re.compile(r"(?!__[^/]*__(?:$|/))((?:.*/|)[^.]+)\.([^/]*)")
_IMAGE = re.compile(r"(.*\.)?(jpe?g|png|webp|gif|bmp|tiff?|ppm)")

Sample = tuple[str, int, dict[str, tuple[int, int]]]
"""Key, offset, and suffix → offset and size of the content of the image, text and JSON files."""


class DamagedTar(ValueError):
    """A file is not a tar or is incomplete; the message is a short reason."""


def read_record(span: bytes, tar: str) -> Record:
    """Read a sample from its span in a tar, or raise DamagedTar if there is no sample."""
    try:
        key, places = _plain_sample(span) or next(_samples(io.BytesIO(span + bytes(2 * _BLOCK))))[::2]
        files = {suffix: span[start : start + size] for suffix, (start, size) in places.items()}
        return Record(f"{tar}#{key}", files[_image(files)], fields_of(files))
    except (BrokenRecord, DamagedTar, StopIteration) as error:
        raise DamagedTar("a sample is not at its indexed position, so the tar has changed") from error


def _plain_sample(span: bytes) -> tuple[str, dict[str, tuple[int, int]]] | None:
    """Return the key and the places in a sample whose headers are plain, which takes tarfile much longer."""
    key, start, places = "", 0, dict[str, tuple[int, int]]()
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
    broken: dict[str, str] = {}
    rows = _rows(file, tar, broken)
    # In parts, as the complete fields of millions of samples would not fit in memory.
    tables = [_table(part) for part in iter(lambda: [*islice(rows, _ROWS)], [])]
    table = joined(tables or [_table([])])
    if not len(table) and not broken:
        broken[tar] = "it has no sample"
    return table.replace_schema_metadata({BROKEN: json.dumps(broken)})


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
    """Return a table of keys, spans, and fields that are numbers or short texts."""
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
    """Concatenate tables; a column that has texts in any of them becomes a column of texts."""
    texts = {field.name for part in tables for field in part.schema if field.type == pa.string()}
    compatible = []
    for part in tables:
        types = [(field.name, pa.string() if field.name in texts else field.type) for field in part.schema]
        compatible.append(part.cast(pa.schema(types)))
    return pa.concat_tables(compatible, promote_options="default")


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table atomically as a Parquet file."""
    content = io.BytesIO()
    parquet.write_table(table, content)
    write_atomically(path, content.getvalue())


def _image(suffixes: Iterable[str]) -> str:
    for suffix in filter(_IMAGE.fullmatch, suffixes):
        return suffix
    raise BrokenRecord("no image")


def _samples(file: BinaryIO) -> Iterator[Sample]:
    """Yield the samples of a tar by its headers; raise DamagedTar after the last complete one."""
    for key, files in groupby(_files(file), itemgetter(0)):
        begin, places = 0, dict[str, tuple[int, int]]()
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
        raise DamagedTar(f"it is not a tar, or is damaged: {error}") from error
    file.seek(tar.offset)
    if (end := file.read(_BLOCK)).strip(b"\0") or not end:  # where tarfile stops in silence
        raise DamagedTar(f"it is truncated or damaged at byte {tar.offset:,}")
