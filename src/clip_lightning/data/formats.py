"""Read captioned images in the usual layouts, which are recognized from the files in a folder.

`readers` turns an annotation file into rows. This module chooses the annotation files, groups rows by image,
reads official split lists and finds the images.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from itertools import islice, product
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

from clip_lightning.data.captions import SPLIT_WORDS, CaptionedImage, CaptionSet, parse_split
from clip_lightning.data.image_formats import counted, is_image, walk
from clip_lightning.data.readers import RECOGNIZED, ReadOptions, Row, has_captions, read_pairs, read_rows
from clip_lightning.errors import UserError

_FLICKR = {
    "flickr8k": ("captions.txt", "Flickr8k.token.txt", "dataset_flickr8k.json"),
    "flickr30k": ("captions.txt", "results.csv", "results_20130124.token", "dataset_flickr30k.json"),
}
# Read in folders down to two levels; other tables only in the root and in folders named like splits.
KNOWN_NAMES = re.compile(
    r"captions\.txt|Flickr8k\.token\.txt|results\.csv|results_20130124\.token|dataset_\w+\.json"
    r"|captions_\w+\.json|(captions|metadata)\.\w+(\.gz)?"
)
_TABLE = re.compile(r".+\.(csv|tsv|jsonl|ndjson|parquet|json)(\.gz)?", re.IGNORECASE)
_IMAGE_FOLDERS = (
    *("Images", "images", "img", "imgs", "pictures", "photos"),
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images"),
    *("train2014", "val2014", "train2017", "val2017", "test2017"),
)
_MISSING_VALUES = ("na", "n/a", "nan", "null", "none")


class NothingFound(UserError):
    """There are no captioned images, or none that can be used."""


def read_captions(root: Path, options: ReadOptions = RECOGNIZED) -> CaptionSet:
    """Read the images and captions of a folder, or of annotation files separated by commas.

    Captions are only stripped and their whitespace is collapsed. Rows without a caption, and images that are
    missing or have no caption, are recorded in `left_out`.
    """
    # pathlib raises for a name that is too long
    paths = [root] if os.path.exists(root) else [Path(part.strip()) for part in str(root).split(",")]
    if lacking := [path for path in paths if not os.path.exists(path)]:
        raise UserError(f"the folder or file {lacking[0]} does not exist; check --data.root")
    # Only the root is resolved, as names are relative to it and links below it may lead elsewhere.
    paths = [*dict.fromkeys(path.resolve() for path in paths)]
    root = paths[0] if len(paths) == 1 else Path(os.path.commonpath([path.parent for path in paths]))
    base = root if root.is_dir() else root.parent
    skipped: Counter[str] = Counter()
    content = _Content()
    folders: list[Path] = []
    if (root / "shards.json").is_file():
        raise UserError(f"{root} has tars, which only fit reads as --data.root; give their original data")
    if len(paths) == 1 and root.is_dir():
        files = dict(walk(root, skipped))
        annotations = _find_annotations(root, files, options, skipped)
        if not annotations:
            content.add_pairs(root, files)
    else:
        annotations = _one_per_split(paths, root)
    for path, split in annotations:
        # The annotations and the images of an archive are often in sibling folders.
        folders = [path.parent, root if root.is_dir() else path.parent.parent]
        finder = Finder(folders, base, options.image_folder)
        content.add(read_rows(path, options), os.path.relpath(path, base), finder, split)
    content.splits = content.splits or _listed_splits(folders, content.captions)
    captions = {path: tuple(texts) for path, texts in content.captions.items() if texts}
    words = (text for texts in captions.values() for text in texts if text.lower() in _MISSING_VALUES)
    warnings = []
    if missing := Counter(words):
        warnings.append(
            f"{missing.total():,} captions look like missing values ({', '.join(missing)}) but are used as "
            "captions; remove these rows"
        )
    if skipped:
        warnings.append(f"skipped: {counted(skipped)}")
    if not captions:
        first = "".join(f" (first {name}: {why})" for name, why in islice(content.left_out.items(), 1))
        problems = "; ".join([f"{root} has no usable image with a caption{first}", *warnings])
        raise NothingFound(
            f"{problems}; expected captions.txt, Flickr8k.token.txt, results.csv, COCO's or Karpathy's JSON, "
            "or a CSV, TSV, JSON, JSONL or Parquet file, with the images next to it or in Images/, or pairs "
            "of name.jpg and name.txt; check --data.root"
        )
    splits, source = content.splits, ", ".join(content.sources)
    images = (
        CaptionedImage(path, texts, splits.get(path), content.names[path]) for path, texts in captions.items()
    )
    return CaptionSet(base, tuple(images), bool(splits), content.left_out, source, tuple(warnings))


# Choosing the files -------------------------------------------------------------------------------------


def _find_annotations(
    root: Path, files: Mapping[str, list[str]], options: ReadOptions, skipped: Counter[str]
) -> list[tuple[Path, str | None]]:
    """Find the annotation files of a folder, with their splits; none if pairs are to be read."""
    known = _FLICKR.get(options.layout, ())
    tables = [path for path in _tables(root, files) if not known or path.name in known]
    if options.layout == "folder" or (options.layout == "auto" and not tables):
        return []
    if not tables:
        expected = " or ".join(known) or "CSV, TSV, JSONL, JSON or Parquet file with captions"
        raise UserError(f"{root} has no {expected}; check --data.root and --data.read.layout")
    readable = [path for path in tables if path.name in known or has_captions(path, options, KNOWN_NAMES)]
    with_pairs = options.layout == "auto" and any(
        text.strip() for _, texts, _ in read_pairs(root, files, {}) for text in texts
    )
    if readable and with_pairs:
        raise UserError(
            f"{root} has {_names(readable, root)} and also pairs of an image and a text; give --data.root "
            "the file to read, or use --data.read.layout folder to read the pairs"
        )
    if not (readable or with_pairs):
        return _one_per_split(tables, root)  # reading an unusable table will raise the reason
    for path in sorted({*tables} - {*readable}):
        skipped[f"table without images and captions, {os.path.relpath(path, root)}"] += 1
    return _one_per_split(readable, root)


def _tables(root: Path, files: Mapping[str, list[str]]) -> Iterator[Path]:
    """Yield the files that may be annotations, also those in linked folders."""
    links = [path for path in (*root.glob("*/"), *root.glob("*/*/")) if path.is_symlink()]
    linked = {folder: sorted(names) for link in links for folder, _, names in islice(os.walk(link), 1)}
    for folder, names in {**files, **linked}.items():
        parts = Path(os.path.relpath(folder, root)).parts
        if len(parts) > 2:
            continue
        stems = {os.path.splitext(name)[0] for name in names if is_image(name)}
        plain = not parts or parts[-1].lower() in SPLIT_WORDS
        for name in names:
            is_table = plain and _TABLE.fullmatch(name) and os.path.splitext(name)[0] not in stems
            if is_table or KNOWN_NAMES.fullmatch(name):
                yield Path(folder, name)


def _one_per_split(paths: list[Path], root: Path) -> list[tuple[Path, str | None]]:
    """Check that the files are one table, which may be in parts (`00000.parquet`), or one per split."""
    files = [(path, _split_word(path, root)) for path in paths]
    tables = {(split, path.parent, re.sub(r"\d{5,}(-of-\d+)?", "", path.name)) for path, split in files}
    splits = [split for split, _, _ in tables]
    if len(set(splits)) < len(splits) or (len(splits) > 1 and None in splits):
        raise UserError(
            f"{root} has several annotation files ({_names(paths, root)}), but not one per split; give "
            "--data.root the file to read, or several files separated by commas"
        )
    # a single file named like a split is data without splits
    return files if len(splits) > 1 else [(path, None) for path in paths]


def _split_word(path: Path, root: Path) -> str | None:
    """Return the split in the name of a file, or else of its folder."""
    for name in (path.name.split(".")[0], *reversed(Path(os.path.relpath(path.parent, root)).parts)):
        words = {SPLIT_WORDS[word] for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_WORDS}
        if len(words) == 1:
            return words.pop()
    return None


def _names(paths: list[Path], root: Path) -> str:
    names = [os.path.relpath(path, root) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# From rows to images ------------------------------------------------------------------------------------


class _Content:
    """The captions and splits by image file that were read so far, from one or several sources."""

    def __init__(self) -> None:
        self.captions: dict[Path, list[str]] = {}
        self.splits: dict[Path, str] = {}
        self.names: dict[Path, str] = {}
        self.left_out: dict[str, str] = {}
        self.sources: list[str] = []

    def add(self, rows: Iterable[Row], source: str, finder: Finder, split: str | None = None) -> None:
        """Find the image files of the rows of a source, and group the rows by image."""
        number = 0
        for number, (name, texts, own_split) in enumerate(rows, start=1):
            place, name = f"{source} row {number}", (name or "").strip()
            texts = [caption for text in texts if (caption := " ".join(text.split()))]
            valid, is_valid_name = [text for text in texts if _is_text(text)], _is_text(name)
            if len(valid) < len(texts) or not is_valid_name:
                self.left_out[place] = "it has invalid characters"
            elif bool(name) != bool(texts):
                self.left_out[name or place] = f"row {number} has no {'caption' if name else 'image'}"
            if not (name and is_valid_name):
                continue
            own_split = parse_split(own_split, place) or split
            path = finder.find(name)
            if path is None:
                self.left_out[name] = finder.explain(name)
                continue
            self.captions.setdefault(path, []).extend(valid)
            self.names.setdefault(path, name)
            if own_split:
                _put(self.splits, path, own_split)
        self.sources.append(f"{source} ({number:,} rows)")

    def add_pairs(self, root: Path, files: Mapping[str, list[str]]) -> None:
        """Add the images next to texts, with splits if all are in folders side by side named like splits."""
        rows = read_pairs(root, files, self.left_out)
        self.add(rows, "pairs of an image and a text", Finder([root], root))
        top = os.path.commonpath([path.parent for path in self.captions] or [root])
        top_folders = {path: path.relative_to(top).parts[0].lower() for path in self.captions}
        splits = {path: SPLIT_WORDS.get(folder, "") for path, folder in top_folders.items()}
        if all(splits.values()) and len({*splits.values()}) > 1:
            self.splits = splits


def _is_text(text: str) -> bool:
    """Return False for NUL, and for unpaired surrogates, which JSON and file names may contain."""
    return "\0" not in text and (text.isascii() or text.encode(errors="replace").decode() == text)


def _put(splits: dict[Any, str], name: Path | str, split: str) -> None:
    if splits.setdefault(name, split) != split:
        raise UserError(
            f"the image {name} is in two splits, {splits[name]} and {split}; keep it in only one of them in "
            "the annotations in --data.root"
        )


def _listed_splits(folders: list[Path], paths: Iterable[Path]) -> dict[Path, str]:
    """Return the splits of images in Flickr8k's lists; without a train list, all others are in train."""
    listed: dict[str, str] = {}
    for split, kind in (("train", "train"), ("val", "dev"), ("test", "test")):
        file = f"Flickr_8k.{kind}Images.txt"
        lists = (folder / sub / file for folder in folders for sub in ("", "Flickr8k_text"))
        if found := next(filter(Path.is_file, lists), None):
            for line in found.read_text("utf-8-sig", "replace").splitlines():
                _put(listed, line.strip(), split)
    splits = {path: listed[path.name] for path in paths if path.name in listed}
    if splits and "train" not in listed.values():
        splits = dict.fromkeys(paths, "train") | splits
    return splits


