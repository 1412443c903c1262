"""Read annotation files, pairs and data from Python into rows: an image, its captions, its split.

To add a file format, write a function here that yields records, and add it to `FORMATS`.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TextIO

from clip_lightning.data.captions import SPLIT_WORDS, Splits
from clip_lightning.data.image_formats import is_image
from clip_lightning.errors import UserError, as_user_error, check_option

IMAGE_NAMES = (
    *("image", "filepath", "file_name", "filename", "path", "image_path", "image_name"),
    *("images", "img", "picture", "photo", "jpg", "png"),
)
CAPTION_NAMES = (
    *("caption", "captions", "text", "title", "comment", "texts", "sentences", "sentence", "raw", "txt"),
    *("description", "prompt"),
)
_NUMBERED = re.compile(r"(caption|sentence|text)s?[ ._-]?\d+", re.IGNORECASE)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_TEXT_SUFFIXES = (".txt", ".caption", ".json")

Record = Mapping[str, Any]
"""A row of a table, or an object of JSON: the value of each column."""
Row = tuple[Any, list[str], str | None]
"""The name of an image, or else the image itself; its captions; and its split or None."""


class NoColumn(UserError):
    """There is no column that clearly holds images or captions."""


Columns = tuple[str, list[str], str | None]
"""The names of the columns with images, captions and, if there is one, splits."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading and splitting captioned images.

    Attributes:
        layout: layout of the files; by default it is recognized. `captions` is a table of your own, `folder`
            has pairs of name.jpg and name.txt.
        image_column: column with the images; by default it is recognized by its name or type.
        caption_column: column with the captions, or several columns separated by commas; by default it is
            recognized by its name, as are numbered columns such as `caption_0`.
        image_folder: folder with the images if they are not next to the annotations; if the folders in an
            image's name do not exist there, the image is searched for by the last parts of its name.
        max_broken: largest fraction of images and rows that may be unusable, from 0 to 1; the run stops with
            an error if there are more.
        splits: fractions and seed of random splits, for data without splits.
    """

    layout: Literal["auto", "flickr8k", "flickr30k", "captions", "folder"] = "auto"
    image_column: str | None = None
    caption_column: str | None = None
    image_folder: Path | None = None
    max_broken: float = 0.01
    splits: Splits = field(default_factory=Splits)

    def __post_init__(self) -> None:
        is_fraction = 0 <= self.max_broken <= 1
        check_option("data.read.max_broken", self.max_broken, is_fraction, "a fraction from 0 to 1")

    def find(self, source: object, record: Record, header: Sequence[str] = ()) -> Columns:
        """Choose the columns of a record; of several usual ones for images, the first with a file name.

        No name that is used may occur twice in `header`, the names of all columns of a file.
        """
        usual = find_names(IMAGE_NAMES, record)
        image = [name for name in usual if is_image(str(record[name]))] or usual
        if self.image_column:
            image = [self.image_column]
        numbered = filter(_NUMBERED.fullmatch, record)
        captions = [*dict.fromkeys([*find_names(CAPTION_NAMES, record)[:1], *numbered])]
        if self.caption_column:
            captions = [name.strip() for name in self.caption_column.split(",")]
        for kind, given, columns, names in (
            ("image", self.image_column, image, IMAGE_NAMES),
            ("caption", self.caption_column, captions, CAPTION_NAMES),
        ):
            if not columns or not set(columns) <= record.keys():
                raise NoColumn(
                    f"{source} has no {kind} column{f' {given}' if given else ''}: found "
                    f"{', '.join(record) or 'nothing'}, expected one of {', '.join(names[:7])}; give "
                    f"--data.read.{kind}_column COLUMN, or another --data.root"
                )
        split = next(iter(find_names(("split",), record)), None)
        if twice := [name for name in (image[0], *captions, split) if header.count(name) > 1]:
            raise UserError(
                f"{source} has several columns {twice[0]}; give them different names (several captions of an "
                "image may be in caption_0, caption_1, ...), or give another --data.root"
            )
        return image[0], captions, split


RECOGNIZED = ReadOptions()


def find_names(names: Iterable[str], columns: Iterable[str]) -> list[str]:
    """Return the columns with one of these names, regardless of case, in the order of the names."""
    lower = {column.lower(): column for column in reversed([*columns])}
    return [lower[name] for name in names if name in lower]


def read_records(
    source: object, records: Iterable[Record], options: ReadOptions, images: type | tuple[type, ...] = str
) -> Iterator[Row]:
    """Yield a row per record of a file or data set; its image has one of the types `images`, or is None."""
    known: dict[tuple[str, ...], Columns] = {}
    for record in records:
        names = tuple(record)
        image_column, caption_columns, split_column = known.get(names) or known.setdefault(
            names, options.find(source, record)
        )
        image, cells = record[image_column], [record[name] for name in caption_columns]
        split = record[split_column] if split_column else None
        try:
            if not (isinstance(image, images) or image is None) or not isinstance(split, str | None):
                raise TypeError
            yield image, [caption for cell in cells for caption in sentences(cell)], split
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):  # ValueError: NumPy arrays
            types = ", ".join(type(value).__name__ for value in (image, *cells, split))
            wanted = "a file name" if images is str else "an image"
            hint = f", or hf:{source} if it contains the images themselves" if images is str else ""
            raise UserError(
                f"{source} has values of the types {types} as image, caption and split; expected {wanted}, a "
                f"sentence or a list of sentences, and train, val or test; give another --data.root{hint}"
            ) from None


def sentences(value: Any) -> list[str]:
    """Return the captions in a cell, or raise TypeError.

    A cell may hold a sentence, a list of sentences (also in the form in which pandas and NumPy write lists to
    tables), or dictionaries with `raw` as in COCO.
    """
    if isinstance(value, str):
        if "[" in value and re.fullmatch(r"\s*\[[\s,]*\]\s*", _QUOTED.sub("", value)):
            with contextlib.suppress(ValueError):
                return [*json.loads(value)]
            with contextlib.suppress(ValueError, SyntaxError):  # without commas, as NumPy writes lists
                return [ast.literal_eval(item) for item in _QUOTED.findall(value)]
        return [value]
    if isinstance(value, list | tuple):
        return [sentence for item in value for sentence in sentences(item)]
    if isinstance(value, dict):
        return sentences(value["raw"])
    if value is None or value != value:  # NaN
        return []
    raise TypeError(type(value).__name__)


# Files ---------------------------------------------------------------------------------------------------


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


def has_captions(path: Path, options: ReadOptions, known: re.Pattern[str]) -> bool:
    """Return whether the first row has an image and a caption; broken tables count, to be reported later.

    Only the beginning of a JSON file is read unless its name is `known`; it may be large and something else.
    """
    if suffix_of(path) == ".json" and not known.fullmatch(path.name):
        head = file_head(path)
        keys = re.findall(r'"(\w+)"\s*:\s*["\[{]', head)  # not numbers, as `data check` and `evaluate` write
        named = find_names(IMAGE_NAMES, keys) and find_names(CAPTION_NAMES, keys)
        return bool(named or re.search(r'\.(jpe?g|png|webp)"\s*:', head))
    try:
        next(read_rows(path, options), None)
    except UserError as error:
        return not isinstance(error, NoColumn)
    return True


def file_head(path: Path) -> str:
    """Return the first 64 KB of a file as text; invalid bytes are replaced."""
    with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile), _open(path, errors="replace") as text:
        return text.read(1 << 16)
    return ""


def read_lines(path: Path) -> Iterator[str]:
    """Read the lines of a UTF-8 or UTF-16 file with their line ends, without the byte order mark."""
    with as_user_error(
        f"{path} cannot be read as UTF-8 text",
        "give --data.root the complete file, or convert it, for example with `iconv -f latin1 -t utf-8`",
    ):
        with _open(path) as text:
            yield from text


def _open(path: Path, errors: str = "strict") -> TextIO:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text: TextIO = opener(path, "rt", encoding=encoding, errors=errors, newline="")
    return text


# Formats: from files to records of named columns --------------------------------------------------------


def read_table(path: Path, options: ReadOptions) -> Iterator[Record]:
    """Read the rows of a CSV or TSV file, whose separator is recognized from its first line.

    Without a header, columns are named by their content, or 1, 2, ... if that is not clear. If the last
    column has captions, they may contain separators without quotes.
    """
    lines = read_lines(path)
    head = [next(lines, "")]
    if declared := re.fullmatch(r'"?sep=([,;|\t])"?\s*', head[0]):  # a line that Excel writes
        head.append(next(lines, ""))
    # From the header, not the suffix: open_clip's .csv tables are separated by tabs.
    line = head[-1]
    cells = {mark: [cell.strip().strip('"') for cell in line.split(mark)] for mark in "\t,;|" if mark in line}
    fitting = (mark for mark, row in cells.items() if _is_header(row) or any(map(is_image, row)))
    delimiter = declared[1] if declared else next(chain(fitting, cells, ","))
    reader = csv.reader(chain(head, lines), delimiter=delimiter, strict=True)
    start, columns = 0, None
    try:
        rows: Iterator[list[str]] = islice(reader, len(head) - 1, None)
        names = [name.strip() for name in next(rows, [])]
        if not _is_header(names) and any(map(is_image, names)):
            rows, names = chain([names], rows), _assumed_names(names)
        start = reader.line_num
        for row in rows:
            record = dict(zip(names, row + [""] * (len(names) - len(row)), strict=False))
            columns = columns or options.find(path, record, names)
            if len(row) > len(names):
                if columns[1][-1] != names[-1]:
                    raise csv.Error(f"{len(row)} fields for {len(names)} columns")
                record[names[-1]] = delimiter.join(row[len(names) - 1 :])  # a comma without quotes
            if reader.line_num > start + 1 and _swallows_rows(record, columns[0], delimiter):
                raise csv.Error("a quoted field continues over the rows of other images")
            start = reader.line_num
            yield record
        if columns is None:
            options.find(path, dict.fromkeys(names, ""), names)
    except csv.Error as error:
        raise UserError(
            f"{path} is broken at line {start + 1} ({error}); put quotes around captions with quotes or "
            "separators, double the quotes inside, and give --data.root the corrected file"
        ) from None


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


def _read_jsonl(path: Path, options: ReadOptions) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            with as_user_error(f"{path} line {number} is not a JSON object", "give another --data.root"):
                yield {**json.loads(line, object_pairs_hook=_without_repetition)}


def _read_json(path: Path, options: ReadOptions) -> Iterator[Record]:
    text = "".join(read_lines(path))
    if re.match(r"[^\n]*\}\s*\n\s*\{", text):  # JSON lines in a .json file
        yield from _read_jsonl(path, options)
        return
    with as_user_error(
        f"{path} begins with {text[:60]!r}",
        "expected COCO's captions, Karpathy's images with filename and sentences, a list of objects with "
        "image and caption, or an object from image to captions; give another --data.root",
    ):
        yield from _json_records(json.loads(text, object_pairs_hook=_without_repetition))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, or raise ValueError if a name repeats, as only its last value would be kept."""
    content = dict(pairs)
    if len(content) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} is in an object {count} times")
    return content


