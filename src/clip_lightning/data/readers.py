"""Read one annotation file, or a folder of pairs, into rows: picture's name, caption, split or None."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from clip_lightning.errors import UserError

Row = tuple[str, str, str | None]

IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path", "image_path", "image_name")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "comment")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of an annotation file, whose format is told by its suffix and first line.

    Raises:
        UserError: when the file is none of the formats or broken; for most, while iterating.
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no file; give another --data.root")
    first_line = file_head(path).partition("\n")[0]
    for form in _FORMATS:
        if form.recognise(path.suffix.lower(), first_line):
            return form.read(path)
    known = ", ".join(form.name for form in _FORMATS)
    raise UserError(f"{path} is none of the files that can be read ({known}); give another --data.root")


def file_head(path: Path) -> str:
    """The first 64 KB of a file as text, whatever its encoding."""
    with path.open("rb") as file:
        return file.read(1 << 16).decode("utf-8-sig", errors="replace")


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark, their ends included."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason}); save it as UTF-8, for example with "
            "`iconv -f latin1 -t utf-8`, and give the new file to --data.root"
        ) from None


def _columns(path: Path, header: Sequence[str]) -> tuple[int, int, int | None]:
    """Where the picture's name, the caption and, if there is one, the split stand."""
    names = [name.strip().lower() for name in header]
    for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS):
        if not set(wanted) & set(names):
            raise UserError(
                f"{path} has no {wanted[0]} column: found {', '.join(names) or 'nothing'}, expected one of "
                f"{', '.join(wanted)}; rename the column or give another --data.root"
            )
    image = names.index(next(name for name in IMAGE_COLUMNS if name in names))
    caption = names.index(next(name for name in CAPTION_COLUMNS if name in names))
    return image, caption, names.index("split") if "split" in names else None


def _read_table(path: Path) -> Iterator[Row]:
    lines = read_lines(path)
    first = next(lines, "")
    # From the header, not the suffix: open_clip's tables are called .csv and hold tabs.
    delimiter = next((mark for mark in "\t,;|" if mark in first), ",")
    # A caption of 10,000 words passes the csv module's default limit, which is one for all readers.
    limit = csv.field_size_limit(1 << 30)
    reader = csv.reader(chain((first,), lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        image, caption, split = _columns(path, header)
        for row in reader:
            if len(row) > len(header):
                if caption != len(header) - 1:
                    raise csv.Error(f"{len(row)} fields for {len(header)} columns")
                row[caption:] = [delimiter.join(row[caption:])]  # an unquoted comma in the caption
            row += [""] * (len(header) - len(row))
            yield row[image], row[caption], None if split is None else row[split]
    except csv.Error as error:
        raise UserError(
            f"{path} is broken near line {reader.line_num} ({error}); put quotes around captions that hold "
            "quotes or separators, doubling the quotes inside, and give the mended file to --data.root"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _read_results(path: Path) -> Iterator[Row]:
    """Flickr30k: captions hold quotes and commas; only the first two bars separate."""
    for line in list(read_lines(path))[1:]:
        name, _, rest = line.partition("|")
        number, bar, caption = rest.partition("|")
        if not bar:  # 2199200615.jpg| 4   A dog runs across the grass .
            caption = re.sub(r"^\s*\d+\s", "", number)
        yield name, caption, None


def _read_token(path: Path) -> Iterator[Row]:
    """University of Illinois: `name.jpg#0`, a tab, the caption."""
    for line in read_lines(path):
        name, _, caption = line.partition("\t")
        yield name.rpartition("#")[0] or name, caption, None


# what comes of JSON that is broken, too deep, or holds other things than expected
_NO_RECORDS = (ValueError, RecursionError, KeyError, TypeError, AttributeError)


def _read_karpathy(path: Path) -> Iterator[Row]:
    text = "".join(read_lines(path))
    try:
        for image in json.loads(text)["images"]:
            name = os.path.join(image.get("filepath", ""), image["filename"])
            for sentence in image["sentences"] or ({"raw": ""},):
                caption, split = sentence["raw"], image.get("split")
                if not (isinstance(caption, str) and isinstance(split, str | None)):
                    raise TypeError
                yield name, caption, split
    except _NO_RECORDS:
        raise UserError(
            f"{path} is not a Karpathy JSON, an object with images that have a filename "
            "and sentences with raw; give another --data.root"
        ) from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path} line {number} is not JSON ({reason}); mend it for --data.root") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is not a JSON object; give another --data.root")
        yield from _record_rows(path, list(record.values()), _columns(path, list(record)))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if name.lower() in _TABLE_COLUMNS]
        places = _columns(path, names)
        for batch in file.iter_batches(columns=names):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield from _record_rows(path, values, places)
    except UserError:
        raise
    # of a damaged file, Arrow says by any of these what is wrong
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable Parquet file ({reason}); check --data.root") from None


_TABLE_COLUMNS = frozenset((*IMAGE_COLUMNS, *CAPTION_COLUMNS, "split"))


def _record_rows(path: Path, values: Sequence[Any], places: tuple[int, int, int | None]) -> Iterator[Row]:
    """One row a caption of a record whose caption is a string or a list of strings."""
    image, captions = values[places[0]] or "", values[places[1]] or ""
    split = None if places[2] is None else values[places[2]]
    for caption in captions if isinstance(captions, list) else (captions,):
        if not (isinstance(image, str) and isinstance(caption, str)):
            raise UserError(
                f"{path} holds a {type(image).__name__} as image and a {type(caption).__name__} as caption, "
                "expected a file's name and a sentence or a list of them; give another --data.root"
            )
        if not isinstance(split, str | None):
            raise UserError(
                f"{path} holds a {type(split).__name__} as split, expected train, val or test; correct it, "
                "or leave the column out"
            )
        yield image, caption, split


def read_pairs(root: Path, left_out: dict[str, str]) -> Iterator[Row]:
    """Every picture below `root` that has a text of its name beside it, one caption a line."""
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        texts = set(files)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in PICTURE_SUFFIXES:
                continue
            name = os.path.relpath(os.path.join(folder, file), root)
            if (told := os.fsencode(name).decode(errors="replace")) != name:
                left_out[told] = "its name is not UTF-8; rename it"
                continue
            if f"{stem}.txt" not in texts:
                left_out[name] = f"there is no {stem}.txt beside it"
                continue
            lines = [line for line in read_lines(Path(folder, f"{stem}.txt")) if line.strip()]
            yield from ((name, line, None) for line in lines or ("",))


class _Format(NamedTuple):
    name: str
    recognise: Callable[[str, str], object]
    """Given the file's suffix and its first line."""
    read: Callable[[Path], Iterator[Row]]


_FORMATS = (
    _Format("Parquet", lambda suffix, line: suffix == ".parquet", _read_parquet),
    _Format("JSONL", lambda suffix, line: suffix == ".jsonl", _read_jsonl),
    _Format("Karpathy's JSON", lambda suffix, line: suffix == ".json", _read_karpathy),
    _Format("results.csv", lambda suffix, line: re.match(r"image_name\s*\|", line), _read_results),
    _Format("name.jpg#0 and a caption", lambda suffix, line: re.match(r"[^\t]+#\d+\t", line), _read_token),
    _Format("CSV or TSV", lambda suffix, line: suffix in (".csv", ".tsv", ".txt"), _read_table),
)
