"""What is in a data set and what is wrong with it, as plain values."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_lightning.data.captions import CaptionedImage, CaptionSet
from clip_lightning.data.checking.images import Picture
from clip_lightning.data.checking.near_duplicates import alike, groups

SMALLEST = 32  # pixels of the short side; below that there is little to see
MOST_NAMED = 5


@dataclass(frozen=True)
class Entry:
    """A picture of the data set: its name below the root, its captions, its split, what was found of it."""

    name: str
    path: Path
    captions: tuple[str, ...]
    split: str
    picture: Picture

    @property
    def readable(self) -> bool:
        """Whether the loader can use it."""
        return self.picture.reason is None


@dataclass(frozen=True)
class CutCaptions:
    """Captions that a text tower's tokenizer would cut."""

    text_tower: str
    max_length: int
    count: int


@dataclass(frozen=True)
class Findings:
    """Everything that `data check` tells.

    Attributes:
        root: the data set's folder.
        entries: its pictures in their order, those that cannot be read among them.
        official: whether the source itself names the splits.
        left_out: name → reason, of rows and pictures that the annotations name and that cannot be used.
        same: groups of positions in `entries` of files with the same bytes.
        alike: groups of positions of pictures that look the same, byte-identical ones among them.
        cut: what a tokenizer would cut, where one was named.
        source: the files that were read.
        noted: warnings from reading them.
    """

    root: Path
    entries: tuple[Entry, ...]
    official: bool
    left_out: dict[str, str]
    same: list[list[int]]
    alike: list[list[int]]
    cut: CutCaptions | None
    source: str = ""
    noted: tuple[str, ...] = ()

    @property
    def broken(self) -> dict[str, str]:
        """Name → reason, of pictures that cannot be read."""
        return {e.name: e.picture.reason for e in self.entries if e.picture.reason is not None}

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """Split → readable pictures, captions of theirs."""
        names = [name for name in ("train", "val", "test", "none") if any(self._in(name))]
        return {name: (len(self._in(name)), sum(len(e.captions) for e in self._in(name))) for name in names}

    def _in(self, split: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == split and entry.readable]

    @property
    def leaks(self) -> list[list[int]]:
        """Groups of byte-identical pictures that lie in more than one split."""
        return [group for group in self.same if self._crosses(group)]

    @property
    def alike_leaks(self) -> list[list[int]]:
        """Groups of pictures that look the same, lie in more than one split, and are no `leaks`."""
        told = {tuple(group) for group in self.leaks}
        return [group for group in self.alike if self._crosses(group) and tuple(group) not in told]

    def _crosses(self, group: Sequence[int]) -> bool:
        return len({self.entries[row].split for row in group} - {"none"}) > 1

    @property
    def repeated(self) -> int:
        """Captions that their picture has already."""
        return sum(len(entry.captions) - len(set(entry.captions)) for entry in self.entries)

    @property
    def shared(self) -> Counter[str]:
        """Captions that several pictures have, with their number of pictures."""
        counts = Counter(caption for entry in self.entries for caption in set(entry.captions))
        return Counter({caption: count for caption, count in counts.items() if count > 1})

    def errors(self) -> list[str]:
        """A line for each kind of thing that has to be mended; status 1."""
        lines = []
        if broken := self.broken:
            lines.append(f"{_count(len(broken), 'picture')} cannot be read: {_examples(broken)}")
        if self.left_out:
            rows = _count(len(self.left_out), "row or picture", "rows or pictures")
            lines.append(f"{rows} cannot be used: {_examples(self.left_out)}")
        if self.leaks:
            lines.append(
                f"leakage: {_count(len(self.leaks), 'group')} of byte-identical pictures in more than one "
                f"split: {self._named(self.leaks)}"
            )
        if not any(entry.readable for entry in self.entries):
            lines.append("no picture can be read")
        return lines

    def warnings(self) -> list[str]:
        """A line for each kind of thing to know of."""
        lines = [*self.noted]
        if self.alike_leaks:
            remedy = "" if self.official else "; the split is drawn, and --fix FILE writes one without them"
            lines.append(
                f"leakage: {_count(len(self.alike_leaks), 'group')} of pictures that look the same in more "
                f"than one split: {self._named(self.alike_leaks)}{remedy}"
            )
        within = [group for group in self.alike if not self._crosses(group)]
        if within:
            lines.append(
                f"{_count(len(within), 'group')} of pictures that look the same within a split: "
                f"{self._named(within)}"
            )
        if self.repeated:
            lines.append(f"{_count(self.repeated, 'caption')} repeated at the same picture")
        if shared := self.shared:
            caption, count = shared.most_common(1)[0]
            lines.append(
                f"{_count(len(shared), 'caption stands', 'captions stand')} at several pictures, most often "
                f"{shortened(caption)!r} ({count:,} pictures)"
            )
        if self.cut is not None and self.cut.count:
            total = sum(len(entry.captions) for entry in self.entries)
            lines.append(
                f"{_count(self.cut.count, 'caption')} ({100 * self.cut.count / total:.1f} %) are longer than "
                f"{self.cut.max_length} tokens of {self.cut.text_tower} and would be cut"
            )
        small = [e.name for e in self.entries if e.readable and e.picture.short_side < SMALLEST]
        if small:
            names = ", ".join(small[:MOST_NAMED])
            lines.append(f"{_count(len(small), 'picture')} with less than {SMALLEST} pixels a side: {names}")
        if unused := sum(entry.split == "none" for entry in self.entries):
            lines.append(f"{_count(unused, 'picture')} in no split, which fit does not use")
        return lines

    def _named(self, found: Sequence[Sequence[int]]) -> str:
        words = []
        for group in found[:MOST_NAMED]:
            entries = [self.entries[row] for row in group[:MOST_NAMED]]
            words.append(" = ".join(f"{entry.name} ({entry.split})" for entry in entries))
        return "; ".join(words) + (" and more" if len(found) > MOST_NAMED else "")

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "root": str(self.root),
            "source": self.source,
            "errors": self.errors(),
            "warnings": self.warnings(),
            "pictures": sum(entry.readable for entry in self.entries),
            "captions": sum(len(entry.captions) for entry in self.entries if entry.readable),
            "official_splits": self.official,
            "splits": {k: {"pictures": n, "captions": c} for k, (n, c) in self.splits.items()},
            "captions_per_picture": _spread([len(entry.captions) for entry in self.entries]),
            "words_per_caption": _spread([len(c.split()) for e in self.entries for c in e.captions]),
            "short_side": _spread([e.picture.short_side for e in self.entries if e.readable]),
            "broken": self.broken,
            "left_out": self.left_out,
            "same": self._names(self.same),
            "alike": self._names(self.alike),
            "leaks": self._names(self.leaks),
            "alike_leaks": self._names(self.alike_leaks),
            "captions_repeated": self.repeated,
            "captions_shared": len(self.shared),
            "captions_cut": None if self.cut is None else vars(self.cut),
        }

    def _names(self, found: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.entries[row].name for row in group] for group in found]


