"""litdata's chunks, read at any place: batches are functions of (seed, epoch, position)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from torch import Tensor
from torch.utils.data import Dataset

from clip_lightning.data.datasets import MOST_BROKEN_IN_A_ROW, Samples
from clip_lightning.data.images import BrokenImage, augment, decode_bytes
from clip_lightning.data.sampler import TrainSampler
from clip_lightning.data.shards.manifest import FIELDS_FILE, Manifest
from clip_lightning.data.shards.options import Reading
from clip_lightning.data.shards.record import BrokenRecord, CaptionChoice, Filter, Record, fields_of
from clip_lightning.data.shards.storage import Mirror, is_url, join, litdata, opened, read
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, write_atomically

INDEX = "index.json"


class ChunkFolder:
    """One split of a data set that `data convert --to litdata` wrote, here or behind a URL.

    Attributes:
        sizes: samples of each chunk.
    """

    def __init__(self, source: str, manifest: Manifest, split: str, keep: int) -> None:
        """Look at the folder; of a remote one, copies of `keep` chunks are kept on this machine.

        Raises:
            UserError: it is not what its `shards.json` says.
        """
        self.source, self._shards = join(source, split), manifest.splits[split]
        self.sizes = [shard.samples for shard in self._shards]
        self._mirror: Mirror | None = None
        if is_url(source):
            self._folder = cache_folder("shards") / manifest.digest()[:16] / split
            self._mirror = Mirror(self.source, self._folder, keep)
            index = read(join(self.source, INDEX))
            if index is None:
                raise UserError(f"{self.source} has no {INDEX}; it is not all there")
            write_atomically(self._folder / INDEX, index)
        else:
            self._folder = Path(self.source)
            for shard in self._shards:
                path = self._folder / shard.file
                if not path.is_file() or path.stat().st_size != shard.bytes:
                    raise UserError(
                        f"{path} is not there, or not of {shard.bytes:,} bytes; convert the data again"
                    )
        self._first = np.cumsum([0, *self.sizes])
        self._reader: Any = None

    def __len__(self) -> int:
        """Samples of all chunks."""
        return int(self._first[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Each process opens files of its own."""
        return {**self.__dict__, "_reader": None}

    def __getitem__(self, row: int) -> Record:
        """A sample.

        Raises:
            OSError: its chunk cannot be read.
            BrokenRecord: what is written beside the picture cannot be read.
        """
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        shard = self._shards[number]
        if self._mirror is not None:
            self._mirror.fetch(shard.file, shard.bytes, shard.sha256)
        if self._reader is None:
            self._reader = litdata().StreamingDataset(str(self._folder))
        item = self._reader[row]
        key = bytes(item["key"]).decode(errors="replace")
        return Record(
            key, bytes(item["image"]), fields_of(bytes(item["fields"])), join(self.source, shard.file)
        )

    def selected(self, filters: Sequence[Filter]) -> np.ndarray | range:
        """Rows, ascending, of the samples that pass all filters.

        Raises:
            UserError: a filter is on a field that no sample has.
        """
        if not filters:
            return range(len(self))
        source = join(self.source, FIELDS_FILE)
        wanted = list(dict.fromkeys(condition.field for condition in filters))
        with opened(source) as file:
            table = pa.parquet.ParquetFile(file)
            lacking = [name for name in wanted if name not in table.schema_arrow.names]
            if lacking:
                known = ", ".join(table.schema_arrow.names)
                raise UserError(f"--data.shards.filters: no sample has {lacking[0]!r}; there are {known}")
            kept = [_passing(batch, filters) for batch in table.iter_batches(columns=wanted)]
        return np.flatnonzero(np.concatenate(kept))


def _passing(batch: pa.RecordBatch, filters: Sequence[Filter]) -> np.ndarray:
    """Which rows pass all filters."""
    kept = np.ones(len(batch), bool)
    for condition in filters:
        column = batch[condition.field]
        if pa.types.is_floating(column.type) and not isinstance(condition.value, str):
            kept &= condition.of_numbers(column.to_numpy(zero_copy_only=False))
        else:
            kept &= [condition({condition.field: value}) for value in column.to_pylist()]
    return kept


