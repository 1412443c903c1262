"""Represent and split captioned images as plain records of names and texts, without torch or decoding."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_lightning.errors import RunFailed, UserError, check_option

SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "restval": "train", "test": "test"}
SPLIT_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
_AT_ONCE = 10_000  # the tokens of millions of captions would not fit in memory
_SAMPLE, _WORTH_A_WARNING, _OFTEN_SHARED = 5000, 0.01, 0.05


def parse_split(word: str | None, source: object) -> str | None:
    """Return `train`, `val` or `test` for a usual name of a split in `source`, or None if it is empty."""
    word = (word or "").strip()
    if word and word.lower() not in SPLIT_WORDS:
        raise UserError(
            f"{source} has a split {word!r}; expected {', '.join(SPLIT_WORDS)}; correct it, or remove the "
            "column and set --data.read.splits.val_fraction"
        )
    return SPLIT_WORDS.get(word.lower())


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image and all its captions."""

    path: Path
    captions: tuple[str, ...]
    split: str | None = None
    """`train`, `val` or `test` if the source names official splits."""
    name: str = field(default="", compare=False)
    """The name of the image in the source."""


@dataclass(frozen=True)
class CaptionSet:
    """The captioned images of one source, in the order of the source.

    Attributes:
        root: the folder that the names of the images are relative to.
        images: one record per image, with unique paths.
        has_official_splits: whether the source itself has splits; if it has, an image may be in none of them.
        left_out: name → reason, for images and rows that could not be used.
        source: the files that were read, relative to `root`, with their number of rows.
        warnings: lines about probable mistakes and skipped files.
    """

    root: Path
    images: tuple[CaptionedImage, ...]
    has_official_splits: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    source: str = ""
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """Describe in one line which data was read."""
        captions = sum(len(image.captions) for image in self.images)
        counts = Counter(image.split for image in self.images)
        splits = ", ".join(
            f"{split or 'in no split'} {counts[split]:,}" for split in (*SPLITS, None) if counts[split]
        )
        return (
            f"read {self.source} in {self.root}: {len(self.images):,} images with {captions:,} captions"
            + (f" ({splits})" if self.has_official_splits else "")
            + f"; {len(self.left_out):,} rows or images left out"
        )

    def names(self) -> dict[Path, str]:
        """Return the name of each image in the source, or relative to `root` if several have the same."""
        counts = Counter(image.name for image in self.images)
        return {
            image.path: image.name if counts[image.name] == 1 else relative_name(image.path, self.root)
            for image in self.images
        }

    def digest(self) -> str:
        """Return the SHA-256 (hex) of names, captions, splits and file sizes, equal on every machine."""
        sha = hashlib.sha256()
        named = ((relative_name(image.path, self.root), image) for image in self.images)
        for name, image in sorted(named, key=lambda pair: pair[0]):
            row = name, str(_size(image.path)), image.split or "", *image.captions
            sha.update("\0".join(row).encode() + b"\n")
        return sha.hexdigest()


def relative_name(path: Path, root: Path) -> str:
    """Return the path of an image relative to a folder, which it may be outside of."""
    return Path(os.path.relpath(path, root)).as_posix()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise RunFailed if a file that existed cannot be read now, for example on a lost disk."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{path} cannot be read at the moment ({error.strerror or error}); run the same command again "
            "when the file is back: computed results are kept"
        ) from error


def _size(path: Path) -> int:
    with reading(path):
        return path.stat().st_size


def content_groups(images: Sequence[CaptionedImage]) -> list[int]:
    """Return, for each image, the position of the first one with the same bytes; few files are read."""
    sizes = [_size(image.path) for image in images]
    counts = Counter(sizes)
    first: dict[bytes, int] = {}
    groups = list(range(len(images)))
    for index, (image, size) in enumerate(zip(images, sizes, strict=True)):
        if counts[size] > 1:
            with reading(image.path):
                digest = hashlib.sha256(image.path.read_bytes()).digest()
            groups[index] = first.setdefault(digest, index)
    return groups


