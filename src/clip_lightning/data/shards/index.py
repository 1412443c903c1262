"""Every sample of the tars of a split: where it is, whether it passes the filters, and what it holds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from tqdm import tqdm

from clip_lightning.data.shards.manifest import FIELDS_FILE, Shard, Splits, find
from clip_lightning.data.shards.record import Filter, Record
from clip_lightning.data.shards.storage import Mirror, MissingFile, call, expand, identity, is_url, join
from clip_lightning.data.shards.tars import BROKEN, BYTES, OFFSET, DamagedTar, read_record, scan, write_table
from clip_lightning.errors import RunFailed, UserError
from clip_lightning.files import cache_folder
from clip_lightning.terminal import public

_VERSION = 1
_ROW_BITS = 32


@dataclass
class Tar:
    """A tar, and what is known of it.

    Attributes:
        url: its address.
        sha256: the checksum of its content, empty if nobody has noted it.
        noted: the number of its samples that `shards.json` has.
        count: the number of its samples that pass the filters, None as long as it has not arrived.
        spans: offset and length (count, 2) of these samples, in their order.
    """

    url: str
    sha256: str = ""
    noted: int | None = None
    count: int | None = None
    spans: np.ndarray | None = None

    @cached_property
    def key(self) -> str:
        """A name for this content at this address."""
        address = self.url if is_url(self.url) else os.path.abspath(self.url)
        content = json.dumps([_VERSION, address, self.sha256 or identity(self.url)])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def expected(self) -> int:
        """Return `count`, or what `shards.json` or img2dataset's NAME_stats.json has, or raise UserError."""
        for count in (self.count, self.noted):
            if count is not None:
                return count
        note = self.url.removesuffix(".tar") + "_stats.json"
        try:
            return int(json.loads(call(note, "cat_file"))["successes"])
        except (MissingFile, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"it is not known how many samples {public(self.url)} holds (no count in {public(note)}); "
                "give --data.shards.samples_per_epoch"
            ) from error


