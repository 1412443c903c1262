"""Read and write `shards.json`, which lists the tars of each split with their sizes and checksums."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clip_lightning.data.captions import SPLITS
from clip_lightning.data.shards.storage import MissingFile, call, join
from clip_lightning.errors import UserError
from clip_lightning.terminal import public

FILE = "shards.json"
FIELDS_FILE = "fields.parquet"
_READ = {"version": 1, "format": "webdataset"}
_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")


@dataclass(frozen=True)
class Shard:
    """A tar in the folder of its split: its name, number of samples, size, and SHA-256 (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raise ValueError if the name could point outside of the folder, or a number is invalid."""
        if not (_NAME.fullmatch(self.file) and isinstance(self.sha256, str)):
            raise ValueError(f"{self.file!r} is not a valid file name")
        if not all(isinstance(number, int) and number >= 0 for number in (self.samples, self.bytes)):
            raise ValueError(f"{self.file} cannot have {self.samples} samples or {self.bytes} bytes")


Splits = Mapping[str, Sequence[Shard]]
"""`train`, `val` and `test` → their tars."""


def dump(splits: Splits, settings: Mapping[str, Any]) -> bytes:
    """Return the content of the file; the settings are only for information."""
    shards = {split: [asdict(shard) for shard in part] for split, part in splits.items()}
    return json.dumps({**_READ, "splits": shards, "settings": settings}, indent=1).encode() + b"\n"


def load(data: bytes, source: str) -> tuple[Splits, dict[str, Any]]:
    """Read splits and settings from the content of the file; `source` is its address, for messages.

    Raises:
        UserError: the file is damaged, or has another version or format.
    """
    try:
        content = json.loads(data)
        if (header := {name: content[name] for name in _READ}) != _READ:
            raise ValueError(f"it has {header}, expected {_READ}")
        splits = {name: tuple(Shard(**shard) for shard in part) for name, part in content["splits"].items()}
        if not splits.keys() <= {*SPLITS}:
            raise ValueError(f"it has the splits {', '.join(splits)}")
        return splits, dict(content["settings"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source} is damaged ({error}); convert the data again") from error


def find(source: str) -> Splits | None:
    """Return the splits of a folder or URL that `data convert` wrote, or None for other sources."""
    if source.endswith(".tar") or set("*{") & set(source):
        return None
    file = join(source, FILE)
    try:
        return load(call(file, "cat_file"), public(file))[0]
    except MissingFile:
        return None
