"""Read the usual layouts of captioned images, recognised by looking at the folder.

`readers` turns an annotation file into rows. This module chooses the files, and does what all formats share:
grouping by image, the official split lists, finding the images.
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

from clip_lightning.data.captions import SPLIT_WORDS, CaptionedImage, CaptionSet
from clip_lightning.data.columns import CAPTION_NAMES, IMAGE_NAMES, RECOGNISED, NoColumn, ReadOptions
from clip_lightning.data.image_formats import counted, is_image, walk
from clip_lightning.data.readers import Row, file_head, read_lines, read_pairs, read_rows, suffix_of
from clip_lightning.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".json")

_FLICKR = {
    "flickr8k": ("captions.txt", "Flickr8k.token.txt", "dataset_flickr8k.json"),
    "flickr30k": ("captions.txt", "results.csv", "results_20130124.token", "dataset_flickr30k.json"),
}
DATASETS = ("auto", *_FLICKR, "captions", "folder")
# Read in any folder down to two levels; other tables only at the top and in folders called as splits are.
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
    "; expected captions.txt, Flickr8k.token.txt, results.csv, COCO's or Karpathy's JSON or a CSV, TSV, "
    "JSON, JSONL or Parquet file with the images beside it or in Images/, or pairs of name.jpg and name.txt"
)
_PAIRS = "pairs of an image and a text"
_MOST_FOLDERS = 10_000  # looked into for a missing image
_MISSING = ("na", "n/a", "nan", "null", "none")


class NothingFound(UserError):
    """There are no captions, or none that can be used."""


class Annotations(NamedTuple):
    """An annotation file, and the split that its name or its folder's name says."""

    path: Path
    split: str | None


def read_captions(root: Path, dataset: str = "auto", options: ReadOptions = RECOGNISED) -> CaptionSet:
    """Read the images and captions below `root`.

    Captions are stripped and their whitespace collapsed, nothing else. Rows without a caption, and
    images that are missing or have no caption, are named in `left_out`.

    Args:
        root: the data set's folder, or its annotation file, or several files separated by commas, whose names
            say their splits.
        dataset: `auto`, `flickr8k`, `flickr30k`, `captions` (a table of one's own) or `folder` (pairs of
            name.jpg and name.txt).
        options: columns and image folder, if they are not recognised.

    Raises:
        UserError: there is nothing to read, it cannot be read, it contradicts itself, or it is not clear
            which of several files is meant.
    """
    if dataset not in DATASETS:
        raise UserError(f"there is no data set kind {dataset!r}; set --data.dataset to {', '.join(DATASETS)}")
    paths = _given_files(root)
    # Only the root is resolved: a link below it may lead out of it, and names are relative to the root.
    root = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.parent for path in paths]))
    passed_over: Counter[str] = Counter()
    files = {folder: names for folder, names in walk(root, passed_over)} if root.is_dir() else {}
    if len(paths) > 1 or not root.is_dir():
        annotations = _joined(paths, root)
    else:
        annotations = find_annotations(root, dataset, files, options, passed_over)
    base = root if root.is_dir() else root.parent
    found = _Found()
    if annotations:
        for file in annotations:
            # An archive's text and its images often are in neighbouring folders.
            folders = [file.path.parent, root if root.is_dir() else file.path.parent.parent]
            finder = Finder(folders, base, options.image_folder)
            label = os.path.relpath(file.path, base)
            found.add(read_rows(file.path, options), label, finder, file.split, len(annotations) > 1)
    else:
        left_out: dict[str, str] = {}
        found.add(read_pairs(root, files, left_out), _PAIRS, Finder([root], base))
        found.left_out |= left_out
    if not found.captions:
        raise NothingFound(_nothing_usable(root, found.left_out, passed_over))
    images = (
        CaptionedImage(path, tuple(texts), found.splits.get(str(path)))
        for path, texts in found.captions.items()
    )
    source, warnings = ", ".join(found.sources), found.warnings(passed_over)
    return CaptionSet(base, tuple(images), found.official, found.left_out, source, warnings)


def _nothing_usable(root: Path, left_out: dict[str, str], passed_over: Counter[str]) -> str:
    example = "".join(f" (for example {name}: {reason})" for name, reason in list(left_out.items())[:1])
    passed = f"; passed over: {counted(passed_over)}" if passed_over else ""
    expected = "" if "such image" in example else _EXPECTED
    return (
        f"{root} holds no image with a caption that can be used{example}{passed}{expected}; check --data.root"
    )


