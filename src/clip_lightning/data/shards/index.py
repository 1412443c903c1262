"""Index the samples in the tars of a split: their positions, their fields, and which pass the filters."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from tqdm import tqdm

from clip_lightning.data.captions import SPLITS
from clip_lightning.data.shards.record import Filter, Record
from clip_lightning.data.shards.storage import Mirror, MissingFile, call, expand, identity, is_url, join
from clip_lightning.data.shards.tars import BROKEN, BYTES, OFFSET, DamagedTar, read_record, scan, write_table
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import cache_folder
from clip_lightning.terminal import public

FILE, FIELDS_FILE = "shards.json", "fields.parquet"
HEADER = {"version": 1, "format": "webdataset"}
_VERSION = 1
_ROW_BITS = 32


@dataclass(frozen=True)
class Shard:
    """A tar in the folder of its split: its name, number of samples, size, and SHA-256 (hex)."""

    file: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        numbers = self.samples, self.bytes
        is_inside = re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", self.file)  # of the folder
        if not (is_inside and all(isinstance(number, int) and number >= 0 for number in numbers)):
            raise ValueError(f"invalid file {self.file!r} of {self.samples} samples and {self.bytes} bytes")


Splits = Mapping[str, Sequence[Shard]]
"""`train`, `val` and `test` → their tars."""


def load(data: bytes, source: str) -> tuple[Splits, dict[str, Any]]:
    """Read splits and settings from the content of `shards.json`, whose address is `source`."""
    try:
        content = json.loads(data)
        splits = {name: tuple(Shard(**shard) for shard in part) for name, part in content["splits"].items()}
        if not (content.items() >= HEADER.items() and splits.keys() <= {*SPLITS}):
            raise ValueError(f"expected {HEADER} and the splits {SPLITS}")
        return splits, dict(content["settings"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source} is damaged ({error}); convert the data again") from error


def find(source: str) -> Splits | None:
    """Return the splits of a folder or URL that `data convert` wrote, or None for other sources."""
    file = join(source, FILE)
    try:
        is_pattern = source.endswith(".tar") or set("*{") & set(source)
        return None if is_pattern else load(call(file, "cat_file"), public(file))[0]
    except MissingFile:
        return None


@dataclass
class Tar:
    """A tar and what is known about it.

    Attributes:
        url: the path or URL.
        sha256: the checksum of the content, or an empty string if it is unknown.
        spans: offset and length (n, 2) of the samples that pass the filters, or None until it is indexed.
    """

    url: str
    sha256: str = ""
    spans: np.ndarray | None = None

    @cached_property
    def key(self) -> str:
        """A unique name for this content at this address."""
        address = self.url if is_url(self.url) else os.path.abspath(self.url)
        content = json.dumps([_VERSION, address, self.sha256 or identity(self.url)])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


class Index:
    """The tars of a split of one or several sources, and the samples in them that pass the filters.

    `data convert` stores the position of each sample. Other tars are scanned once, local tars at the start
    and remote tars when they are downloaded. The result is cached by address, size, and ETag or modification
    time. The index needs 16 bytes of memory per sample. Copies of remote tars are limited to `budget` bytes.

    The number of a sample consists of the number of its tar and its row among the samples that pass there.

    Attributes:
        tars: the tars of all sources, numbered in this order.
        parts: the numbers of the tars of each source.
        splits: source → the splits in its `shards.json`, if it has one.
        fields: the names of the samples' fields.
        broken: name → reason, for samples and tars that cannot be used.
    """

    def __init__(
        self, sources: Sequence[str], split: str, filters: Sequence[Filter] = (), budget: float = 50e9
    ) -> None:
        self.filters, self._mirror = filters, Mirror(budget)
        self.tars: list[Tar] = []
        self.parts: list[range] = []
        self.splits: dict[str, Splits] = {}
        self.fields: set[str] = set()
        self.broken: dict[str, str] = {}
        for source in sources:
            first, splits = len(self.tars), find(source)
            if splits is None:
                self.tars += map(Tar, expand(source))
            else:
                self.splits[source] = splits
                self._add_converted(join(source, split), splits.get(split, ()))
            self.parts.append(range(first, len(self.tars)))
        local = [tar for tar in self.tars if tar.spans is None and not is_url(tar.url)]
        random.Random(os.getpid()).shuffle(local)  # so that ranks share the work
        for tar in tqdm(local, desc="index samples", unit=" tars", delay=2):
            self._spans(tar)

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
            with self._mirror.open(tar.url, tar.key, tar.sha256) as file:
                file.seek(offset)
                return read_record(file.read(length), public(tar.url))
        except (OSError, DamagedTar) as error:
            raise RunFailed(f"{public(tar.url)} cannot be read: {error}") from error

    def records(self) -> Iterator[Record]:
        """Read all samples that pass the filters, in order."""
        for number in range(len(self.tars)):
            yield from map(self.read, self.samples(number).tolist())

    def fetch(self, numbers: Sequence[int]) -> None:
        """Download the remote ones of these tars, and index their samples."""
        for number in numbers:
            if self.count(number) and is_url(self.tars[number].url):
                self.read(number << _ROW_BITS)

    def _add_converted(self, folder: str, shards: Sequence[Shard]) -> None:
        """Add the tars that `data convert` wrote, with the stored positions of their samples."""
        if not shards:
            return
        fields = join(folder, FIELDS_FILE)
        try:
            file = parquet.ParquetFile(io.BytesIO(call(fields, "cat_file")))
            names = {*file.schema_arrow.names}
            table = file.read([*({OFFSET, BYTES, *(condition.field for condition in self.filters)} & names)])
        except (MissingFile, pa.ArrowException) as error:
            raise UserError(f"{public(fields)} is damaged ({error}); convert the data again") from error
        if not {OFFSET, BYTES} <= names or len(table) != sum(shard.samples for shard in shards):
            raise UserError(f"{public(fields)} does not match {FILE}; convert the data again")
        self.fields |= names - {OFFSET, BYTES}
        for shard in shards:
            tar = Tar(join(folder, shard.file), shard.sha256)
            is_complete = os.path.isfile(tar.url) and os.path.getsize(tar.url) == shard.bytes
            if not is_url(folder) and not is_complete:
                raise UserError(f"{tar.url} does not have {shard.bytes:,} bytes; convert the data again")
            self._pass(tar, table.slice(0, shard.samples))
            self.tars.append(tar)
            table = table.slice(shard.samples)

    def _spans(self, tar: Tar) -> np.ndarray:
        """Return the spans of a tar, from the cache or by scanning it."""
        if tar.spans is not None:
            return tar.spans
        try:
            path = cache_folder("shards") / "index" / f"{tar.key}.parquet"
            with contextlib.suppress(FileNotFoundError, pa.ArrowException):
                return self._pass(tar, parquet.ParquetFile(path).read())
            with self._mirror.open(tar.url, tar.key, tar.sha256) as file:
                table = scan(file, public(tar.url))
            write_table(table, path)
            return self._pass(tar, table)
        except OSError as error:
            raise RunFailed(f"{public(tar.url)} cannot be read: {error}") from error

    def _pass(self, tar: Tar, table: pa.Table) -> np.ndarray:
        """Set the spans of the samples in a tar, one per row of the table, that pass all filters."""
        self.broken |= json.loads((table.schema.metadata or {}).get(BROKEN, "{}"))
        self.fields |= {*table.column_names} - {OFFSET, BYTES}
        kept = np.full(len(table), True)
        for condition in self.filters:
            if condition.field in table.column_names:
                column = table[condition.field]
                numbers = pa.types.is_floating(column.type)
                kept &= condition(column.to_numpy() if numbers else column.to_pylist())
            else:
                kept[:] = False
        tar.spans = np.stack([table[name].to_numpy() for name in (OFFSET, BYTES)], axis=1)[kept]
        return tar.spans
