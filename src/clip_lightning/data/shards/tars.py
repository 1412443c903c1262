"""Tars as WebDataset and img2dataset write them, read from end to end, mixed, as batches."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from webdataset.tariterators import group_by_keys, tar_file_expander

from clip_lightning.data.datasets import MOST_BROKEN_IN_A_ROW, Samples
from clip_lightning.data.images import BrokenImage, augment, decode_bytes
from clip_lightning.data.shards.options import Reading
from clip_lightning.data.shards.record import BrokenRecord, CaptionChoice, Filter, Record, passes
from clip_lightning.data.shards.storage import opened
from clip_lightning.errors import UserError
from clip_lightning.terminal import public

_EMPTY_PASSES = 3


def read_tar(url: str, broken: dict[str, str]) -> Iterator[Record]:
    """Its samples, in its order; what cannot be used is named in `broken`.

    A tar that is not there, cut off or damaged ends where it does, and is named too.
    """
    try:
        with opened(url) as stream:
            for files in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                key = str(files["__key__"])
                try:
                    yield Record.from_files(key, files, url)
                except BrokenRecord as error:
                    broken[f"{public(url)}#{key}"] = str(error)
    except UserError:
        raise
    except FileNotFoundError:
        broken[public(url)] = "there is no such file"
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        broken[public(url)] = public(" ".join(str(error.args[0] if error.args else error).split()))[:200]


@dataclass(frozen=True)
class TarSource:
    """Tars that belong together.

    Attributes:
        urls: of the tars.
        weight: how often a sample is taken from them, in proportion to the other sources.
    """

    urls: tuple[str, ...]
    weight: float


@dataclass(frozen=True)
class BatchKey:
    """Which batch: on this rank number `batch` of `epoch`, of a process that began with `first`."""

    epoch: int
    first: int
    batch: int


class BatchSampler(Sampler[BatchKey]):
    """The batches of an epoch, by number.

    Attributes:
        start_batch: how many the next iteration skips; it sets it back to 0.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.epoch = self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration is of; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The batches of a whole epoch on this rank, whatever `start_batch` is."""
        return self.batches

    def __iter__(self) -> Iterator[BatchKey]:
        """Yield the batches that are still to come."""
        first, self.start_batch = self.start_batch, 0
        for batch in range(first, self.batches):
            yield BatchKey(self.epoch, first, batch)


class TarDataset(Dataset[Samples]):
    """Batches of samples as they come out of tars.

    Each worker of each rank reads its own share of every source's tars, pass after pass, each pass in another
    order, and mixes samples in a buffer. An epoch is a number of batches, not a pass. A process that goes on
    in the middle of an epoch begins to read anew, in an order of its own: what it had read before may come
    again, other samples later.
    """

    def __init__(
        self,
        sources: Sequence[TarSource],
        reading: Reading,
        choice: CaptionChoice,
        filters: Sequence[Filter],
        *,
        shuffle_buffer: int,
    ) -> None:
        self.sources, self.reading = sources, reading
        self.choice, self.filters = choice, filters
        self.shuffle_buffer = shuffle_buffer
        self._broken: dict[str, str] = {}
        self._stream: Iterator[Record] | None = None

    def __getitem__(self, key: BatchKey) -> Samples:
        """The next samples of this worker's stream; chance is a function of the seed and the key.

        Raises:
            UserError: the tars hold nothing that can be used.
        """
        if self._stream is None:
            self._stream = self._mixed(key)
        how = self.reading
        rng = np.random.default_rng((how.seed, key.epoch, key.batch, how.rank))
        pictures: list[torch.Tensor] = []
        captions: list[str] = []
        ids, names, broken_in_a_row = [], [], 0
        while len(pictures) < how.batch_size:
            record = next(self._stream)
            try:
                drawn = self.choice.draw(record.fields, how.captions_per_image, rng)
                pixels = augment(decode_bytes(record.image), how.transform, how.augmentation, rng)
            except (BrokenImage, BrokenRecord) as error:
                self._broken[record.name] = str(error)
                broken_in_a_row += 1
                if broken_in_a_row == MOST_BROKEN_IN_A_ROW:
                    raise UserError(
                        f"{MOST_BROKEN_IN_A_ROW} samples in a row cannot be used, the last is {record.name}: "
                        f"{error}; look at the shards, and at --data.shards.captions"
                    ) from error
                continue
            pictures.append(pixels)
            captions += drawn
            ids.append(record.image_id)
            names.append(record.name)
            broken_in_a_row = 0
        broken, self._broken = self._broken, {}
        each = np.full(len(pictures), how.captions_per_image)
        rows = np.full(len(captions), -1)  # nobody has counted the captions
        return Samples(pictures, np.array(ids), each, captions, rows, broken, names)

    def _mixed(self, key: BatchKey) -> Iterator[Record]:
        """Samples of all sources by their weights, each taken at random from a buffer."""
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        reader = self.reading.rank * workers + worker
        readers = self.reading.world_size * workers
        seeds = (self.reading.seed, key.epoch, key.first)
        rng = np.random.default_rng((*seeds, reader))
        streams = [
            self._samples(source, (*seeds, number), reader, readers)
            for number, source in enumerate(self.sources)
        ]
        weights = np.array([source.weight for source in self.sources])
        weights /= weights.sum()

        def draw() -> Record:
            return next(streams[rng.choice(len(streams), p=weights) if len(streams) > 1 else 0])

        buffer = [draw() for _ in range(self.shuffle_buffer)]
        while True:
            place = int(rng.integers(len(buffer)))
            yield buffer[place]
            buffer[place] = draw()

    def _samples(
        self, source: TarSource, seeds: tuple[int, ...], reader: int, readers: int
    ) -> Iterator[Record]:
        """The samples of this reader's share of the tars that pass the filters, without end."""
        shared = len(source.urls) >= readers
        empty = 0
        for number in count():
            # all readers draw the same order and share it; where there are too few tars, each reads all
            drawn = np.random.default_rng((*seeds, number) if shared else (*seeds, number, reader))
            order = drawn.permutation(len(source.urls))
            found = False
            for index in order[reader::readers] if shared else order:
                for record in read_tar(source.urls[index], self._broken):
                    if passes(self.filters, record.fields):
                        found = True
                        yield record
            empty = 0 if found else empty + 1
            if empty == _EMPTY_PASSES:
                name, reason = next(iter(self._broken.items()), ("", ""))
                why = (
                    f"; the first of {len(self._broken)} that cannot be used: {name}: {reason}"
                    if name
                    else ""
                )
                raise UserError(
                    f"no sample in {source.urls[0]} and {len(source.urls) - 1} more tars can be used and "
                    f"passes --data.shards.filters{why}"
                )