class Index:
    """The tars of a split of one or several sources, and the samples in them that pass the filters.

    `data convert` has noted where each sample is. Other tars are gone through once, those of this machine at
    the beginning, remote ones when they arrive; the result is kept in the cache folder, by address, size and
    ETag or time of the last change. In memory are 16 bytes per sample; of tars that are gone through when
    they arrive, only those of the `recent` last ones. Of remote tars, copies of `budget` bytes are kept.

    A sample is numbered by its tar and by its row among the samples of this tar that pass.

    Attributes:
        tars: those of all sources, which are numbered in this order.
        parts: the numbers of the tars of each source.
        splits: source → the splits of its `shards.json`, if it has one.
        fields: the names of the fields that samples have.
        broken: name → reason, of what cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[str],
        split: str,
        filters: Sequence[Filter] = (),
        budget: float = 50e9,
        recent: int = 1,
    ) -> None:
        """Look for the tars, or raise UserError if there is none or `shards.json` says something else."""
        self.filters, self._mirror = filters, Mirror(budget)
        self.tars: list[Tar] = []
        self.parts: list[range] = []
        self.splits: dict[str, Splits] = {}
        self.fields: set[str] = set()
        self.broken: dict[str, str] = {}
        self._arrived: deque[Tar] = deque(maxlen=recent)
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
        for tar in tqdm(local, desc="looking for samples", unit=" tars", delay=2):
            self._find(tar, self._table(tar))

    def take_broken(self) -> dict[str, str]:
        """Return what was found broken since the last call, and forget it."""
        return dict(self.broken.popitem() for _ in range(len(self.broken)))

    def count(self, number: int) -> int:
        """Return the number of samples of a tar that pass."""
        count = self.tars[number].count
        return len(self._spans(self.tars[number])) if count is None else count

    def samples(self, number: int) -> np.ndarray:
        """Return the numbers (n,) of the samples of a tar that pass."""
        return (number << _ROW_BITS) + np.arange(self.count(number))

    def after(self, sample: int) -> int:
        """Return the number of the next sample; the first one follows the last."""
        number, row = divmod(sample + 1, 1 << _ROW_BITS)
        while row >= self.count(number):
            number, row = (number + 1) % len(self.tars), 0
        return (number << _ROW_BITS) + row

    def read(self, sample: int) -> Record:
        """Read the sample with this number, or raise UserError if its tar cannot be read or has changed."""
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
        """Read all samples that pass, in their order."""
        for number in range(len(self.tars)):
            yield from map(self.read, self.samples(number).tolist())

    def fetch(self, numbers: Sequence[int]) -> None:
        """Copy those of these tars that are remote to this machine, and find their samples."""
        for number in numbers:
            if self.count(number) and is_url(self.tars[number].url):
                self.read(number << _ROW_BITS)

    def _add_converted(self, folder: str, shards: Sequence[Shard]) -> None:
        """Add the tars that `data convert` wrote, and where their samples are."""
        tars = [Tar(join(folder, shard.file), shard.sha256, shard.samples) for shard in shards]
        self.tars += tars
        for tar, shard in zip(tars, shards, strict=True):
            there = is_url(folder) or (os.path.isfile(tar.url) and os.path.getsize(tar.url) == shard.bytes)
            if not there:
                raise UserError(f"{tar.url} is not of {shard.bytes:,} bytes; convert the data again")
        if not tars:
            return
        fields = join(folder, FIELDS_FILE)
        try:
            file = parquet.ParquetFile(io.BytesIO(call(fields, "cat_file")))
            names = {*file.schema_arrow.names}
            table = file.read([*({OFFSET, BYTES, *(each.field for each in self.filters)} & names)])
        except (MissingFile, pa.ArrowException) as error:
            raise UserError(f"{public(fields)} is damaged ({error}); convert the data again") from error
        # else an earlier version wrote it, and the tars are gone through like any others
        if OFFSET in names and len(table) == sum(shard.samples for shard in shards):
            self.fields |= names - {OFFSET, BYTES}
            for tar, shard in zip(tars, shards, strict=True):
                self._find(tar, table.slice(0, shard.samples))
                table = table.slice(shard.samples)

    def _spans(self, tar: Tar) -> np.ndarray:
        if (spans := tar.spans) is None:
            spans = self._find(tar, self._table(tar))
            if len(self._arrived) == self._arrived.maxlen:
                self._arrived[0].spans = None
            self._arrived.append(tar)
        return spans

    def _find(self, tar: Tar, table: pa.Table) -> np.ndarray:
        """Note where the samples of a tar are that pass all filters."""
        self.broken |= json.loads((table.schema.metadata or {}).get(BROKEN, "{}"))
        self.fields |= {*table.column_names} - {OFFSET, BYTES}
        kept = np.full(len(table), all(each.field in table.column_names for each in self.filters))
        for condition in self.filters if kept.all() else ():
            column = table[condition.field]
            numbers = pa.types.is_floating(column.type)
            kept &= condition(column.to_numpy() if numbers else column.to_pylist())
        tar.spans = np.stack([table[name].to_numpy() for name in (OFFSET, BYTES)], axis=1)[kept]
        tar.count = len(tar.spans)
        return tar.spans

    def _table(self, tar: Tar) -> pa.Table:
        """Return a row per sample of a tar, from the cache folder or by going through the tar."""
        name = public(tar.url)
        try:
            path = cache_folder("shards") / "index" / f"{tar.key}.parquet"
            with contextlib.suppress(FileNotFoundError, pa.ArrowException):
                return parquet.ParquetFile(path).read()
            with self._mirror.open(tar.url, tar.key, tar.sha256) as file:
                table = scan(file, name)
            write_table(table, path)
            return table
        except OSError as error:
            if not (is_url(tar.url) and isinstance(error, MissingFile)):
                raise RunFailed(f"{name} cannot be read: {error}") from error
            broken = {name: "there is no such file"}  # a pattern may name more than there is
            return scan(io.BytesIO(), name).replace_schema_metadata({BROKEN: json.dumps(broken)})
