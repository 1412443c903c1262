"""Read the usual layouts of captioned pictures, recognised by looking at the folder.

`readers` turns an annotation file into rows. Here is chosen which file, and done what all formats share:
grouping by picture, the official split lists, finding the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path

from clip_lightning.data.captions import CaptionedImage, CaptionSet
from clip_lightning.data.readers import Row, file_head, read_lines, read_pairs, read_rows
from clip_lightning.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")

_ANNOTATIONS = {
    "flickr8k": ("captions.txt", "Flickr8k.token.txt", "dataset_flickr8k.json"),
    "flickr30k": ("captions.txt", "results.csv", "results_20130124.token", "dataset_flickr30k.json"),
    "captions": (*(f"captions{suffix}" for suffix in TABLE_SUFFIXES), "dataset_coco.json"),
}
_PICTURE_FOLDERS = (
    *("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images"),
    *("train2014", "val2014"),
)
_SPLIT_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}
SPLIT_WORDS = {"train": "train", "restval": "train", "test": "test"}
SPLIT_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")


def read_captions(root: Path, dataset: str = "auto") -> CaptionSet:
    """Read the pictures and captions below `root`.

    Captions are stripped and their whitespace collapsed, nothing else. Rows without a caption, and
    pictures that are missing or have no caption, are named in `left_out`.

    Args:
        root: the data set's folder, or its annotation file.
        dataset: `auto`, `flickr8k`, `flickr30k`, `captions` (a table of one's own) or `folder` (pairs of
            name.jpg and name.txt).

    Raises:
        UserError: when there is nothing to read, it cannot be read, or it contradicts itself.
    """
    known = ("auto", *_ANNOTATIONS, "folder")
    if dataset not in known:
        raise UserError(f"there is no data set kind {dataset!r}; set --data.dataset to {', '.join(known)}")
    if not os.path.exists(root):  # pathlib raises for a name that is too long
        raise UserError(f"there is no folder or file {root}; give the data set's folder to --data.root")
    # Only the root is resolved: a link below it may lead out of it, and names are relative to the root.
    root = root.resolve()
    annotations = find_annotations(root, dataset) if root.is_dir() else root
    left_out: dict[str, str] = {}
    if annotations is None:
        folders, rows = [root], read_pairs(root, left_out)
    else:
        # An archive's text and its pictures often lie in neighbouring folders.
        folders = [annotations.parent, root if root.is_dir() else annotations.parent.parent]
        rows = read_rows(annotations)
    captions, splits = _group(rows, (annotations or root).name, left_out)
    splits = splits or _read_split_lists(folders, captions)
    images = _locate(captions, splits, _Pictures(folders), left_out)
    if not images:
        raise UserError(_nothing_usable(root, left_out))
    return CaptionSet(root if root.is_dir() else root.parent, images, bool(splits), left_out)


def _nothing_usable(root: Path, left_out: dict[str, str]) -> str:
    example = "".join(f" (for example {name}: {reason})" for name, reason in list(left_out.items())[:1])
    return (
        f"{root} holds no picture with a caption that can be used{example}; expected captions.txt, "
        "Flickr8k.token.txt, results.csv, a Karpathy JSON or a CSV, TSV, JSONL or Parquet file with the "
        "pictures beside it or in Images/, or pairs of name.jpg and name.txt; check --data.root"
    )


# Which file ---------------------------------------------------------------------------------------------


def find_annotations(root: Path, dataset: str) -> Path | None:
    """The folder's annotation file, or None where pairs of name.jpg and name.txt are to be read.

    Raises:
        UserError: there are several, or none of the kind asked for.
    """
    if dataset == "folder":
        return None
    names = _ANNOTATIONS.get(dataset) or tuple(dict.fromkeys(chain(*_ANNOTATIONS.values())))
    # Archives unpack to folders such as Flickr8k_text/ or flickr30k_images/flickr30k_images/.
    for depth, name in product(("", "*/", "*/*/"), names):
        for path in sorted(filter(Path.is_file, root.glob(depth + name))):
            return path
    if dataset.startswith("flickr"):
        raise UserError(f"{root} holds none of {', '.join(names)}; check --data.root and --data.dataset")
    tables = sorted(path for path in root.iterdir() if path.suffix in TABLE_SUFFIXES and path.is_file())
    tables += sorted(
        path for path in root.glob("*.json") if path.is_file() and '"sentences"' in file_head(path)
    )
    if len(tables) > 1:
        found = ", ".join(path.name for path in tables)
        raise UserError(f"{root} holds several annotation files ({found}); give one of them to --data.root")
    if dataset == "captions" and not tables:
        raise UserError(f"{root} holds no CSV, TSV, JSONL, Parquet or Karpathy JSON; check --data.root")
    return tables[0] if tables else None


# From rows to pictures ----------------------------------------------------------------------------------


def _group(
    rows: Iterable[Row], source: str, left_out: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The captions of each name, in the order of the rows, and the split of those that have one."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for number, (name, caption, split) in enumerate(rows, start=1):
        name, caption = name.strip(), " ".join(caption.split())
        if not (_is_text(name) and _is_text(caption)):
            left_out[f"{source} row {number}"] = f"row {number} holds characters that are none"
            continue
        if name and caption:
            captions.setdefault(name, []).append(caption)
        elif name or caption:
            left_out[name or f"{source} row {number}"] = (
                f"row {number} has no {'caption' if name else 'picture'}"
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
    return captions, splits


def _is_text(word: str) -> bool:
    """Whether it can be written down: JSON may hold halves of characters, and any format NUL."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in word


