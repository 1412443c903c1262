"""Read an annotation file, or a folder of pairs, into rows: the name of an image, its captions, its split.

To add a file format, write a function here that yields records, and add it to `FORMATS`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.columns import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    RECOGNIZED,
    ReadOptions,
    Record,
    Row,
    find_names,
    read_records,
    sentences,
)
from clip_lightning.data.image_formats import is_image
from clip_lightning.errors import UserError, reason_of

TEXT_SUFFIXES = (".txt", ".caption", ".json")
_TEXT_FOLDERS = ("text", "texts", "txt", "captions")


def read_rows(path: Path, options: ReadOptions = RECOGNIZED) -> Iterator[Row]:
    """Read the rows of an annotation file, whose format is recognized by its suffix and first line."""
    if not path.is_file():  # reading a pipe would block
        raise UserError(f"{path} is not a file; give another --data.root")
    first_line = file_head(path).partition("\n")[0]
    for _, recognize, read in FORMATS:
        if recognize(suffix_of(path), first_line):
            return read_records(path, read(path, options), options)
    known = ", ".join(name for name, _, _ in FORMATS)
    raise UserError(f"{path} has an unknown format; expected {known}; give another --data.root")


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def file_head(path: Path) -> str:
    """Return the first 64 KB of a file as text; invalid bytes are replaced."""
    try:
        with _open(path, errors="replace") as text:
            return text.read(1 << 16)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return ""


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a UTF-8 or UTF-16 file with their line ends, without the byte order mark."""
    try:
        with _open(path) as text:
            yield from text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason}); convert it to UTF-8, for example with "
            "`iconv -f latin1 -t utf-8`, and give --data.root the new file"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}); give --data.root the complete file") from None


def _open(path: Path, errors: str = "strict") -> TextIO:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if is_utf16 else "utf-8-sig"
    text: TextIO = opener(path, "rt", encoding=encoding, errors=errors, newline="")
    return text


# Formats: from files to records of named columns --------------------------------------------------------


def read_table(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Read the rows of a CSV or TSV file, whose separator is recognized from its first line.

    If the first line contains the name of an image, the table has no header. The columns are then named by
    their content, or 1, 2, ... if that is not clear. If the last column has captions, they may contain
    separators without quotes.
    """
    lines = read_lines(path)
    head = [next(lines, "")]
    declared = re.fullmatch(r'"?sep=([,;|\t])"?\s*', head[0])  # a line that Excel writes
    if declared:
        head.append(next(lines, ""))
    # From the header, not the suffix: open_clip's .csv tables are separated by tabs.
    delimiter = declared[1] if declared else _delimiter(head[0])
    reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
    start, columns = 0, None
    try:
        names = [name.strip() for name in next(islice(reader, len(head) - 1, None), [])]
        rows: Iterator[list[str]] = reader
        if not _is_header(names) and any(map(is_image, names)):
            rows, names = chain([names], reader), _assumed_names(names)
        start = reader.line_num
        for row in rows:
            record = dict(zip(names, row + [""] * (len(names) - len(row)), strict=False))
            columns = columns or options.find(path, record)
            if len(row) > len(names):
                if columns.captions[-1] != names[-1]:
                    raise csv.Error(f"{len(row)} fields for {len(names)} columns")
                record[names[-1]] = delimiter.join(row[len(names) - 1 :])  # a comma without quotes
            if reader.line_num > start + 1 and _swallows_rows(record, columns.image, delimiter):
                raise csv.Error("a quoted field continues over the rows of other images")
            start = reader.line_num
            yield record
        if columns is None:
            options.find(path, dict.fromkeys(names, ""))
    except csv.Error as error:
        raise UserError(
            f"{path} is broken at line {start + 1} ({error}); put quotes around captions with quotes or "
            "separators, double the quotes inside, and give --data.root the corrected file"
        ) from None


def _delimiter(line: str) -> str:
    """Return the separator that divides a header into known names, or else a row into cells with an image."""
    marks = [mark for mark in "\t,;|" if mark in line]
    cells = {mark: [cell.strip().strip('"') for cell in line.split(mark)] for mark in marks}
    fitting = [mark for mark in marks if _is_header(cells[mark]) or any(map(is_image, cells[mark]))]
    return (fitting or marks or [","])[0]


def _is_header(names: list[str]) -> bool:
    return bool(find_names(IMAGE_NAMES + CAPTION_NAMES, map(str.strip, names)))


def _assumed_names(row: list[str]) -> list[str]:
    """Return names for the columns of a table without a header: image, split, and caption if one is left."""
    kinds = ["image" if is_image(cell) else "split" if cell.lower() in SPLIT_WORDS else "" for cell in row]
    kinds = [kind if kinds.index(kind) == place else "" for place, kind in enumerate(kinds)]  # the first ones
    return [kind or ("caption" if kinds.count("") == 1 else str(n)) for n, kind in enumerate(kinds, start=1)]


def _swallows_rows(record: Record, image: str, delimiter: str) -> bool:
    """Return whether a field of several lines has a line that looks like another row of the table."""
    name = "".join(record[image].splitlines()[:1]).split(delimiter)[0]
    shape = re.sub(r"\d+", "0", name)
    lines = [line for value in record.values() for line in value.splitlines()[1:] if delimiter in line]
    cells = [cell.strip().strip('"') for line in lines for cell in line.split(delimiter)]
    return any(is_image(cell) or (cell and re.sub(r"\d+", "0", cell) == shape) for cell in cells)


def _read_results(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Read Flickr30k's table: captions contain quotes and commas, and only the first two bars separate."""
    for line in islice(read_lines(path), 1, None):
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


def _parse(text: str, source: object) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{source} is not JSON ({reason_of(error)}); correct it, or give another --data.root"
        ) from None


