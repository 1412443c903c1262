"""Read one annotation file, or a folder of pairs, into rows: an image's name, a caption, a split or None.

A new file format is one function here that yields records, and its line in `_FORMATS`.
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
from typing import Any, NamedTuple

from clip_lightning.data.captions import SPLIT_WORDS
from clip_lightning.data.columns import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    RECOGNISED,
    Columns,
    ReadOptions,
    sentences,
)
from clip_lightning.data.image_formats import is_image
from clip_lightning.errors import UserError

Row = tuple[str, str, str | None]
Record = Mapping[str, Any]
TEXT_SUFFIXES = (".txt", ".caption", ".json")
_TEXT_FOLDERS = ("text", "texts", "txt", "captions")


def read_rows(path: Path, options: ReadOptions = RECOGNISED) -> Iterator[Row]:
    """Read the rows of an annotation file, whose format is recognised by its suffix and first line.

    Raises:
        UserError: the file has none of the formats or is broken; for most, while iterating.
    """
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is not a file; give another --data.root")
    first_line = file_head(path).partition("\n")[0]
    for form in _FORMATS:
        if form.recognise(suffix_of(path), first_line):
            return _record_rows(path, form.read(path, options), options)
    known = ", ".join(form.name for form in _FORMATS)
    raise UserError(f"{path} is none of the files that can be read ({known}); give another --data.root")


def suffix_of(path: Path) -> str:
    """The suffix in lower case, of a compressed file that of its content."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def file_head(path: Path) -> str:
    """The first 64 KB of a file as text; bytes that are not text are replaced."""
    try:
        with _open(path) as file:
            return bytes(file.read(1 << 16)).decode(_encoding(path), errors="replace")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return ""


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a UTF-8 or UTF-16 file, their ends included; a byte order mark is dropped."""
    try:
        with io.TextIOWrapper(_open(path), _encoding(path), newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error.reason}); save it as UTF-8, for example with "
            "`iconv -f latin1 -t utf-8`, and give the new file to --data.root"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}); give the complete file to --data.root") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _encoding(path: Path) -> str:
    with _open(path) as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _record_rows(path: Path, records: Iterator[Record], options: ReadOptions) -> Iterator[Row]:
    """One row per caption of each record."""
    known: dict[tuple[str, ...], Columns] = {}
    for record in records:
        names = tuple(record)
        columns = known.get(names) or known.setdefault(names, options.find(path, record))
        image, split = record[columns.image], record[columns.split] if columns.split else None
        texts = [record[name] for name in columns.captions]
        try:
            captions: list[str] | None = [caption for text in texts for caption in sentences(text)]
        except (TypeError, KeyError, AttributeError, RecursionError):
            captions = None
        if captions is None or not isinstance(image, str | None):
            binary = "; a file that holds the images themselves is read by --data.root hf:FILE"
            raise UserError(
                f"{path} holds a {type(image).__name__} as image and a {type(texts[0]).__name__} as caption, "
                "expected a file's name and a sentence or a list of them; give another --data.root"
                + (binary if isinstance(image, dict | bytes) else "")
            )
        if not isinstance(split, str | None):
            raise UserError(
                f"{path} holds a {type(split).__name__} as split, expected train, val or test; correct it, "
                "or leave the column out"
            )
        # of several columns or list entries some may be empty
        for caption in [caption for caption in captions if caption.strip()] or ("",):
            yield image or "", caption, split


# Formats: a file → records of named columns -------------------------------------------------------------


def read_table(path: Path, choose: Callable[[Record], Columns]) -> Iterator[Record]:
    """Read the rows of a CSV or TSV file, whose separator is told from its first line.

    Without a header, which is seen by a first line that names an image, the columns are named by what they
    hold, or 1, 2, ... if that is not clear.

    Args:
        path: the file.
        choose: finds the columns of the first row; if the last caption is the last column, it may hold
            separators without quotes.

    Raises:
        UserError: the file is broken, or a quote swallows rows; the line where that begins is named.
    """
    lines = read_lines(path)
    first, before = next(lines, ""), 0
    said = re.fullmatch(r'"?sep=([,;|\t])"?\s*', first)  # Excel's own line
    if said:
        first, before = next(lines, ""), 1
    # From the header, not the suffix: open_clip's tables are called .csv and hold tabs.
    delimiter = said[1] if said else _delimiter(first)
    # A caption of 10,000 words passes the csv module's default limit, which is one for all readers.
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
                raise csv.Error("a quote opens a field that continues over the rows of other images")
            start = reader.line_num
            yield record
        if columns is None:
            choose(dict.fromkeys(names, ""))
    except csv.Error as error:
        raise UserError(
            f"{path} is broken from line {start + before + 1} on ({error}); put quotes around captions that "
            "hold quotes or separators, double the quotes inside, and give the corrected file to --data.root"
        ) from None
    finally:
        csv.field_size_limit(limit)


def _delimiter(line: str) -> str:
    """The mark that takes a header apart into names, or else a row into cells one of which names an image."""
    marks = [mark for mark in "\t,;|" if mark in line]
    cells = {mark: [cell.strip().strip('"') for cell in line.split(mark)] for mark in marks}
    fitting = [mark for mark in marks if _is_header(cells[mark]) or any(map(is_image, cells[mark]))]
    return (fitting or marks or [","])[0]


def _is_header(names: list[str]) -> bool:
    return not {*IMAGE_NAMES, *CAPTION_NAMES}.isdisjoint(name.strip().lower() for name in names)


def _assumed_names(row: list[str]) -> list[str]:
    """Names for the columns of a table without a header."""
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
    """Check whether a field over several lines holds a line that looks like another row of the table."""
    name = "".join(record[image].splitlines()[:1]).split(delimiter)[0]
    shape = re.sub(r"\d+", "0", name)
    lines = [line for value in record.values() for line in value.splitlines()[1:] if delimiter in line]
    cells = [cell.strip().strip('"') for line in lines for cell in line.split(delimiter)]
    return any(is_image(cell) or (cell and re.sub(r"\d+", "0", cell) == shape) for cell in cells)


def _read_caption_table(path: Path, options: ReadOptions) -> Iterator[Record]:
    return read_table(path, lambda record: options.find(path, record))


def _read_results(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Flickr30k: captions hold quotes and commas; only the first two bars separate."""
    for line in list(read_lines(path))[1:]:
        name, _, rest = line.partition("|")
        number, bar, caption = rest.partition("|")
        if not bar:  # 2199200615.jpg| 4   A dog runs across the grass .
            caption = re.sub(r"^\s*\d+\s", "", number)
        yield {"image": name, "caption": caption}


