"""Read an annotation file, or a folder of pairs, into rows: the name of an image, a caption, a split or None.

To add a file format, write a function here that yields records, and add it to `FORMATS`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.columns import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    RECOGNIZED,
    Columns,
    ReadOptions,
    sentences,
)
from clip_lightning.data.image_formats import is_image
from clip_lightning.errors import UserError, reason_of

Row = tuple[str, str, str | None]
Record = Mapping[str, Any]
TEXT_SUFFIXES = (".txt", ".caption", ".json")
_TEXT_FOLDERS = ("text", "texts", "txt", "captions")


def read_rows(path: Path, options: ReadOptions = RECOGNIZED) -> Iterator[Row]:
    """Read the rows of an annotation file, whose format is recognized by its suffix and first line.

    Raises:
        UserError: the file is broken, which may be raised while iterating, or has an unknown format.
    """
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"{path} is not a file; give another --data.root")
    first_line = file_head(path).partition("\n")[0]
    for _, recognize, read in FORMATS:
        if recognize(suffix_of(path), first_line):
            return _record_rows(path, read(path, options), options)
    known = ", ".join(name for name, _, _ in FORMATS)
    raise UserError(f"{path} has an unknown format; expected {known}; give another --data.root")


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def file_head(path: Path) -> str:
    """Return the first 64 KB of a file as text; invalid bytes are replaced."""
    try:
        with _open(path) as file:
            return bytes(file.read(1 << 16)).decode(_encoding(path), errors="replace")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return ""


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a UTF-8 or UTF-16 file with their line ends, without the byte order mark."""
    try:
        with io.TextIOWrapper(_open(path), _encoding(path), newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason}); convert it to UTF-8, for example with "
            "`iconv -f latin1 -t utf-8`, and give --data.root the new file"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}); give --data.root the complete file") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _encoding(path: Path) -> str:
    with _open(path) as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _record_rows(path: Path, records: Iterator[Record], options: ReadOptions) -> Iterator[Row]:
    """Yield one row per caption of each record."""
    known: dict[tuple[str, ...], Columns] = {}
    for record in records:
        names = tuple(record)
        columns = known.get(names) or known.setdefault(names, options.find(path, record))
        image, split = record[columns.image], record[columns.split] if columns.split else None
        texts = [record[name] for name in columns.captions]
        try:
            if not (isinstance(image, str | None) and isinstance(split, str | None)):
                raise TypeError
            captions = [caption for text in texts for caption in sentences(text)]
        except (TypeError, KeyError, AttributeError, RecursionError):
            hint = f", or hf:{path} if the file contains the images themselves"
            types = ", ".join(type(value).__name__ for value in (image, *texts, split))
            raise UserError(
                f"{path} has values of the types {types} as image, caption and split; expected a file name, "
                "a sentence or a list of sentences, and train, val or test; give another --data.root"
                + (hint if isinstance(image, dict | bytes) else "")
            ) from None
        # some of several columns or list entries may be empty
        for caption in [caption for caption in captions if caption.strip()] or ("",):
            yield image or "", caption, split


# Formats: from files to records of named columns --------------------------------------------------------


