"""Index the samples in the tars of a split: their positions, their fields, and which pass the filters."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import posixpath
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from tqdm.contrib.concurrent import thread_map

from clip_lightning.data.captions import SPLITS
from clip_lightning.data.shards.storage import MissingFile, call, expand, is_url, open_copy
from clip_lightning.data.shards.tars import BROKEN, BYTES, OFFSET, Filter, Record, read_record, scan
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import cache_folder, complete_file
from clip_lightning.terminal import public

FILE, ABOUT = "shards.json", b"about"
HEADER = {"version": 2, "format": "webdataset"}
_VERSION = 1
_ROW_BITS = 32


@dataclass
class Tar:
    """A tar and what is known about it."""

    url: str
    sha256: str = ""
    spans: np.ndarray | None = None  # offset and length (n, 2) of the samples that pass the filters

    @cached_property
    def key(self) -> str:
        """A unique name for this content at this address."""
        content = self.sha256
        if not content:
            info = call(self.url, "info")
            names = ("size", "ETag", "etag", "mtime", "LastModified", "Last-Modified")
            content = str([info.get(name) for name in names])
        address = self.url if is_url(self.url) else os.path.abspath(self.url)
        return hashlib.sha256(json.dumps([_VERSION, address, content]).encode()).hexdigest()[:32]


Splits = Mapping[str, Sequence[Mapping[str, Any]]]
"""`train`, `val` and `test` → their tars: `file`, number of `samples`, size in `bytes`, `sha256` (hex)."""


def load(data: bytes, source: str) -> tuple[Splits, dict[str, Any]]:
    """Read splits and settings from the content of `shards.json`, whose address is `source`."""
    try:
        content = json.loads(data)
        splits, keys = content["splits"], {"file", "samples", "bytes", "sha256"}
        if not (content.items() >= HEADER.items() and splits.keys() <= {*SPLITS}):
            raise ValueError(f"expected {HEADER} and the splits {SPLITS}")
        for shard in chain(*splits.values()):
            is_inside = re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", shard["file"])  # of the folder
            if not is_inside or shard.keys() != keys or not isinstance(shard["bytes"], int):
                raise ValueError(f"invalid tar {shard}")
        return splits, dict(content["settings"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source} is damaged ({error}); convert the data again") from error


def find(source: str) -> Splits | None:
    """Return the splits of a folder or URL that `data convert` wrote, or None for other sources."""
    file = posixpath.join(source, FILE)
    try:
        is_pattern = source.endswith(".tar") or set("*{") & set(source)
        return None if is_pattern else load(call(file, "cat_file"), public(file))[0]
    except MissingFile:
        return None


class Index:
    """The tars of a split of one or several sources, and the samples in them that pass the filters.

    `data convert` stores the positions of samples beside each tar. Other tars are scanned once, local tars at
    the start and remote tars when they are downloaded. The index needs 16 bytes of memory per sample. Copies
    of remote tars are limited to `budget` bytes.

    The number of a sample consists of the number of its tar and its row among the samples that pass there.
    """

    def __init__(
        self, sources: Sequence[str], split: str, filters: Sequence[Filter] = (), budget: float = 50e9
    ) -> None:
        self.filters, self.budget = filters, budget
        self.tars: list[Tar] = []  # of all sources, numbered in this order
        self.parts: list[range] = []  # the numbers of the tars of each source
        self.splits: dict[str, Splits] = {}  # by source, for those that have a `shards.json`
        self.fields: set[str] = set()  # names
        self.broken: dict[str, str] = {}  # name → reason, for samples and tars that cannot be used
        for source in sources:
            first, splits = len(self.tars), find(source)
            if splits is None:
                self.tars += map(Tar, expand(source))
            else:
                self.splits[source] = splits
                for shard in splits.get(split, ()):
                    tar = Tar(posixpath.join(source, split, shard["file"]), shard["sha256"])
                    path, size = Path(tar.url), shard["bytes"]
                    if not is_url(tar.url) and not (path.is_file() and path.stat().st_size == size):
                        raise UserError(f"{tar.url} does not have {size:,} bytes; convert the data again")
                    self.tars.append(tar)
            self.parts.append(range(first, len(self.tars)))
        known = [tar for tar in self.tars if tar.sha256 or not is_url(tar.url)]
        random.Random(os.getpid()).shuffle(known)  # so that ranks share the work
        thread_map(self._spans, known, max_workers=8, desc="index samples", unit=" tars", delay=2)

    def take_broken(self) -> dict[str, str]:
        """Return the entries of `broken` that are new since the last call, and remove them."""
        return dict(self.broken.popitem() for _ in range(len(self.broken)))

    def count(self, number: int) -> int:
        """Return the number of samples in a tar that pass the filters."""
        return len(self._spans(self.tars[number]))

    def samples(self, number: int) -> np.ndarray:
        """Return the numbers (n,) of the samples in a tar that pass the filters."""
        return (number << _ROW_BITS) + np.arange(self.count(number))

    def after(self, sample: int) -> int:
        """Return the number of the next sample; the last sample is followed by the first."""
        number, row = divmod(sample + 1, 1 << _ROW_BITS)
        while row >= self.count(number):
            number, row = (number + 1) % len(self.tars), 0
        return (number << _ROW_BITS) + row

    def read(self, sample: int) -> Record:
        """Read the sample with this number, or raise RunFailed if its tar cannot be read or has changed."""
        number, row = divmod(sample, 1 << _ROW_BITS)
        tar = self.tars[number]
        offset, length = self._spans(tar)[row].tolist()
        try:
            with open_copy(tar.url, tar.key, tar.sha256, self.budget) as file:
                file.seek(offset)
                return read_record(file.read(length), public(tar.url))
        except OSError as error:
            raise RunFailed(f"{public(tar.url)} cannot be read: {error}") from error

    def records(self) -> Iterator[Record]:
        """Read all samples that pass the filters, in order."""
        for number in range(len(self.tars)):
            yield from map(self.read, self.samples(number).tolist())

    def fetch(self, numbers: Sequence[int]) -> None:
        """Download the remote ones of these tars in advance; a failure is raised when they are read."""
        with contextlib.suppress(Exception):
            for number in numbers:
                if self.count(number) and is_url(self.tars[number].url):
                    self.read(number << _ROW_BITS)

    def _spans(self, tar: Tar) -> np.ndarray:
        """Return the spans of the samples in a tar that pass all filters."""
        if tar.spans is not None:
            return tar.spans
        try:
            table = self._table(tar)
        except OSError as error:
            raise RunFailed(f"{public(tar.url)} cannot be read: {error}") from error
        self.broken |= json.loads((table.schema.metadata or {}).get(BROKEN, "{}"))
        kept = np.full(len(table), True)
        for condition in self.filters:
            is_known = condition.field in table.column_names
            kept &= is_known and condition(table[condition.field].to_numpy())
        tar.spans = np.stack([table[name].to_numpy() for name in (OFFSET, BYTES)], axis=1)[kept]
        return tar.spans

    def _table(self, tar: Tar) -> pa.Table:
        """Read the spans in a tar and the fields for filters from a stored table, or scan the tar once."""
        cached = cache_folder("shards") / "index" / f"{tar.key}.parquet"
        beside = [f"{tar.url.removesuffix('.tar')}.parquet"] if tar.sha256 else []
        for file in (*beside, str(cached)):
            with contextlib.suppress(OSError, pa.ArrowException):
                stored = parquet.ParquetFile(io.BytesIO(call(file, "cat_file")))
                about = (stored.schema_arrow.metadata or {}).get(ABOUT, b"")
                if file in beside and tar.sha256.encode() not in about:
                    continue  # the table is about another tar
                self.fields |= {*stored.schema_arrow.names} - {OFFSET, BYTES}
                return stored.read([*{OFFSET, BYTES, *(condition.field for condition in self.filters)}])
        with open_copy(tar.url, tar.key, tar.sha256, self.budget) as content:
            table = scan(content, public(tar.url))
        with complete_file(cached) as draft:
            parquet.write_table(table, draft)
        self.fields |= {*table.column_names} - {OFFSET, BYTES}
        return table