def _read_token(path: Path, options: ReadOptions) -> Iterator[Record]:
    """University of Illinois: `name.jpg#0`, a tab, the caption."""
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
                f"{path} line {number} is not JSON ({reason}); correct it for --data.root"
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
            yield from _read_jsonl(path, options)  # its name lacks an l
            return
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{path} is not JSON ({reason}); correct it, or give another --data.root") from None
    try:
        yield from _json_records(content)
    # what comes of other content than expected
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        keys = f"an object with the keys {', '.join([*content][:5])}" if isinstance(content, dict) else ""
        inner = f"a list that begins with {json.dumps(content[0])[:60]}" if isinstance(content, list) else ""
        raise UserError(
            f"{path} holds {keys or inner or 'neither an object nor a list'}; expected COCO's captions, "
            "Karpathy's images with filename and sentences, a list of objects with image and caption, or an "
            "object from image to captions; give another --data.root"
        ) from None


def _json_records(content: Any) -> Iterator[Record]:
    """The records of the usual forms of JSON, told by what they hold."""
    match content:
        case {"images": list(images), "annotations": list(annotations)}:  # COCO
            captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
            for annotation in annotations:
                captions[annotation["image_id"]].append(annotation["caption"])
            yield from ({"image": image["file_name"], "caption": captions[image["id"]]} for image in images)
        case {"images": list(images)}:  # Karpathy
            for image in images:
                name = os.path.join(image.get("filepath", ""), image["filename"])
                said = [sentence["raw"] for sentence in image["sentences"]]
                if not all(isinstance(raw, str) for raw in said):
                    raise TypeError
                yield {"image": name, "caption": said, "split": image.get("split")}
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
                    phrases = [region["phrase"] for region in record["regions"]]
                    name = record.get("image_id", record.get("id"))
                    yield {"image": f"{name}.jpg", "caption": phrases}
                elif isinstance(record, dict):
                    yield record
                else:
                    raise TypeError
        case _:
            raise ValueError


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = options.find(path, dict.fromkeys(names)).names()
        # also others of a usual name for images, of which the values tell
        columns = [name for name in names if name in columns or name.lower() in IMAGE_NAMES]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    # of a damaged file, Arrow says by any of these what is wrong
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable Parquet file ({reason}); check --data.root") from None