def read_table(path: Path, choose: Callable[[Record], Columns]) -> Iterator[Record]:
    """Read the rows of a CSV or TSV file, whose separator is recognized from its first line.

    If the first line contains the name of an image, the table has no header. The columns are then named by
    their content, or 1, 2, ... if that is not clear.

    Args:
        path: the file.
        choose: finds the columns of the first row; if the last column has captions, they may contain
            separators without quotes.

    Raises:
        UserError: the file is broken, or a quote spans several rows; the message has the line number.
    """
    lines = read_lines(path)
    first, before = next(lines, ""), 0
    declared = re.fullmatch(r'"?sep=([,;|\t])"?\s*', first)  # a line that Excel writes
    if declared:
        first, before = next(lines, ""), 1
    # From the header, not the suffix: open_clip's .csv tables are separated by tabs.
    delimiter = declared[1] if declared else _delimiter(first)
    # A caption of 10,000 words exceeds the csv module's default limit, which is global.
    limit = csv.field_size_limit(1 << 30)
    reader = csv.reader(chain((first,), lines), delimiter=delimiter, strict=True)
    start, columns = 0, None
    try:
        names = [name.strip() for name in next(reader, [])]
        rows: Iterator[list[str]] = reader
        if not _is_header(names) and any(map(is_image, names)):
            rows, names = chain([names], reader), _assumed_names(names)
        start = reader.line_num
        for row in rows:
            record = dict(zip(names, row + [""] * (len(names) - len(row)), strict=False))
            columns = columns or choose(record)
            if len(row) > len(names):
                if columns.captions[-1:] != tuple(names[-1:]):
                    raise csv.Error(f"{len(row)} fields for {len(names)} columns")
                record[names[-1]] = delimiter.join(row[len(names) - 1 :])  # a comma without quotes
            if reader.line_num > start + 1 and _swallows_rows(record, columns.image, delimiter):
                raise csv.Error("a quoted field continues over the rows of other images")
            start = reader.line_num
            yield record
        if columns is None:
            choose(dict.fromkeys(names, ""))
    except csv.Error as error:
        raise UserError(
            f"{path} is broken at line {start + before + 1} ({error}); put quotes around captions with "
            "quotes or separators, double the quotes inside, and give --data.root the corrected file"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _delimiter(line: str) -> str:
    """Return the separator that divides a header into known names, or else a row into cells with an image."""
    marks = [mark for mark in "\t,;|" if mark in line]
    cells = {mark: [cell.strip().strip('"') for cell in line.split(mark)] for mark in marks}
    fitting = [mark for mark in marks if _is_header(cells[mark]) or any(map(is_image, cells[mark]))]
    return (fitting or marks or [","])[0]


def _is_header(names: list[str]) -> bool:
    return not {*IMAGE_NAMES, *CAPTION_NAMES}.isdisjoint(name.strip().lower() for name in names)


def _assumed_names(row: list[str]) -> list[str]:
    """Return names for the columns of a table without a header."""
    names = [str(number) for number in range(1, len(row) + 1)]
    image = next(place for place, cell in enumerate(row) if is_image(cell))
    names[image] = "image"
    others = [place for place, cell in enumerate(row) if place != image]
    for place in [place for place in others if row[place].lower() in SPLIT_WORDS][:1]:
        names[place] = "split"
        others.remove(place)
    if len(others) == 1:
        names[others[0]] = "caption"
    return names


def _swallows_rows(record: Record, image: str, delimiter: str) -> bool:
    """Return whether a field of several lines has a line that looks like another row of the table."""
    name = "".join(record[image].splitlines()[:1]).split(delimiter)[0]
    shape = re.sub(r"\d+", "0", name)
    lines = [line for value in record.values() for line in value.splitlines()[1:] if delimiter in line]
    cells = [cell.strip().strip('"') for line in lines for cell in line.split(delimiter)]
    return any(is_image(cell) or (cell and re.sub(r"\d+", "0", cell) == shape) for cell in cells)


def _read_caption_table(path: Path, options: ReadOptions) -> Iterator[Record]:
    return read_table(path, lambda record: options.find(path, record))


def _read_results(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Read Flickr30k's table: captions contain quotes and commas, and only the first two bars separate."""
    for line in list(read_lines(path))[1:]:
        name, _, rest = line.partition("|")
        number, bar, caption = rest.partition("|")
        if not bar:  # 2199200615.jpg| 4   A dog runs across the grass .
            caption = re.sub(r"^\s*\d+\s", "", number)
        yield {"image": name, "caption": caption}


def _read_token(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Read the University of Illinois's format: `name.jpg#0`, a tab, the caption."""
    for line in read_lines(path):
        name, _, caption = line.partition("\t")
        yield {"image": name.rpartition("#")[0] or name, "caption": caption}


def _read_jsonl(path: Path, options: ReadOptions) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise UserError(
                f"{path} line {number} is not JSON ({reason}); correct it, or give another --data.root"
            ) from None
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is not a JSON object; give another --data.root")
        yield record


def _read_json(path: Path, options: ReadOptions) -> Iterator[Record]:
    text = "".join(read_lines(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.count("\n") and text.partition("\n")[0].rstrip().endswith("}"):
            yield from _read_jsonl(path, options)  # JSON lines in a .json file
            return
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{path} is not JSON ({reason}); correct it, or give another --data.root") from None
    try:
        yield from _json_records(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # unexpected content
        held = "neither an object nor a list"
        if isinstance(content, dict):
            held = f"an object with the keys {', '.join([*content][:5])}"
        elif isinstance(content, list):
            held = f"a list that begins with {json.dumps(content[0])[:60]}"
        raise UserError(
            f"{path} has {held}; expected COCO's captions, Karpathy's images with filename and sentences, a "
            "list of objects with image and caption, or an object from image to captions; give another "
            "--data.root"
        ) from None


def _json_records(content: Any) -> Iterator[Record]:
    """Yield the records of the usual JSON layouts, which are recognized by their content."""
    match content:
        case {"images": list(images), "annotations": list(annotations)}:  # COCO
            captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
            for annotation in annotations:
                captions[annotation["image_id"]].append(annotation["caption"])
            yield from ({"image": image["file_name"], "caption": captions[image["id"]]} for image in images)
        case {"images": list(images)}:  # Karpathy
            for image in images:
                name = os.path.join(image.get("filepath", ""), image["filename"])
                texts = [sentence["raw"] for sentence in image["sentences"]]
                yield {"image": name, "caption": texts, "split": image.get("split")}
        case dict() if content and content.keys() <= SPLIT_WORDS.keys():
            for split, part in content.items():
                yield from ({**record, "split": split} for record in _json_records(part))
        case {"annotations": list(records)} | {"data": list(records)}:
            yield from _json_records(records)
        case dict() if content and all(isinstance(value, str | list | dict) for value in content.values()):
            for image, about in content.items():
                yield {"image": image, **(about if isinstance(about, dict) else {"caption": about})}
        case list():
            for record in content:
                if "regions" in record:  # Visual Genome
                    name = record.get("image_id", record.get("id"))
                    phrases = [region["phrase"] for region in record["regions"]]
                    yield {"image": f"{name}.jpg", "caption": phrases}
                else:
                    yield dict(record)
        case _:
            raise ValueError


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = options.find(path, dict.fromkeys(names)).names()
        # include all columns with usual names for images; their values decide
        columns = [name for name in names if name in columns or name.lower() in IMAGE_NAMES]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    # Arrow raises any of these for damaged files
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a valid Parquet file ({reason_of(error)}); check --data.root"
        ) from None


_Reader = Callable[[Path, ReadOptions], Iterator[Record]]
FORMATS: tuple[tuple[str, Callable[[str, str], object], _Reader], ...] = (
    # name, a test of the file's suffix and first line, and a reader
    ("Parquet", lambda suffix, line: suffix == ".parquet", _read_parquet),
    ("JSON lines", lambda suffix, line: suffix in (".jsonl", ".ndjson"), _read_jsonl),
    ("JSON", lambda suffix, line: suffix == ".json", _read_json),
    ("results.csv", lambda suffix, line: re.match(r"image_name\s*\|", line), _read_results),
    ("name.jpg#0 and a caption", lambda suffix, line: re.match(r"[^\t]+#\d+\t", line), _read_token),
    ("CSV or TSV", lambda suffix, line: suffix in (".csv", ".tsv", ".txt"), _read_caption_table),
)


# Pairs: a text next to every image ----------------------------------------------------------------------


def read_pairs(root: Path, files: Mapping[str, list[str]], left_out: dict[str, str]) -> Iterator[Row]:
    """Read every image that has a text with its name, next to it or in a folder `text` next to its folder.

    Args:
        root: the folder.
        files: the names of the files in each folder below `root`.
        left_out: receives the images without a text.
    """
    texts = {folder: _texts(folder, names) for folder, names in files.items()}
    for folder, names in files.items():
        parts = Path(os.path.relpath(folder, root)).parts
        beside = {**_texts_apart(root, parts, texts), **texts[folder]}
        for file in filter(is_image, names):
            name = os.path.join(*parts, file)
            if not name.isascii() and (shown := os.fsencode(name).decode(errors="replace")) != name:
                left_out[shown] = "its name is not UTF-8; rename it"
                continue
            stem = os.path.splitext(file)[0]
            wanted = [f"{base}{suffix}" for suffix in TEXT_SUFFIXES for base in (stem, file) if beside]
            text = next((beside[key] for key in (*wanted, *map(str.lower, wanted)) if key in beside), None)
            if text is None:
                left_out[name] = f"there is no {stem}.txt next to it"
            else:
                yield from ((name, line, None) for line in [*_sidecar(text)] or ("",))


def _texts(folder: str, names: list[str]) -> dict[str, Path]:
    """Return the text files of a folder by name, and by name in lower case."""
    texts = {name: Path(folder, name) for name in names if name.lower().endswith(TEXT_SUFFIXES)}
    return {name.lower(): path for name, path in texts.items()} | texts


def _texts_apart(root: Path, parts: tuple[str, ...], texts: Mapping[str, dict[str, Path]]) -> dict[str, Path]:
    """Return the texts for the folder `images/a`, which may be in `text/a`."""
    places = (
        os.path.join(root, *parts[:level], name, *parts[level + 1 :])
        for level in range(len(parts))
        for name in _TEXT_FOLDERS
    )
    return next((texts[place] for place in places if texts.get(place)), {})


def _sidecar(path: Path) -> Iterator[str]:
    """Yield the captions of a text file, one per line, or those of a JSON object."""
    if path.suffix.lower() != ".json":
        yield from (line for line in read_lines(path) if line.strip())
        return
    text = "".join(read_lines(path))
    try:
        record = json.loads(text)
        name = next((name for name in CAPTION_NAMES if name in record), None)
        yield from sentences(record[name] if name else None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a JSON object with a caption ({error}); correct or remove it"
        ) from None
