"""Index the samples in the tars of a split: their positions, their fields, and which pass the filters."""

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
    """A tar and what is known about it.

    Attributes:
        url: the path or URL.
        sha256: the checksum of the content, or an empty string if it is unknown.
        noted: the number of samples according to `shards.json`.
        count: the number of samples that pass the filters, or None until the tar has been indexed.
        spans: offset and length (count, 2) of these samples, in order.
    """

    url: str
    sha256: str = ""
    noted: int | None = None
    count: int | None = None
    spans: np.ndarray | None = None

    @cached_property
    def key(self) -> str:
        """A unique name for this content at this address."""
        address = self.url if is_url(self.url) else os.path.abspath(self.url)
        content = json.dumps([_VERSION, address, self.sha256 or identity(self.url)])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def expected(self) -> int:
        """Return `count`, or the number in `shards.json` or img2dataset's NAME_stats.json.

        Raises:
            UserError: the number is unknown.
        """
        for count in (self.count, self.noted):
            if count is not None:
                return count
        note = self.url.removesuffix(".tar") + "_stats.json"
        try:
            return int(json.loads(call(note, "cat_file"))["successes"])
        except (MissingFile, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the number of samples in {public(self.url)} is unknown, as {public(note)} has none; give "
                "--data.shards.samples_per_epoch"
            ) from error


class Index:
    """The tars of a split of one or several sources, and the samples in them that pass the filters.

    `data convert` stores the position of each sample. Other tars are scanned once, local tars at the start
    and remote tars when they are downloaded. The result is cached by address, size, and ETag or modification
    time. The index needs 16 bytes of memory per sample; of tars that are scanned when they are downloaded,
    only the `recent` last ones stay in memory. Copies of remote tars are limited to `budget` bytes.

    The number of a sample consists of the number of its tar and its row among the samples that pass there.

    Attributes:
        tars: the tars of all sources, numbered in this order.
        parts: the numbers of the tars of each source.
        splits: source → the splits in its `shards.json`, if it has one.
        fields: the names of the samples' fields.
        broken: name → reason, for samples and tars that cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[str],
        split: str,
        filters: Sequence[Filter] = (),
        budget: float = 50e9,
        recent: int = 1,
    ) -> None:
        """Find the tars, or raise UserError if there are none or they do not match `shards.json`."""
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
        for tar in tqdm(local, desc="index samples", unit=" tars", delay=2):
            self._find(tar, self._table(tar))

    def take_broken(self) -> dict[str, str]:
        """Return the entries of `broken` that are new since the last call, and remove them."""
        return dict(self.broken.popitem() for _ in range(len(self.broken)))

    def count(self, number: int) -> int:
        """Return the number of samples in a tar that pass the filters."""
        count = self.tars[number].count
        return len(self._spans(self.tars[number])) if count is None else count

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
        tars = [Tar(join(folder, shard.file), shard.sha256, shard.samples) for shard in shards]
        self.tars += tars
        for tar, shard in zip(tars, shards, strict=True):
            if not is_url(folder) and not (
                os.path.isfile(tar.url) and os.path.getsize(tar.url) == shard.bytes
            ):
                raise UserError(f"{tar.url} does not have {shard.bytes:,} bytes; convert the data again")
        if not tars:
            return
        fields = join(folder, FIELDS_FILE)
        try:
            file = parquet.ParquetFile(io.BytesIO(call(fields, "cat_file")))
            names = {*file.schema_arrow.names}
            table = file.read([*({OFFSET, BYTES, *(condition.field for condition in self.filters)} & names)])
        except (MissingFile, pa.ArrowException) as error:
            raise UserError(f"{public(fields)} is damaged ({error}); convert the data again") from error
        # An earlier version did not store positions; its tars are scanned like other tars.
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
        """Set the positions of the samples in a tar that pass all filters."""
        self.broken |= json.loads((table.schema.metadata or {}).get(BROKEN, "{}"))
        self.fields |= {*table.column_names} - {OFFSET, BYTES}
        has_fields = all(condition.field in table.column_names for condition in self.filters)
        kept = np.full(len(table), has_fields)
        for condition in self.filters if kept.all() else ():
            column = table[condition.field]
            numbers = pa.types.is_floating(column.type)
            kept &= condition(column.to_numpy() if numbers else column.to_pylist())
        tar.spans = np.stack([table[name].to_numpy() for name in (OFFSET, BYTES)], axis=1)[kept]
        tar.count = len(tar.spans)
        return tar.spans

    def _table(self, tar: Tar) -> pa.Table:
        """Return a table with a row per sample of a tar, from the cache or by scanning the tar."""
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
            broken = {name: "there is no such file"}  # a pattern may include missing files
            return scan(io.BytesIO(), name).replace_schema_metadata({BROKEN: json.dumps(broken)})
