"""`shards.json`: what `data convert` wrote, by split and file, with sizes and checksums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from clip_lightning.data.captions import SPLITS
from clip_lightning.data.shards.storage import expand, join, read
from clip_lightning.errors import UserError

FILE = "shards.json"
FIELDS_FILE = "fields.parquet"
Format = Literal["litdata", "webdataset"]
_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        file: its name in the folder of its split.
        samples: how many it holds.
        bytes: its size.
        sha256: of its content, hexadecimal.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A converted data set.

    Attributes:
        format: of the shards.
        splits: `train`, `val`, `test` → their shards, each in a folder of that name.
        settings: what it was made of and how; only to be shown.
    """

    format: Format
    splits: Mapping[str, tuple[Shard, ...]]
    settings: Mapping[str, Any]

    def samples(self, split: str) -> int:
        """How many the split holds."""
        return sum(shard.samples for shard in self.splits.get(split, ()))

    def digest(self) -> str:
        """SHA-256 (hex) over the splits and the content of every shard in them."""
        parts = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def dump(self) -> bytes:
        """As the file has it."""
        return json.dumps({"version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def find(cls, source: str) -> Manifest | None:
        """That of a folder or URL, if `data convert` wrote it.

        Raises:
            UserError: it cannot be read, or is damaged.
        """
        if source.endswith(".tar") or set("*{") & set(source):
            return None
        file = join(source, FILE)
        data = read(file)
        return None if data is None else cls.load(data, file)

    @classmethod
    def load(cls, data: bytes, source: str) -> Manifest:
        """Read the file's content; `source` is where it was, for messages.

        Raises:
            UserError: it is damaged, or of a later version.
        """
        try:
            content = json.loads(data)
            version, kind, splits = content["version"], content["format"], content["splits"]
            shards = {split: tuple(Shard(**shard) for shard in splits[split]) for split in splits}
            settings = dict(content["settings"])
            sound = kind in ("litdata", "webdataset") and set(shards) <= set(SPLITS)
            sound = sound and all(_is_sound(shard) for part in shards.values() for shard in part)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{source} is damaged ({error}); convert the data again") from error
        if version != 1:
            raise UserError(
                f"{source} is of version {version!r}, this program reads 1; convert the data again"
            )
        if not sound:
            raise UserError(f"{source} is damaged; convert the data again")
        return cls(kind, shards, settings)


def tars(source: str, manifest: Manifest | None, split: str) -> list[str]:
    """The tars of a split, by its `shards.json`; of a source that has none all that it names.

    Raises:
        UserError: there is none.
    """
    if manifest is None:
        return expand(source)
    return [join(source, split, shard.file) for shard in manifest.splits[split]]


def _is_sound(shard: Shard) -> bool:
    """Whether the name stays in its folder, and the figures are some."""
    figures = (shard.samples, shard.bytes)
    named = isinstance(shard.file, str) and isinstance(shard.sha256, str) and _NAME.fullmatch(shard.file)
    return bool(named) and all(isinstance(figure, int) and figure >= 0 for figure in figures)