class ChunkSampler(TrainSampler):
    """Shuffled (epoch, position) pairs that stay close together: chunks in random order, `window` at a time.

    The samples of a window are shuffled among each other. Batches have the same members for every number
    of ranks and of workers, as those of `TrainSampler`, and no more than a window's order is in memory.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, *, window: int, seed: int, rank: int, world_size: int
    ) -> None:
        """Sample from chunks with these numbers of samples; arguments as for `TrainSampler`."""
        super().__init__(sum(sizes), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.sizes, self.window = np.asarray(sizes), window
        self._first = np.cumsum([0, *sizes])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield this rank's pairs, batch after batch."""
        epoch, start, self.start_batch = self.epoch, self.start_batch, 0
        size = self.batch_size * self.world_size
        order = self._order(epoch, start * size)
        for _ in range(start, self.batches):
            batch = list(islice(order, size))
            for position in batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]:
                yield epoch, position

    def _order(self, epoch: int, skip: int) -> Iterator[int]:
        """The positions of an epoch without the first `skip`."""
        chunks = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
        for number, start in enumerate(range(0, len(chunks), self.window)):
            window = chunks[start : start + self.window]
            size = int(self.sizes[window].sum())
            if skip >= size:
                skip -= size
                continue
            positions = np.concatenate(
                [np.arange(self._first[chunk], self._first[chunk + 1]) for chunk in window]
            )
            yield from (
                np.random.default_rng((self.seed, epoch, number)).permutation(positions)[skip:].tolist()
            )
            skip = 0


class ChunkDataset(Dataset[Samples]):
    """Pictures with K captions of their own: pure functions of (seed, epoch, position)."""

    def __init__(
        self,
        folders: Sequence[ChunkFolder],
        reading: Reading,
        choice: CaptionChoice,
        filters: Sequence[Filter],
    ) -> None:
        """Number the samples that pass the filters, folder after folder: their positions.

        Raises:
            UserError: none does.
        """
        self.folders, self.reading, self.choice = folders, reading, choice
        self._rows = [folder.selected(filters) for folder in folders]
        self._first = np.cumsum([0, *map(len, self._rows)])
        if not len(self):
            raise UserError("no sample passes --data.shards.filters")

    def __len__(self) -> int:
        """The number of samples that pass the filters."""
        return int(self._first[-1])

    @property
    def chunk_sizes(self) -> list[int]:
        """How many of these each chunk holds, folder after folder."""
        sizes: list[int] = []
        for folder, rows in zip(self.folders, self._rows, strict=True):
            if isinstance(rows, range):
                sizes += folder.sizes
            else:
                sizes += np.histogram(rows, np.cumsum([0, *folder.sizes]))[0].tolist()
        return sizes

    def record(self, position: int) -> Record:
        """The sample with this number.

        Raises:
            OSError: its chunk cannot be read.
            BrokenRecord: what is written beside the picture cannot be read.
        """
        folder = int(np.searchsorted(self._first, position, side="right")) - 1
        return self.folders[folder][int(self._rows[folder][position - self._first[folder]])]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Samples:
        """The samples of these (epoch, position); in place of a broken one the next that can be used.

        Raises:
            UserError: when a hundred in a row are broken, or a chunk cannot be read.
        """
        broken: dict[str, str] = {}
        # neighbours one after the other: to go to another chunk takes longer than to read a sample
        order = sorted(range(len(keys)), key=lambda place: keys[place][1])
        found = {place: self._sample(*keys[place], broken) for place in order}
        samples = [found[place] for place in range(len(keys))]
        each = np.full(len(keys), self.reading.captions_per_image)
        return Samples(
            pictures=[pixels for pixels, _, _ in samples],
            image_id=np.array([record.image_id for _, _, record in samples]),
            counts=each,
            captions=[text for _, texts, _ in samples for text in texts],
            caption_rows=np.full(int(each.sum()), -1),  # nobody has counted the captions
            broken=broken,
            names=[record.name for _, _, record in samples],
        )

    def _sample(self, epoch: int, position: int, broken: dict[str, str]) -> tuple[Tensor, list[str], Record]:
        how = self.reading
        rng = np.random.default_rng((how.seed, epoch, position))
        most = min(len(self), MOST_BROKEN_IN_A_ROW)
        for _ in range(most):
            name = f"sample {position}"
            try:
                record = self.record(position)
                name = record.name
                texts = self.choice.draw(record.fields, how.captions_per_image, rng)
                pixels = augment(decode_bytes(record.image), how.transform, how.augmentation, rng)
                return pixels, texts, record
            except (BrokenImage, BrokenRecord) as error:
                broken[name] = str(error)
                position = (position + 1) % len(self)
            except OSError as error:
                raise UserError(f"shards cannot be read: {error}") from error
        raise UserError(
            f"{most} samples in a row cannot be used, the last is {name}: {broken[name]}; "
            "look at the shards, and at --data.shards.captions"
        )
