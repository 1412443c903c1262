"""Read captioned images in the usual layouts, which are recognized from the files in a folder.

`readers` turns an annotation file into rows. This module chooses the annotation files, groups rows by image,
reads official split lists and finds the images.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

from clip_lightning.data.captions import SPLIT_WORDS, CaptionedImage, CaptionSet, parse_split
from clip_lightning.data.columns import CAPTION_NAMES, IMAGE_NAMES, RECOGNIZED, NoColumn, ReadOptions
from clip_lightning.data.image_formats import count_unreadable, counted, is_image, walk
from clip_lightning.data.readers import Row, file_head, read_lines, read_pairs, read_rows, suffix_of
from clip_lightning.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")
_FLICKR = {
    "flickr8k": ("captions.txt", "Flickr8k.token.txt", "dataset_flickr8k.json"),
    "flickr30k": ("captions.txt", "results.csv", "results_20130124.token", "dataset_flickr30k.json"),
}
# Read in folders down to two levels; other tables only in the root and in folders named like splits.
_KNOWN_NAMES = re.compile(
    r"captions\.txt|Flickr8k\.token\.txt|results\.csv|results_20130124\.token|dataset_\w+\.json"
    r"|captions_\w+\.json|(captions|metadata)\.\w+(\.gz)?"
)
_IMAGE_FOLDERS = (
    *("Images", "images", "img", "imgs", "pictures", "photos"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images"),
    *("train2014", "val2014", "train2017", "val2017", "test2017", "VG_100K", "VG_100K_2"),
)
_PART = re.compile(r"\d{5,}(-of-\d+)?")
_SPLIT_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}
_EXPECTED = (
    "; expected captions.txt, Flickr8k.token.txt, results.csv, COCO's or Karpathy's JSON, or a CSV, TSV, "
    "JSON, JSONL or Parquet file, with the images next to it or in Images/, or pairs of name.jpg and name.txt"
)
_PAIRS = "pairs of an image and a text"
_MOST_FOLDERS = 10_000  # searched for a missing image
_MISSING_VALUES = ("na", "n/a", "nan", "null", "none")


class NothingFound(UserError):
    """There are no captioned images, or none that can be used."""


class Annotations(NamedTuple):
    """An annotation file, and the split in its name or in its folder's name."""

    path: Path
    split: str | None


def read_captions(root: Path, options: ReadOptions = RECOGNIZED) -> CaptionSet:
    """Read the images and captions below `root`.

    Captions are only stripped and their whitespace is collapsed. Rows without a caption, and images that are
    missing or have no caption, are recorded in `left_out`.

    Args:
        root: the data set's folder, its annotation file, or several annotation files separated by commas,
            whose names contain their splits.
        options: layout, columns and image folder, if they are not recognized.

    Raises:
        UserError: there are no annotations, they cannot be read or contradict themselves, or it is not clear
            which of several files to read.
    """
    paths = _given_files(root)
    # Only the root is resolved, as names are relative to it and links below it may lead elsewhere.
    root = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.parent for path in paths]))
    base = root if root.is_dir() else root.parent
    passed_over: Counter[str] = Counter()
    files = dict(walk(root, passed_over)) if root.is_dir() else {}
    if len(paths) == 1 and root.is_dir():
        annotations = find_annotations(root, files, options, passed_over)
    else:
        annotations = _one_per_split(paths, root)
    content = _Content()
    for path, split in annotations:
        # The annotations and the images of an archive are often in sibling folders.
        folders = [path.parent, root if root.is_dir() else path.parent.parent]
        rows, finder = read_rows(path, options), Finder(folders, base, options.image_folder)
        content.add(rows, os.path.relpath(path, base), finder, split)
    if not annotations:
        content.add(read_pairs(root, files, content.left_out), _PAIRS, Finder([root], base))
    skipped = f"skipped: {counted(passed_over)}" if passed_over else ""
    if not content.captions:
        example = "".join(f" (first {name}: {why})" for name, why in islice(content.left_out.items(), 1))
        raise NothingFound(
            f"{root} has no usable image with a caption{example}{skipped and f'; {skipped}'}"
            f"{'' if 'such image' in example else _EXPECTED}; check --data.root"
        )
    warnings = [skipped] if skipped else []
    if missing := content.missing_values:
        warnings.insert(
            0,
            f"{missing.total():,} captions look like missing values ({', '.join(missing)}) but are used as "
            "captions; remove these rows",
        )
    images = (
        CaptionedImage(path, tuple(texts), content.splits.get(str(path)))
        for path, texts in content.captions.items()
    )
    source = ", ".join(content.sources)
    return CaptionSet(base, tuple(images), content.official, content.left_out, source, tuple(warnings))


