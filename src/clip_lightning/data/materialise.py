"""Writing the rows of a Hugging Face data set as pictures and a `captions.jsonl`."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from clip_lightning.data.captions import SPLIT_WORDS, unreadable
from clip_lightning.data.columns import Columns, sentences
from clip_lightning.data.image_formats import PICTURE_FORMATS, PICTURE_SUFFIXES
from clip_lightning.errors import UserError
from clip_lightning.files import write_atomically

SHARD_ROWS = 256
_PICTURES = "images"


@dataclass(frozen=True)
class Part:
    """One split of the source.

    Attributes:
        name: what the source calls it.
        rows: a `datasets.Dataset` with just these columns, pictures not decoded.
        columns: which is which.
        split: `train`, `val`, `test` or None; a `split` column goes before it.
    """

    name: str
    rows: Any
    columns: Columns
    split: str | None


def materialise(name: str, parts: Sequence[Part], folder: Path, trusted: Sequence[Path] | None) -> None:
    """Fill the folder, shard by shard; what a killed process wrote of the same data is kept.

    Args:
        name: the data set, for messages.
        parts: at least one.
        folder: to fill; other content is removed.
        trusted: folders that pictures kept outside of the rows may be read from; None for any.

    Raises:
        UserError: no row has a readable picture, or a row's split is unknown.
    """
    _start_over_if_changed(name, parts, folder)
    count = sum(len(part.rows) for part in parts)
    shards = []
    with tqdm(total=count, desc="pictures", unit=" rows", mininterval=1) as bar:
        for part in parts:
            for start in range(0, len(part.rows), SHARD_ROWS):
                rows = range(start, min(start + SHARD_ROWS, len(part.rows)))
                shard = folder / "shards" / f"{part.name}-{start:09}.jsonl"
                if not shard.exists():
                    records = (_record(name, part, row, folder, trusted) for row in _numbered(part, rows))
                    write_atomically(shard, "".join(json.dumps(record) + "\n" for record in records).encode())
                shards.append(shard)
                bar.update(len(rows))
    _join(name, shards, folder)


def _start_over_if_changed(name: str, parts: Sequence[Part], folder: Path) -> None:
    """What a killed process left is of use if it read the same files in the same way."""
    plan = {
        "data set": name,
        "shard rows": SHARD_ROWS,
        "parts": [
            [part.name, part.split, len(part.rows), part.columns.names(), part.rows.cache_files]
            for part in parts
        ],
    }
    content = json.dumps(plan, indent=1).encode()
    note = folder / "plan.json"
    if not note.exists() or note.read_bytes() != content:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(note, content)


def _numbered(part: Part, rows: range) -> Iterator[tuple[int, dict[str, Any]]]:
    return zip(rows, part.rows.select(rows), strict=True)


def _record(
    name: str, part: Part, numbered: tuple[int, dict[str, Any]], folder: Path, trusted: Sequence[Path] | None
) -> dict[str, Any]:
    """The row as `captions.jsonl` has it, once its picture is written."""
    number, row = numbered
    split = part.split
    if part.columns.split:
        word = (row[part.columns.split] or "").strip().lower()
        if word and word not in SPLIT_WORDS:
            raise UserError(
                f"--data.root hf:{name} has a split called {word!r}; expected {', '.join(SPLIT_WORDS)}"
            )
        split = SPLIT_WORDS.get(word)
    try:
        image = _store(_picture(row[part.columns.image], trusted), folder, split)
    except _NoPicture as error:
        # a name that is nowhere: `read_captions` counts and names it
        image = f"{part.name} row {number} ({error})"
    captions = [text for column in part.columns.captions for text in sentences(row[column])]
    return {"image": image, "captions": captions, "split": split}


def _join(name: str, shards: Sequence[Path], folder: Path) -> None:
    """Put the rows of all shards together, unless none has a picture."""
    images = [json.loads(line)["image"] for shard in shards for line in shard.read_text().splitlines()]
    missing = [image for image in images if not image.startswith(f"{_PICTURES}/")]
    example = f", the first: {missing[0]}" if missing else ""
    if len(missing) == len(images):
        raise UserError(f"--data.root hf:{name} holds no readable picture in {len(images)} rows{example}")
    if missing:
        print(
            f"--data.root hf:{name}: {len(missing)} of {len(images)} rows have no readable picture{example}",
            file=sys.stderr,
        )
    write_atomically(folder / "captions.jsonl", b"".join(shard.read_bytes() for shard in shards))
    shutil.rmtree(folder / "shards")


# One row ------------------------------------------------------------------------------------------------


class _NoPicture(ValueError):
    """Why a row has none."""


def _picture(value: Any, trusted: Sequence[Path] | None) -> bytes:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is not None:
        return bytes(data)
    if not path:
        raise _NoPicture("it has no picture")
    resolved = Path(path).resolve()
    if trusted is not None and not any(resolved.is_relative_to(folder) for folder in trusted):
        raise _NoPicture("its picture is not in the data set")
    try:
        return resolved.read_bytes()
    except FileNotFoundError as error:
        raise _NoPicture(error.strerror) from error
    except OSError as error:  # which says nothing about the data set
        raise unreadable(resolved, error.strerror) from error


def _store(data: bytes, folder: Path, split: str | None) -> str:
    """Write the picture as it is, and say where."""
    name = hashlib.sha256(data).hexdigest()[:32] + _suffix(data)
    path = folder / _PICTURES / (split or "all") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # also where it is already: a killed process may have written half of it
    path.write_bytes(data)
    return path.relative_to(folder).as_posix()


def _suffix(data: bytes) -> str:
    """By the picture's header; whether the rest can be decoded is seen when it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
                return PICTURE_SUFFIXES.get(image.format or "", ".jpg")  # JPEG has relatives with other names
        except Exception as error:  # files from elsewhere make Pillow raise nearly every kind of error
            raise _NoPicture("not a picture of a known format") from error