def _given_files(root: Path) -> list[Path]:
    if os.path.exists(root):  # pathlib raises for a name that is too long
        return [root.resolve()]
    parts = [Path(part.strip()) for part in str(root).split(",")]
    missing = [part for part in parts if not os.path.exists(part)]
    if missing:
        raise UserError(f"there is no folder or file {missing[0]}; give the data set's folder to --data.root")
    return [part.resolve() for part in parts]


# Which files --------------------------------------------------------------------------------------------


def find_annotations(
    root: Path,
    dataset: str,
    files: Mapping[str, list[str]] | None = None,
    options: ReadOptions = RECOGNISED,
    passed_over: Counter[str] | None = None,
) -> list[Annotations]:
    """Find the folder's annotation files; none if pairs of an image and a text are to be read.

    Raises:
        UserError: there are several that do not belong together, or none of the kind asked for.
    """
    if dataset == "folder":
        return []
    files = dict(walk(root, Counter())) if files is None else files
    known = _FLICKR.get(dataset)
    tables = [path for path in _tables(root, files) if known is None or path.name in known]
    if known and not tables:
        raise UserError(f"{root} holds none of {', '.join(known)}; check --data.root and --data.dataset")
    if dataset == "captions" and not tables:
        raise UserError(
            f"{root} holds no CSV, TSV, JSONL, JSON or Parquet file of captions; check --data.root"
        )
    readable = [path for path in tables if path.name in (known or ()) or _has_captions(path, options)]
    with_pairs = dataset == "auto" and any(row[1] for row in read_pairs(root, files, {}))
    if readable and with_pairs:
        raise UserError(
            f"{root} holds {_names(readable, root)} and also pairs of an image and a text; give the "
            "file that is meant to --data.root, or --data.dataset folder for the pairs"
        )
    if passed_over is not None and (readable or with_pairs):
        for path in sorted(set(tables) - set(readable)):
            passed_over[f"table without images and captions, {os.path.relpath(path, root)}"] += 1
    # a table that cannot be used says why, unless there are pairs to read
    return _joined(readable or ([] if with_pairs else tables), root)


def _tables(root: Path, files: Mapping[str, list[str]]) -> Iterator[Path]:
    """The files that may hold annotations."""
    linked = [
        folder for folder in (*root.glob("*"), *root.glob("*/*")) if folder.is_symlink() and folder.is_dir()
    ]
    for folder, names in (*files.items(), *((str(folder), sorted(os.listdir(folder))) for folder in linked)):
        parts = Path(os.path.relpath(folder, root)).parts
        stems = {os.path.splitext(name)[0] for name in names if is_image(name)}
        for name in names if len(parts) <= 2 else ():
            plain = not parts or parts[-1].lower() in SPLIT_WORDS
            table = suffix_of(Path(name)) in TABLE_SUFFIXES and os.path.splitext(name)[0] not in stems
            if _KNOWN_NAMES.fullmatch(name) or (plain and table):
                yield Path(folder, name)


def _has_captions(path: Path, options: ReadOptions) -> bool:
    """Check whether the first row has an image and a caption; a broken table counts, to be reported."""
    if suffix_of(path) == ".json" and not _KNOWN_NAMES.fullmatch(path.name):
        head = file_head(path)  # rather than megabytes of other things
        keys = {key.lower() for key in re.findall(r'"(\w+)"\s*:', head)}
        named = keys & {*IMAGE_NAMES, "id", "image_id"} and keys & {*CAPTION_NAMES, "phrase"}
        return bool(named or re.search(r'\.(jpe?g|png|webp)"\s*:', head))
    try:
        next(read_rows(path, options), None)
    except NoColumn:
        return False
    except UserError:
        return True
    return True


def _split_word(path: Path, root: Path) -> str | None:
    """The split that a file's name says, or else its folder's."""
    for name in (path.name.split(".")[0], *reversed(Path(os.path.relpath(path.parent, root)).parts)):
        words = {SPLIT_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_WORDS}
        if len(words) == 1:
            return words.pop()
    return None