def _given_files(root: Path) -> list[Path]:
    if os.path.exists(root):  # pathlib raises for a name that is too long
        return [root.resolve()]
    parts = [Path(part.strip()) for part in str(root).split(",")]
    if missing := [part for part in parts if not os.path.exists(part)]:
        raise UserError(f"the folder or file {missing[0]} does not exist; check --data.root")
    return [part.resolve() for part in parts]


# Choosing the files -------------------------------------------------------------------------------------


def find_annotations(
    root: Path, files: Mapping[str, list[str]], options: ReadOptions, passed_over: Counter[str]
) -> list[Annotations]:
    """Find the annotation files of a folder; return none if pairs of an image and a text should be read.

    Raises:
        UserError: there are several files that do not belong together, or none for the given layout.
    """
    if options.layout == "folder":
        return []
    known = _FLICKR.get(options.layout, ())
    tables = [path for path in _tables(root, files, passed_over) if not known or path.name in known]
    if known and not tables:
        raise UserError(f"{root} has none of {', '.join(known)}; check --data.root and --data.read.layout")
    if options.layout == "captions" and not tables:
        raise UserError(
            f"{root} has no CSV, TSV, JSONL, JSON or Parquet file with captions; check --data.root"
        )
    readable = [path for path in tables if path.name in known or _has_captions(path, options)]
    with_pairs = options.layout == "auto" and any(caption for _, caption, _ in read_pairs(root, files, {}))
    if readable and with_pairs:
        raise UserError(
            f"{root} has {_names(readable, root)} and also pairs of an image and a text; give --data.root "
            "the file to read, or use --data.read.layout folder to read the pairs"
        )
    if readable or with_pairs:
        for path in sorted({*tables} - {*readable}):
            passed_over[f"table without images and captions, {os.path.relpath(path, root)}"] += 1
        return _one_per_split(readable, root)
    return _one_per_split(tables, root)  # reading an unusable table will raise the reason


