"""Writing one shard: samples into a tar or a litdata chunk, with its size and checksum."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageOps

from clip_lightning.data.image_formats import PICTURE_FORMATS, PICTURE_SUFFIXES
from clip_lightning.data.shards.manifest import Format, Shard
from clip_lightning.data.shards.record import BrokenRecord, Record
from clip_lightning.data.shards.storage import litdata

_LONGEST_TEXT = 64
_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF's tag, and its first value for a quarter turn
_MOST_PIXELS = 100_000_000
SUFFIX: dict[Format, str] = {"webdataset": ".tar", "litdata": ".bin"}


@dataclass(frozen=True)
class Written:
    """What writing a shard has left.

    Attributes:
        shard: the file.
        fields: one row a sample, of its numbers and short texts.
        chunk: what litdata's index says of it, with the `config` of that index; None for a tar.
        left_out: name → reason, of samples that could not be used.
    """

    shard: Shard
    fields: pa.Table
    chunk: dict[str, Any] | None
    left_out: dict[str, str]


def write_tar(records: Iterable[Record], path: Path) -> None:
    """A WebDataset tar: for each sample its picture, `.json` with its fields, `.txt` with its first caption.

    The same samples make the same bytes.
    """
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for record in records:
            files = {picture_suffix(record.image): record.image}
            caption = _first_caption(record.fields)
            if caption is not None:
                files["txt"] = caption.encode()
            rest = {name: value for name, value in record.fields.items() if name != "txt"}
            files["json"] = json.dumps(rest, ensure_ascii=False).encode(errors="replace")
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{record.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        file.flush()


def _first_caption(fields: dict[str, Any]) -> str | None:
    if isinstance(fields.get("txt"), str):
        return str(fields["txt"])
    captions = fields.get("captions")
    return str(captions[0]) if isinstance(captions, list) and captions else None


def write_chunk(records: Iterable[Record], path: Path) -> dict[str, Any]:
    """A litdata chunk of `{"image": bytes, "key": bytes, "fields": bytes}`, the fields as JSON.

    Returns:
        What an index of litdata has to say of it.
    """
    folder = path.with_name(f"{path.name}.d")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    try:
        cache = litdata().streaming.Cache(str(folder), chunk_size=2**31)  # all in one chunk
        for number, record in enumerate(records):
            fields = json.dumps(record.fields, ensure_ascii=False).encode(errors="replace")
            cache[number] = {"image": record.image, "key": record.key.encode(), "fields": fields}
        cache.done()
        files = list(folder.glob("*.bin"))
        if not files:  # there was no sample
            path.write_bytes(b"")
            return {"chunks": [], "config": None}
        (file,) = files
        (index,) = folder.glob("*index.json")
        described = json.loads(index.read_text())
        os.replace(file, path)
        described["config"]["chunk_size"] = None  # chunks are not all of the same
        return dict(described)
    finally:
        shutil.rmtree(folder)


def picture_suffix(image: bytes) -> str:
    """The suffix that goes with an encoded picture.

    Raises:
        BrokenRecord: it is none that can be read.
    """
    return PICTURE_SUFFIXES.get(_opened(image).format or "", ".jpg").removeprefix(".")


def sized(image: bytes, short_side: int | None, quality: int) -> tuple[bytes, int, int]:
    """The encoded picture, its width and its height, as JPEG with this short side where it is longer.

    Args:
        image: encoded.
        short_side: in pixels; None to keep every picture as it is.
        quality: of the JPEG, 1 to 100.

    Raises:
        BrokenRecord: it cannot be read.
    """
    picture = _opened(image)
    try:
        width, height = picture.size
        scale = min(1.0, (short_side or math.inf) / min(width, height))
        stored = round(width * scale), round(height * scale)
        turned = picture.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED
        size = stored[::-1] if turned else stored
        return (image if scale == 1 else _smaller(picture, stored, size, quality)), *size
    except Exception as error:  # files from elsewhere make Pillow raise nearly every kind of error
        raise BrokenRecord(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _smaller(picture: Image.Image, stored: tuple[int, int], size: tuple[int, int], quality: int) -> bytes:
    """As an upright JPEG of this size, `stored` before it is turned."""
    picture.draft("RGB", (2 * stored[0], 2 * stored[1]))
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    encoded = io.BytesIO()
    upright.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def _opened(image: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(image), formats=PICTURE_FORMATS)
    except Exception as error:
        raise BrokenRecord("not a picture of a known format") from error
    if picture.width * picture.height > _MOST_PIXELS:
        raise BrokenRecord(f"{picture.width}x{picture.height} pixels are more than {_MOST_PIXELS}")
    return picture


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Numbers and short texts of each sample's fields as columns, in the samples' order."""
    kept = [{"key": None, **{n: v for n, v in row.items() if _is_short(v)}} for row in rows]
    names = dict.fromkeys(name for row in kept for name in row)
    return pa.table({name: _column([row.get(name) for row in kept]) for name in names})


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One after the other; a column that holds a text anywhere is one of texts."""
    types: dict[str, pa.DataType] = {}
    for part in tables:
        for field in part.schema:
            if types.get(field.name) != pa.string():
                types[field.name] = pa.float64() if pa.types.is_null(field.type) else field.type
    schema = pa.schema(types.items())
    return pa.concat_tables(
        pa.table(
            [
                part[name].cast(kind) if name in part.column_names else pa.nulls(len(part), kind)
                for name, kind in types.items()
            ],
            schema=schema,
        )
        for part in tables
    )


def _column(values: list[Any]) -> pa.Array:
    """Of one type: numbers if all are, texts otherwise."""
    if all(value is None for value in values):
        return pa.nulls(len(values))
    if all(value is None or isinstance(value, int | float) for value in values):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)


def checksum(path: Path, samples: int) -> Shard:
    """The finished file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(path.name, samples, path.stat().st_size, digest)