def _read_jsonl(path: Path, options: ReadOptions) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            record = _parse(line, f"{path} line {number}")
            if not isinstance(record, dict):
                raise UserError(f"{path} line {number} is not a JSON object; give another --data.root")
            yield record


def _read_json(path: Path, options: ReadOptions) -> Iterator[Record]:
    text = "".join(read_lines(path))
    first, _, more = text.partition("\n")
    if first.rstrip().endswith("}") and more.lstrip().startswith("{"):  # JSON lines in a .json file
        yield from _read_jsonl(path, options)
        return
    content = _parse(text, path)
    try:
        yield from _json_records(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # unexpected content
        raise UserError(
            f"{path} begins with {text[:60]!r}; expected COCO's captions, Karpathy's images with filename "
            "and sentences, a list of objects with image and caption, or an object from image to captions; "
            "give another --data.root"
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
                yield {"image": name, "caption": image["sentences"], "split": image.get("split")}
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
        found = options.find(path, dict.fromkeys(names))
        # include all columns with usual names for images; their values decide
        wanted = {found.image, *found.captions, found.split, *find_names(IMAGE_NAMES, names)}
        for batch in file.iter_batches(columns=[name for name in names if name in wanted]):
            yield from batch.to_pylist()
    except UserError:
        raise
    # Arrow raises any of these for damaged files
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
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
    ("CSV or TSV", lambda suffix, line: suffix in (".csv", ".tsv", ".txt"), read_table),
)


# Pairs: a text next to every image ----------------------------------------------------------------------


def read_pairs(root: Path, files: Mapping[str, list[str]], left_out: dict[str, str]) -> Iterator[Row]:
    """Read every image of `files` (folder → names) that has a text with its name; note others in `left_out`.

    The text is next to the image, or in a folder `text` next to its folder.
    """
    texts: dict[str, dict[str, str]] = {}  # folder → the name of a text, also in lower case → its file
    for folder, names in files.items():
        named = [name for name in names if name.lower().endswith(TEXT_SUFFIXES)]
        texts[folder] = {name.lower(): name for name in named} | dict(zip(named, named, strict=True))
    for folder, names in files.items():
        parts = Path(os.path.relpath(folder, root)).parts
        apart = (  # `text/a` for `images/a`
            root.joinpath(*parts[:level], name, *parts[level + 1 :])
            for level in range(len(parts))
            for name in _TEXT_FOLDERS
        )
        places = [place for place in (folder, *map(str, apart)) if texts.get(place)]
        for file in filter(is_image, names):
            name = os.path.join(*parts, file)
            if (shown := name.encode(errors="replace").decode()) != name:
                left_out[shown] = "its name is not UTF-8; rename it"
                continue
            stem = os.path.splitext(file)[0]
            wanted = [f"{base}{suffix}" for suffix in TEXT_SUFFIXES for base in (stem, file)]
            found = [
                Path(place, texts[place][key])
                for key in (*wanted, *map(str.lower, wanted))
                for place in places
                if key in texts[place]
            ]
            if found:
                yield name, _sidecar(found[0]), None
            else:
                left_out[name] = f"there is no {stem}.txt next to it"


def _sidecar(path: Path) -> list[str]:
    """Return the captions of a text file, one per line, or those of a JSON object."""
    if path.suffix.lower() != ".json":
        return [*read_lines(path)]
    record = _parse("".join(read_lines(path)), path)
    try:
        return [text for name in find_names(CAPTION_NAMES, record)[:1] for text in sentences(record[name])]
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} is not a JSON object with a caption; correct or remove it") from None