def _json_records(content: Any) -> Iterator[Record]:
    """Yield the records of the usual JSON layouts, which are recognized by their content."""
    match content:
        case {"images": list(images), "annotations": list(annotations)}:  # COCO
            captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
            if len(captions) < len(images):
                raise ValueError("several images have the same id")
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
        case list() if not any(record.keys() & {"conversations", "regions"} for record in content):
            yield from content  # not the lists of LLaVA and Visual Genome
        case _:
            raise ValueError("unknown layout")


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Record]:
    from pyarrow import parquet

    with as_user_error(f"{path} is not a valid Parquet file", "check --data.root"):
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        image, captions, split = options.find(path, dict.fromkeys(names), names)
        # include all columns with usual names for images; their values decide
        wanted = {image, *captions, split, *find_names(IMAGE_NAMES, names)}
        for batch in file.iter_batches(columns=[name for name in names if name in wanted]):
            yield from batch.to_pylist()


FORMATS: tuple[tuple[str, Callable[[str, str], object], Callable[..., Iterator[Record]]], ...] = (
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
    """Read every image of `files` (folder → names) with a text next to it; note others in `left_out`."""
    for folder, names in files.items():
        parts = Path(os.path.relpath(folder, root)).parts
        texts = [name for name in names if name.lower().endswith(_TEXT_SUFFIXES)]
        spelled = {text.lower(): text for text in texts} | {text: text for text in texts}
        for file in filter(is_image, names):
            name = os.path.join(*parts, file)
            if (shown := name.encode(errors="replace").decode()) != name:
                left_out[shown] = "its name is not UTF-8; rename it"
                continue
            stem = os.path.splitext(file)[0]
            wanted = [f"{base}{suffix}" for suffix in _TEXT_SUFFIXES for base in (stem, file)]
            found = (spelled[text] for text in (*wanted, *map(str.lower, wanted)) if text in spelled)
            if (text := next(found, None)) is None:
                left_out[name] = f"there is no {stem}.txt next to it"
                continue
            path = Path(folder, text)
            captions = [*read_lines(path)]
            if path.suffix.lower() == ".json":
                with as_user_error(f"{path} is not a JSON object with a caption", "correct or remove it"):
                    record = json.loads("".join(captions))
                    captions = sentences([record[key] for key in find_names(CAPTION_NAMES, record)[:1]])
            yield name, captions, None