class Finder:
    """Finds images by name with one listing per folder, not with one system call per image."""

    def __init__(self, folders: list[Path], base: Path, image_folder: Path | None = None) -> None:
        """Search `folders` and their usual subfolders, or only `image_folder`; `explain` searches `base`."""
        self._base, self._image_folder = base, image_folder
        below = [("",), *((name,) for name in _IMAGE_FOLDERS), *product(_IMAGE_FOLDERS, repeat=2)]
        if image_folder is not None:
            folders, below = [image_folder if image_folder.exists() else base / image_folder], [("",)]
            if not folders[0].is_dir():
                raise UserError(f"--data.read.image_folder {image_folder} does not exist; give a folder")
        places = dict.fromkeys(folder.absolute().joinpath(*names) for folder in folders for names in below)
        self._places = [str(place) for place in places if place.is_dir()]
        self._list = cache(_list_folder)
        self._shortened: dict[Path, str] = {}
        self.find = cache(self._find)

    def _find(self, name: str) -> Path | None:
        """Find the file in any spelling of its name; in an `image_folder` also by the name's last parts."""
        if path := self._look_up(name):  # the usual case
            return path
        slashes = name.replace("\\", "/")  # the name may come from another system or from a URL
        spellings = [
            normalize(form, spelling)
            for spelling in (name, slashes, unquote(slashes), slashes.lstrip("/"))
            for form in ("NFC", "NFD")
        ]
        path = next(filter(None, map(self._look_up, (slashes, *spellings))), None)
        if path or self._image_folder is None:
            return path
        tails = (text.split("/", n)[-1] for n in range(1, slashes.count("/") + 1) for text in spellings)
        path = next(filter(None, map(self._look_up, tails)), None)
        if path and self._shortened.setdefault(path, name) != name:
            raise UserError(
                f"{self._shortened[path]} and {name} would both be {path}; give --data.read.image_folder the "
                "parent of the folders in these names"
            )
        return path

    def _look_up(self, name: str) -> Path | None:
        head, tail = os.path.split(name)
        for folder in self._places:
            normalized, files = self._list(os.path.join(folder, head))
            if tail in files:
                return Path(normalized, tail)
        return None

    def explain(self, name: str) -> str:
        """Return the reason why an image was not found, with a file that may be the right one."""
        stem = Path(normalize("NFC", unquote(name.replace("\\", "/")))).stem.casefold()
        if (near := self._files_by_stem.get(stem)) is None:
            return "there is no such image"
        return (
            f"there is no such image, but there is {near.relative_to(self._base)}; correct the name, or use "
            f"--data.read.image_folder {near.parent} if only the folder differs"
        )

    @cached_property
    def _files_by_stem(self) -> dict[str, Path]:
        """An image below `base`, in its first 10,000 folders, for each stem regardless of case."""
        folders = islice(walk(self._base, Counter()), 10_000)
        images = (Path(folder, file) for folder, files in folders for file in filter(is_image, files))
        return {normalize("NFC", path.stem).casefold(): path for path in images}


def _list_folder(folder: str) -> tuple[str, frozenset[str]]:
    """Return the normalized path of a folder, and the names of its files."""
    try:
        # After a link, `..` is not the parent in the text of the path.
        has_parents = ".." in folder.split(os.sep)
        normalized = os.path.realpath(folder) if has_parents else os.path.normpath(folder)
        with os.scandir(normalized) as entries:
            return normalized, frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return folder, frozenset()
