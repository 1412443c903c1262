"""What `embed` is to do: which rows, by which model, divided into which shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["images", "captions"]
Format = Literal["npy", "parquet"]


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of one kind, which one process writes as one file.

    Attributes:
        kind: whether they are pictures or captions.
        number: from 0.
        of: how many shards of this kind there are.
        rows: positions in `Plan.images` or `Plan.captions`.
    """

    kind: Kind
    number: int
    of: int
    rows: range

    @property
    def name(self) -> str:
        """Of the shard's files, without their endings."""
        return f"{self.kind}-{self.number:05}-of-{self.of:05}"


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the files hold.

    Attributes:
        model: the name that the model was loaded by.
        identity: digest of its weights, transform and tokenizer.
        source: folder or file of the data.
        digest: of the data: names, sizes, captions.
        width: of the embeddings.
        images: absolute path and captions of each picture; empty if only captions are wanted.
        captions: picture's path and caption; empty if only pictures are wanted.
        format: of the files.
        shard_size: rows in a shard.
        precision: that the towers run in, in Lightning's words.
    """

    model: str
    identity: str
    source: str
    digest: str
    width: int
    images: Sequence[tuple[str, tuple[str, ...]]]
    captions: Sequence[tuple[str, str]]
    format: Format
    shard_size: int
    precision: str

    def shards(self) -> list[Shard]:
        """All of them, pictures first; the same for every number of processes."""
        found: list[Shard] = []
        sizes: dict[Kind, int] = {"images": len(self.images), "captions": len(self.captions)}
        for kind, count in sizes.items():
            starts = range(0, count, self.shard_size)
            found += [
                Shard(kind, number, len(starts), range(start, min(start + self.shard_size, count)))
                for number, start in enumerate(starts)
            ]
        return found

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says of it, as JSON can hold it."""
        return {
            "format": 1,
            "model": {"name": self.model, "identity": self.identity},
            "data": {"source": self.source, "digest": self.digest},
            "settings": {
                "width": self.width,
                "images": len(self.images),
                "captions": len(self.captions),
                "format": self.format,
                "shard_size": self.shard_size,
                "precision": self.precision,
            },
        }


def data_digest(source: Path, pictures: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 (hex) over the pictures' names below the source, their sizes and captions."""
    root = source if source.is_dir() else source.parent
    sha = hashlib.sha256()
    for path, captions in pictures.items():
        name = Path(os.path.relpath(path, root.resolve())).as_posix()
        sha.update("\0".join([name, str(os.path.getsize(path)), *captions]).encode() + b"\n")
    return sha.hexdigest()
