"""What the words of `evaluate` name: models, data, splits; and what could not be read of them, told."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line

if TYPE_CHECKING:
    from clip_lightning.data.classes import ClassSet
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import Pictures

SPLITS = ("all", "train", "val", "test")


def listed(text: str) -> list[str]:
    """The places with commas between, unless there is something under the whole name."""
    places = [text] if Path(text).exists() else [word.strip() for word in text.split(",") if word.strip()]
    if not places:
        raise UserError(f"{text!r} names no model or data; give a folder, or several with commas between")
    return list(dict.fromkeys(places))


def load_model(name: str) -> CLIP:
    """In eval mode, on a GPU where there is one."""
    from clip_lightning.model.clip import CLIP
    from clip_lightning.model.encode import best_device

    return CLIP.from_pretrained(name).to(best_device())


def load_classes(place: str, cache: Path | None) -> ClassSet:
    """The pictures and classes; what was left out is told."""
    from clip_lightning.data.named import find_classes

    found = find_classes(place, cache)
    tell("left out", found.left_out)
    return found


def check_options(split: str | None, out: Path | None) -> None:
    """Complain before anything is loaded."""
    if split is not None and split not in SPLITS:
        raise UserError(f"--split {split}: expected {', '.join(SPLITS)}")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")


def choose_split(place: str, split: str | None, own: Iterable[str | None], *, may_draw: bool = False) -> str:
    """The split that is meant: by default the data's own test split, or val, else all."""
    named = {name for name in own if name}
    if split is None:
        return next((name for name in ("test", "val") if name in named), "all")
    if split != "all" and split not in named and (named or not may_draw):
        has = f"its splits are {', '.join(sorted(named))}" if named else "it has no splits of its own"
        raise UserError(f"--split {split}: {place} has no such split, {has}; give one it has, or all")
    return split


def tell_broken(pictures: Pictures) -> None:
    """Name some of those that could not be read.

    Raises:
        UserError: none could.
    """
    if not pictures.rows:
        path, reason = next(iter(pictures.broken.items()), ("the split", "it holds no pictures"))
        raise UserError(f"none of the pictures can be read; {path}: {reason}; give other data")
    tell("skipped", pictures.broken)


def tell(what: str, reasons: Mapping[str, str], most: int = 5) -> None:
    """On stderr: the first few, and how many there are."""
    for name, reason in list(reasons.items())[:most]:
        say(f"{what} {name}: {reason}")
    if len(reasons) > most:
        say(f"{what} {len(reasons)} in all")


def say(line: str) -> None:
    """On stderr."""
    print(one_line(line), file=sys.stderr, flush=True)