def _joined(paths: list[Path], root: Path) -> list[Annotations]:
    """The files, if they are the parts of a table (`00000.parquet`), or a table (or its parts) per split."""
    files = [Annotations(path, _split_word(path, root)) for path in paths]
    tables = {(file.split, file.path.parent, _PART.sub("", file.path.name)) for file in files}
    splits = [split for split, _, _ in tables]
    if len(set(splits)) < len(splits) or (len(splits) > 1 and None in splits):
        raise UserError(
            f"{root} holds several annotation files ({_names(paths, root)}), not one "
            "for each split; give the one that is meant to --data.root, or several separated by commas"
        )
    # all in one split is how data that is not split is called
    return [Annotations(file.path, file.split if len(splits) > 1 else None) for file in files]


def _names(paths: list[Path], root: Path) -> str:
    names = [os.path.relpath(path, root) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _folder_splits(names: Iterable[str]) -> dict[str, str]:
    """The splits of pairs that all are in folders called as splits are."""
    words = {name: SPLIT_WORDS.get(Path(name).parts[0].lower()) for name in names}
    splits = {name: word for name, word in words.items() if word}
    return splits if len(splits) == len(words) and len(set(splits.values())) > 1 else {}


# From rows to images ------------------------------------------------------------------------------------


@dataclass
class _Found:
    """The captions and splits of the images found so far, from one file or several.

    Attributes:
        captions: file → captions.
        splits: file → split, for those that have one.
        left_out: name → reason.
        sources: what was read, with its number of rows.
        official: whether any source names splits.
        missing_words: captions that stand for a missing value.
    """

    captions: dict[Path, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    official: bool = False
    missing_words: Counter[str] = field(default_factory=Counter)

    def add(
        self, rows: Iterable[Row], label: str, finder: Finder, split: str | None = None, several: bool = False
    ) -> None:
        """Group the rows of a source by image, and find the images."""
        left_out: dict[str, str] = {}
        captions, splits, count = _group(rows, label, left_out, self.missing_words)
        self.sources.append(f"{label} ({count:,} rows)")
        if split:
            splits = dict.fromkeys(captions, split) | splits
        splits = splits or (
            _folder_splits(captions) if label == _PAIRS else _read_split_lists(finder.folders, captions)
        )
        self.official |= bool(splits)
        for name, texts in captions.items():
            path = finder.find(name)
            if path is None:
                left_out[name] = finder.explain(name)
            elif not texts and path not in self.captions:
                left_out[name] = "it has no caption"
            else:
                self.captions.setdefault(path, []).extend(texts)
                if name in splits:
                    _put(self.splits, str(path), splits[name])
        self.left_out |= {
            f"{label}: {name}" if several else name: reason for name, reason in left_out.items()
        }

    def warnings(self, passed_over: Counter[str]) -> tuple[str, ...]:
        """What is probably not meant, and what was passed over."""
        lines = []
        if self.missing_words:
            lines.append(
                f"{self.missing_words.total():,} captions stand for a missing value ("
                f"{', '.join(self.missing_words)}) and are used as they are; remove these rows"
            )
        if passed_over:
            lines.append(f"passed over: {counted(passed_over)}")
        return tuple(lines)


def _group(
    rows: Iterable[Row], source: str, left_out: dict[str, str], missing_words: Counter[str]
) -> tuple[dict[str, list[str]], dict[str, str], int]:
    """The captions of each name in the order of the rows, the splits of those that have one, the rows."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    number = 0
    for number, (name, caption, split) in enumerate(rows, start=1):
        name, caption = name.strip(), " ".join(caption.split())
        if not (_is_text(name) and _is_text(caption)):
            left_out[f"{source} row {number}"] = f"row {number} holds invalid characters"
            continue
        if len(caption) <= 4 and caption.lower() in _MISSING:
            missing_words[caption] += 1
        if name and caption:
            captions.setdefault(name, []).append(caption)
        elif name or caption:
            left_out[name or f"{source} row {number}"] = (
                f"row {number} has no {'caption' if name else 'image'}"
            )
            if name:
                captions.setdefault(name, [])
        if split and (word := split.strip().lower()):
            if word not in SPLIT_WORDS:
                raise UserError(
                    f"{source} puts {name} in a split called {split!r}; expected {', '.join(SPLIT_WORDS)}; "
                    "correct it, or leave the column out and set --data.splits.val_fraction"
                )
            _put(splits, name, SPLIT_WORDS[word])
    return captions, splits, number


def _is_text(word: str) -> bool:
    """Check for what cannot be written down: JSON may hold halves of characters, and any format NUL."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in word


def _put(splits: dict[str, str], name: str, split: str) -> None:
    if splits.setdefault(name, split) != split:
        raise UserError(
            f"the image {name} is put in two splits, {splits[name]} and {split}; "
            "keep it in one of them in the annotations given to --data.root"
        )


def _read_split_lists(folders: Iterable[Path], captions: Iterable[str]) -> dict[str, str]:
    """Read the splits of `Flickr_8k.{train,dev,test}Images.txt`; without a train list, train is the rest."""
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
        splits |= {name: "train" for name in captions if name not in splits}
    return splits


class Finder:
    """Finds images by name with one listing per folder: a million captions must not cost as many stats."""

    def __init__(self, folders: list[Path], base: Path, image_folder: Path | None = None) -> None:
        """Look in `folders` and their usual image folders, or only in `image_folder`; explain by `base`."""
        self.folders, self._base, self._image_folder = folders, base, image_folder
        below = [("",), *((name,) for name in _IMAGE_FOLDERS), *product(_IMAGE_FOLDERS, repeat=2)]
        if image_folder is not None:
            folders, below = [image_folder if image_folder.exists() else base / image_folder], [("",)]
            if not folders[0].is_dir():
                raise UserError(f"--data.read.image_folder {image_folder}: there is no such folder")
        places = dict.fromkeys(folder.absolute().joinpath(*names) for folder in folders for names in below)
        self._places = [str(place) for place in places if place.is_dir()]
        self._listings: dict[str, tuple[str, frozenset[str]]] = {}
        self._shortened: dict[Path, str] = {}
        self._names: dict[str, list[str]] = {}
        """Name without suffix and case → files below the base, once one is missing."""

    def find(self, name: str) -> Path | None:
        """Find the file, however a system spells its name; in an `image_folder` also by its last parts."""
        if found := self._look_up(name):  # nearly always
            return found
        spellings = dict.fromkeys(_spellings(name))
        if found := next(filter(None, map(self._look_up, spellings)), None):
            return found
        if self._image_folder is None:
            return None
        parts = [spelling.split("/") for spelling in spellings]
        tails = ("/".join(each[start:]) for start in range(1, max(map(len, parts))) for each in parts)
        found = next(filter(None, map(self._look_up, filter(None, tails))), None)
        if found and self._shortened.setdefault(found, name) != name:
            raise UserError(
                f"both {self._shortened[found]} and {name} would be {found}; give the folder that holds "
                "the folders of these names to --data.read.image_folder"
            )
        return found

    def _look_up(self, name: str) -> Path | None:
        head, tail = os.path.split(name)
        for folder in self._places:
            place = os.path.join(folder, head)
            if place not in self._listings:
                self._listings[place] = _list_folder(place)
            normalised, files = self._listings[place]
            if tail in files:
                return Path(normalised, tail)
        return None

    def explain(self, name: str) -> str:
        """Say that there is no such image, and which file may be meant."""
        if not self._names:
            self._names = {"": []}
            for folder, files in islice(walk(self._base, Counter()), _MOST_FOLDERS):
                for file in filter(is_image, files):
                    stem = os.path.splitext(normalize("NFC", file))[0].casefold()
                    self._names.setdefault(stem, []).append(os.path.join(folder, file))
        last = normalize("NFC", unquote(name.replace("\\", "/")).rpartition("/")[2])
        stem = os.path.splitext(last)[0] if is_image(last) else last
        near = self._names.get(stem.casefold(), [])
        if not near:
            return "there is no such image"
        more = f" (or {len(near) - 1} more)" if len(near) > 1 else ""
        meant = (
            f"there is no such image; {os.path.relpath(near[0], self._base)}{more} may be meant: write that"
        )
        same = normalize("NFC", os.path.basename(near[0])) == last
        return meant + (f", or give --data.read.image_folder {os.path.dirname(near[0])}" if same else "")


def _spellings(name: str) -> Iterator[str]:
    """The name, and how it may be written here if it comes from another system or a URL."""
    slashes = name.replace("\\", "/")
    for each in (name, slashes, unquote(slashes), slashes.lstrip("/")):
        yield from (each, normalize("NFC", each), normalize("NFD", each))


def _list_folder(folder: str) -> tuple[str, frozenset[str]]:
    """Return the folder's one name and its files."""
    try:
        normalised = os.path.normpath(folder)
        # After a link, `..` is not the folder that the text before it names.
        if ".." in folder.split(os.sep) and not os.path.samefile(normalised, folder):
            normalised = os.path.realpath(folder)
        with os.scandir(normalised) as entries:
            return normalised, frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return folder, frozenset()