def _put(splits: dict[str, str], name: str, split: str) -> None:
    if splits.setdefault(name, split) != split:
        raise UserError(
            f"the picture {name} is put in two splits, {splits[name]} and {split}; "
            "keep it in one of them in the annotations given to --data.root"
        )


def _read_split_lists(folders: Iterable[Path], captions: Iterable[str]) -> dict[str, str]:
    """The splits of `Flickr_8k.{train,dev,test}Images.txt`; without a train list, train is the rest."""
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


class _Pictures:
    """Finds pictures by name with one listing a folder: a million captions must not cost as many stats."""

    def __init__(self, folders: Iterable[Path]) -> None:
        below = [("",), *((name,) for name in _PICTURE_FOLDERS), *product(_PICTURE_FOLDERS, repeat=2)]
        places = dict.fromkeys(folder.joinpath(*names) for folder in folders for names in below)
        self._folders = [str(place) for place in places if place.is_dir()]
        self._listings: dict[str, tuple[str, frozenset[str]]] = {}

    def find(self, name: str) -> Path | None:
        head, tail = os.path.split(name)
        for folder in self._folders:
            place = os.path.join(folder, head)
            if place not in self._listings:
                self._listings[place] = _list_folder(place)
            normalised, files = self._listings[place]
            if tail in files:
                return Path(normalised, tail)
        return None


def _list_folder(folder: str) -> tuple[str, frozenset[str]]:
    """The folder's one name and its files."""
    try:
        normalised = os.path.normpath(folder)
        # After a link, `..` is not the folder that the text before it names.
        if ".." in folder.split(os.sep) and not os.path.samefile(normalised, folder):
            normalised = os.path.realpath(folder)
        with os.scandir(normalised) as entries:
            return normalised, frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return folder, frozenset()


def _locate(
    captions: dict[str, list[str]], splits: dict[str, str], pictures: _Pictures, left_out: dict[str, str]
) -> tuple[CaptionedImage, ...]:
    """One record a file, under whichever names the rows call it."""
    found: dict[Path, list[str]] = {}
    split_of: dict[str, str] = {}
    for name, texts in captions.items():
        path = pictures.find(name)
        if path is None:
            left_out[name] = "there is no such picture"
        elif not texts and path not in found:
            left_out[name] = "it has no caption"
        else:
            found.setdefault(path, []).extend(texts)
            if name in splits:
                _put(split_of, str(path), splits[name])
    return tuple(CaptionedImage(path, tuple(texts), split_of.get(str(path))) for path, texts in found.items())