class _Format(NamedTuple):
    name: str
    recognise: Callable[[str, str], object]
    """Given the file's suffix and its first line."""
    read: Callable[[Path, ReadOptions], Iterator[Record]]


_FORMATS = (
    _Format("Parquet", lambda suffix, line: suffix == ".parquet", _read_parquet),
    _Format("JSON lines", lambda suffix, line: suffix in (".jsonl", ".ndjson"), _read_jsonl),
    _Format("JSON", lambda suffix, line: suffix == ".json", _read_json),
    _Format("results.csv", lambda suffix, line: re.match(r"image_name\s*\|", line), _read_results),
    _Format("name.jpg#0 and a caption", lambda suffix, line: re.match(r"[^\t]+#\d+\t", line), _read_token),
    _Format("CSV or TSV", lambda suffix, line: suffix in (".csv", ".tsv", ".txt"), _read_caption_table),
)


# Pairs: a text beside every image -----------------------------------------------------------------------


def read_pairs(root: Path, files: Mapping[str, list[str]], left_out: dict[str, str]) -> Iterator[Row]:
    """Read every image that has a text of its name beside it, or in a folder `text` beside its own.

    Args:
        root: the folder.
        files: the names in each folder below it.
        left_out: receives the images that have no text.
    """
    texts = {folder: _texts(folder, names) for folder, names in files.items()}
    for folder, names in files.items():
        below, beside = os.path.relpath(folder, root), {**_texts_apart(root, folder, texts), **texts[folder]}
        for file in filter(is_image, names):
            name = file if below == "." else os.path.join(below, file)
            if not name.isascii() and (told := os.fsencode(name).decode(errors="replace")) != name:
                left_out[told] = "its name is not UTF-8; rename it"
                continue
            stem = os.path.splitext(file)[0]
            wanted = [f"{base}{suffix}" for suffix in TEXT_SUFFIXES for base in (stem, file) if beside]
            text = next((beside[key] for key in (*wanted, *map(str.lower, wanted)) if key in beside), None)
            if text is None:
                left_out[name] = f"there is no {stem}.txt beside it"
                continue
            captions = list(_sidecar(text))
            yield from ((name, line, None) for line in captions or ("",))


def _texts(folder: str, names: list[str]) -> dict[str, Path]:
    """Name → file of the texts of a folder; names in lower case do as well."""
    found = {name: Path(folder, name) for name in names if name.lower().endswith(TEXT_SUFFIXES)}
    return {name.lower(): path for name, path in found.items()} | found


def _texts_apart(root: Path, folder: str, texts: Mapping[str, dict[str, Path]]) -> dict[str, Path]:
    """The texts for `images/a` in `text/a`."""
    parts = Path(os.path.relpath(folder, root)).parts
    places = (
        os.path.join(root, *parts[:level], name, *parts[level + 1 :])
        for level in range(len(parts))
        for name in _TEXT_FOLDERS
    )
    return next((texts[place] for place in places if texts.get(place)), {})


def _sidecar(path: Path) -> Iterator[str]:
    """The captions of a text file, one a line, or those of a JSON object."""
    if path.suffix.lower() != ".json":
        yield from (line for line in read_lines(path) if line.strip())
        return
    try:
        record = json.loads("".join(read_lines(path)))
        name = next((name for name in CAPTION_NAMES if name in record), None)
        yield from sentences(record[name] if name else None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a JSON object with a caption ({error}); correct or remove it"
        ) from None