def _tables(root: Path, files: Mapping[str, list[str]], passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the files that may be annotations, also those in linked folders."""
    folders = dict(files)
    for link in (*root.glob("*"), *root.glob("*/*")):
        if link.is_symlink() and link.is_dir():
            try:
                folders[str(link)] = sorted(os.listdir(link))
            except OSError as error:
                count_unreadable(root, passed_over, error)
    for folder, names in folders.items():
        parts = Path(os.path.relpath(folder, root)).parts
        if len(parts) > 2:
            continue
        stems = {os.path.splitext(name)[0] for name in names if is_image(name)}
        plain = not parts or parts[-1].lower() in SPLIT_WORDS
        for name in names:
            table = suffix_of(Path(name)) in TABLE_SUFFIXES and os.path.splitext(name)[0] not in stems
            if _KNOWN_NAMES.fullmatch(name) or (plain and table):
                yield Path(folder, name)


def _has_captions(path: Path, options: ReadOptions) -> bool:
    """Return whether the first row has an image and a caption; broken tables count, to be reported later."""
    if suffix_of(path) == ".json" and not _KNOWN_NAMES.fullmatch(path.name):
        head = file_head(path)  # not the complete file, which may be large and something else
        keys = {key.lower() for key in re.findall(r'"(\w+)"\s*:', head)}
        named = keys & {*IMAGE_NAMES, "id", "image_id"} and keys & {*CAPTION_NAMES, "phrase"}
        return bool(named or re.search(r'\.(jpe?g|png|webp)"\s*:', head))
    try:
        next(read_rows(path, options), None)
    except NoColumn:
        return False
    except UserError:
        pass
    return True


def _split_word(path: Path, root: Path) -> str | None:
    """Return the split in the name of a file, or else of its folder."""
    for name in (path.name.split(".")[0], *reversed(Path(os.path.relpath(path.parent, root)).parts)):
        words = {SPLIT_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_WORDS}
        if len(words) == 1:
            return words.pop()
    return None


def _one_per_split(paths: list[Path], root: Path) -> list[Annotations]:
    """Check that the files are one table, which may be in parts (`00000.parquet`), or one per split."""
    files = [Annotations(path, _split_word(path, root)) for path in paths]
    tables = {(file.split, file.path.parent, _PART.sub("", file.path.name)) for file in files}
    splits = [split for split, _, _ in tables]
    if len(set(splits)) < len(splits) or (len(splits) > 1 and None in splits):
        raise UserError(
            f"{root} has several annotation files ({_names(paths, root)}), but not one per split; give "
            "--data.root the file to read, or several files separated by commas"
        )
    # a single file named like a split is data without splits
    return files if len(splits) > 1 else [Annotations(path, None) for path in paths]


def _names(paths: list[Path], root: Path) -> str:
    names = [os.path.relpath(path, root) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# From rows to images ------------------------------------------------------------------------------------


@dataclass
class _Content:
    """The captions and splits that were read so far, from one or several files.

    Attributes:
        captions: image file → captions.
        splits: image file → split, if it has one.
        left_out: name → reason.
        sources: the files that were read, with their number of rows.
        official: whether any source has splits.
        missing_values: counts of captions that look like missing values.
    """

    captions: dict[Path, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    official: bool = False
    missing_values: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Iterable[Row], label: str, finder: Finder, split: str | None = None) -> None:
        """Group the rows of a source by image, and find the image files."""
        captions, splits, count = self._group(rows, label)
        self.sources.append(f"{label} ({count:,} rows)")
        if split:
            splits = dict.fromkeys(captions, split) | splits
        if not splits and label == _PAIRS:
            splits = _folder_splits(captions)
        elif not splits:
            splits = _read_split_lists(finder.folders, captions)
        self.official |= bool(splits)
        for name, texts in captions.items():
            path = finder.find(name)
            if path is None:
                self.left_out[name] = finder.explain(name)
            elif not texts and path not in self.captions:
                self.left_out[name] = "it has no caption"
            else:
                self.captions.setdefault(path, []).extend(texts)
                if name in splits:
                    _put(self.splits, str(path), splits[name])

    def _group(self, rows: Iterable[Row], source: str) -> tuple[dict[str, list[str]], dict[str, str], int]:
        """Return captions by name in the order of the rows, splits by name, and the number of rows."""
        captions: dict[str, list[str]] = {}
        splits: dict[str, str] = {}
        number = 0
        for number, (name, caption, split) in enumerate(rows, start=1):
            name, caption = name.strip(), " ".join(caption.split())
            if not (_is_text(name) and _is_text(caption)):
                self.left_out[f"{source} row {number}"] = f"row {number} has invalid characters"
                continue
            if len(caption) <= 4 and caption.lower() in _MISSING_VALUES:
                self.missing_values[caption] += 1
            if name:
                captions.setdefault(name, []).extend([caption] if caption else [])
            if bool(name) != bool(caption):
                missing = "caption" if name else "image"
                self.left_out[name or f"{source} row {number}"] = f"row {number} has no {missing}"
            if split and (split_name := parse_split(split, f"{source} row {number}")):
                _put(splits, name, split_name)
        return captions, splits, number


def _is_text(word: str) -> bool:
    """Return False for unpaired surrogates, which JSON may contain, and for NUL."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in word


def _put(splits: dict[str, str], name: str, split: str) -> None:
    if splits.setdefault(name, split) != split:
        raise UserError(
            f"the image {name} is in two splits, {splits[name]} and {split}; keep it in only one of them in "
            "the annotations in --data.root"
        )


def _folder_splits(names: Iterable[str]) -> dict[str, str]:
    """Return the splits of pairs if all of them are in folders named like splits."""
    words = {name: SPLIT_WORDS.get(Path(name).parts[0].lower()) for name in names}
    splits = {name: word for name, word in words.items() if word}
    return splits if len(splits) == len(words) and len(set(splits.values())) > 1 else {}


def _read_split_lists(folders: Iterable[Path], captions: Iterable[str]) -> dict[str, str]:
    """Read `Flickr_8k.{train,dev,test}Images.txt`; without a train list, all other images are in train."""
    listed: dict[str, str] = {}
    missing = set(_SPLIT_LISTS)
    for folder, (split, name) in product(dict.fromkeys(folders), _SPLIT_LISTS.items()):
        paths = (folder / sub / f"Flickr_8k.{name}.txt" for sub in ("", "Flickr8k_text"))
        if split in missing and (path := next(filter(Path.is_file, paths), None)):
            missing.remove(split)
            for line in read_lines(path):
                _put(listed, line.strip(), split)
    splits = {name: listed[base] for name in captions if (base := os.path.basename(name)) in listed}
    if splits and "train" in missing:
        splits = dict.fromkeys(captions, "train") | splits
    return splits


class Finder:
    """Finds images by name with one listing per folder, not with one system call per image."""

    def __init__(self, folders: list[Path], base: Path, image_folder: Path | None = None) -> None:
        """Search `folders` with their usual subfolders, or only `image_folder`; `explain` searches `base`."""
        self.folders, self._base, self._image_folder = folders, base, image_folder
        below = [("",), *((name,) for name in _IMAGE_FOLDERS), *product(_IMAGE_FOLDERS, repeat=2)]
        if image_folder is not None:
            folders, below = [image_folder if image_folder.exists() else base / image_folder], [("",)]
            if not folders[0].is_dir():
                raise UserError(f"--data.read.image_folder {image_folder} does not exist; give a folder")
        places = dict.fromkeys(folder.absolute().joinpath(*names) for folder in folders for names in below)
        self._places = [str(place) for place in places if place.is_dir()]
        self._listings: dict[str, tuple[str, frozenset[str]]] = {}
        self._shortened: dict[Path, str] = {}
        self._files_by_stem: dict[str, list[str]] = {}
        """All images below `base` by case-folded stem; filled when an image is missing."""

    def find(self, name: str) -> Path | None:
        """Find the file in any spelling of its name; in an `image_folder` also by the name's last parts."""
        if path := self._look_up(name):  # the usual case
            return path
        spellings = dict.fromkeys(_spellings(name))
        if path := next(filter(None, map(self._look_up, spellings)), None):
            return path
        if self._image_folder is None:
            return None
        names = [spelling.split("/") for spelling in spellings]
        tails = ("/".join(parts[start:]) for start in range(1, max(map(len, names))) for parts in names)
        path = next(filter(None, map(self._look_up, filter(None, tails))), None)
        if path and self._shortened.setdefault(path, name) != name:
            raise UserError(
                f"{self._shortened[path]} and {name} would both be {path}; give --data.read.image_folder the "
                "parent of the folders in these names"
            )
        return path

    def _look_up(self, name: str) -> Path | None:
        head, tail = os.path.split(name)
        for folder in self._places:
            place = os.path.join(folder, head)
            if place not in self._listings:
                self._listings[place] = _list_folder(place)
            normalized, files = self._listings[place]
            if tail in files:
                return Path(normalized, tail)
        return None

    def explain(self, name: str) -> str:
        """Return the reason why an image was not found, with a file that may be the right one."""
        if not self._files_by_stem:
            self._files_by_stem = {"": []}
            for folder, files in islice(walk(self._base, Counter()), _MOST_FOLDERS):
                for file in filter(is_image, files):
                    stem = os.path.splitext(normalize("NFC", file))[0].casefold()
                    self._files_by_stem.setdefault(stem, []).append(os.path.join(folder, file))
        last = normalize("NFC", unquote(name.replace("\\", "/")).rpartition("/")[2])
        stem = os.path.splitext(last)[0] if is_image(last) else last
        alike = self._files_by_stem.get(stem.casefold(), [])
        if not alike:
            return "there is no such image"
        more = f" (or {len(alike) - 1} more)" if len(alike) > 1 else ""
        nearest = os.path.relpath(alike[0], self._base)
        folder = f", or use --data.read.image_folder {os.path.dirname(alike[0])}"
        is_same = normalize("NFC", os.path.basename(alike[0])) == last
        remedy = f"correct the name{folder if is_same else ''}"
        return f"there is no such image, but there is {nearest}{more}; {remedy}"


def _spellings(name: str) -> Iterator[str]:
    """Yield the name, and its local spellings if it comes from another system or a URL."""
    slashes = name.replace("\\", "/")
    for spelling in (name, slashes, unquote(slashes), slashes.lstrip("/")):
        yield from (spelling, normalize("NFC", spelling), normalize("NFD", spelling))


def _list_folder(folder: str) -> tuple[str, frozenset[str]]:
    """Return the normalized path of a folder, and the names of its files."""
    try:
        normalized = os.path.normpath(folder)
        # After a link, `..` is not the parent in the text of the path.
        if ".." in folder.split(os.sep) and not os.path.samefile(normalized, folder):
            normalized = os.path.realpath(folder)
        with os.scandir(normalized) as entries:
            return normalized, frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return folder, frozenset()