@dataclass(frozen=True)
class Splits:
    """Fractions and seed of random splits, for data without splits.

    Attributes:
        val_fraction: fraction of the images to hold out for validation.
        test_fraction: fraction of the images to hold out for testing.
        seed: seed of the random splits; use the same seed for runs that you compare.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("val_fraction", self.val_fraction), ("test_fraction", self.test_fraction)):
            check_option(f"data.read.splits.{name}", value, 0 <= value <= 1, "a fraction from 0 to 1")


def split_by_image(captions: CaptionSet, splits: Splits) -> dict[str, list[CaptionedImage]]:
    """Split the images into `train`, `val` and `test`, each image with all its captions.

    Official splits are kept; if they have no `val`, it is drawn from `train`. Others are drawn by a seeded
    hash of the names, so that few images move if others are added, with byte-identical images in one split.
    """
    if not captions.has_official_splits:
        fractions = {"val": splits.val_fraction, "test": splits.test_fraction}
        return _draw(captions.root, captions.images, splits.seed, fractions)
    parts = {name: [image for image in captions.images if image.split == name] for name in SPLITS}
    if parts["train"] and not parts["val"]:
        parts |= _draw(captions.root, parts["train"], splits.seed, {"val": splits.val_fraction})
    return parts


def _draw(
    root: Path, images: Sequence[CaptionedImage], seed: int, fractions: dict[str, float]
) -> dict[str, list[CaptionedImage]]:
    """Assign groups of identical images, in the order of a seeded hash, to one split after another."""
    groups: dict[int, list[int]] = {}
    for place, group in enumerate(content_groups(images)):
        groups.setdefault(group, []).append(place)

    def rank(places: Iterable[int]) -> bytes:
        name = min(relative_name(images[place].path, root) for place in places)
        return hashlib.sha256(f"{seed}\0{name}".encode()).digest()

    queue = deque(sorted(groups.values(), key=rank))
    parts: dict[str, list[int]] = {"train": []}
    for name, fraction in fractions.items():
        wanted = round(fraction * len(images)) or (1 if fraction > 0 else 0)
        parts[name] = []
        while queue and len(parts[name]) < wanted:
            parts[name] += queue.popleft()
    if not queue:
        raise UserError(
            f"{root} has {len(images)} different images, too few to hold out "
            + " and ".join(f"{fraction:.0%} for {name}" for name, fraction in fractions.items())
            + "; use more images, or reduce --data.read.splits.val_fraction and test_fraction"
        )
    parts["train"] = [place for places in queue for place in places]
    return {name: [images[place] for place in sorted(part)] for name, part in parts.items()}


# Captions that training loses ----------------------------------------------------------------------------


def count_lost(tokenize: Any, texts: Sequence[str]) -> dict[str, int]:
    """Count the texts that a tokenizer truncates (`count`), and texts with only unknown words (`unknown`)."""
    special = {*tokenize.tokenizer.all_special_ids}  # the unknown token is one of them
    cut = unknown = 0
    for start in range(0, len(texts), _AT_ONCE):
        for ids in tokenize.tokenizer(texts[start : start + _AT_ONCE], verbose=False)["input_ids"]:
            cut += len(ids) > tokenize.max_length
            unknown += special.issuperset(ids)
    return {"max_length": tokenize.max_length, "count": cut, "unknown": unknown}


def lost_lines(lost: dict[str, Any], total: int, least: float = 0) -> Iterator[str]:
    """Yield one line per kind of loss that affects more than the fraction `least` of `total` texts."""
    for number, problem in (
        (lost["count"], f"are longer than {lost['max_length']} tokens and are truncated"),
        (lost["unknown"], "have no word that the tokenizer knows; use a text tower for their language"),
    ):
        if number > least * total:
            yield f"{100 * number / total:.1f} % of the captions {problem}"


def caption_warnings(images: Sequence[CaptionedImage], tokenize: Any) -> Iterator[str]:
    """Yield a warning per kind of problem in the captions, of which the tokenizer reads a sample."""
    texts = [caption for image in images for caption in image.captions]
    if hasattr(tokenize, "tokenizer") and texts:
        sample = texts[:: max(1, len(texts) // _SAMPLE)]
        yield from lost_lines(count_lost(tokenize, sample), len(sample), _WORTH_A_WARNING)
    counts = shared_captions(images)
    fraction = counts.total() / max(1, sum(len({*image.captions}) for image in images))
    if fraction > _OFTEN_SHARED:
        caption, number = counts.most_common(1)[0]
        yield (
            f"{100 * fraction:.0f} % of the captions belong to several images, most often {caption[:60]!r} "
            f"({number:,} images), although these images count as negatives of each other; for images of "
            "classes, use clip-lightning evaluate zero-shot"
        )


def shared_captions(images: Iterable[CaptionedImage]) -> Counter[str]:
    """Count the images of each caption that several images share."""
    counts = Counter(text for image in images for text in {*image.captions})
    return Counter({text: count for text, count in counts.items() if count > 1})