def find(
    captions: CaptionSet,
    parts: dict[str, list[CaptionedImage]],
    pictures: Sequence[Picture],
    cut: CutCaptions | None = None,
) -> Findings:
    """Put together what is known.

    Args:
        captions: the data set.
        parts: its splits.
        pictures: what opening each of `captions.images` gave, in their order.
        cut: what a tokenizer would cut.
    """
    split_of = {image.path: name for name, images in parts.items() for image in images}
    entries = tuple(
        Entry(
            Path(os.path.relpath(image.path, captions.root)).as_posix(),
            image.path,
            image.captions,
            split_of.get(image.path, "none"),
            picture,
        )
        for image, picture in zip(captions.images, pictures, strict=True)
    )
    first: dict[str, int] = {}
    same = []
    for row, picture in enumerate(pictures):
        if picture.sha256 and first.setdefault(picture.sha256, row) != row:
            same.append((first[picture.sha256], row))
    # of n copies one is compared: a crawl's thousands of the same "not available" would be n² pairs
    copies = {row for _, row in same}
    pairs = alike([None if row in copies else picture.looks for row, picture in enumerate(pictures)])
    return Findings(
        captions.root,
        entries,
        captions.has_official_splits,
        dict(captions.left_out),
        groups(same),
        groups([*pairs, *same]),
        cut,
        captions.source,
        captions.warnings,
    )


def shortened(text: str, most: int = 60) -> str:
    """The text, with … where more than `most` characters are cut off."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _examples(found: dict[str, str]) -> str:
    named = [f"{name} ({reason})" for name, reason in list(found.items())[:MOST_NAMED]]
    return ", ".join(named) + (" and more" if len(found) > MOST_NAMED else "")


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"lowest": min(values), "median": statistics.median(values), "highest": max(values)}
