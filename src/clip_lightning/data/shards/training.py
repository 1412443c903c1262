"""From the options to what a loader reads: the samples, and the order of their batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Sampler

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.shards.chunks import ChunkDataset, ChunkFolder, ChunkSampler
from clip_lightning.data.shards.held_out import held_out
from clip_lightning.data.shards.manifest import Manifest, tars
from clip_lightning.data.shards.options import Reading, ShardOptions
from clip_lightning.data.shards.record import CaptionChoice, Filter
from clip_lightning.data.shards.storage import identities, read
from clip_lightning.data.shards.tars import BatchSampler, TarDataset, TarSource
from clip_lightning.errors import UserError

SPLIT = "train"
_COPIES_PER_WINDOW = 2  # the next window is begun while the last one is finished


class TrainingShards:
    """The sources that training reads.

    Attributes:
        digest: SHA-256 (hex) of what is known of them: checksums where `data convert` wrote them, names and
            sizes of other tars.
        manifests: source → its `shards.json`, of those that have one.
    """

    def __init__(self, options: ShardOptions, root: Path | str | None) -> None:
        """Look at the sources.

        Raises:
            UserError: there is none, one cannot be read, or they do not go together.
        """
        self.options = options
        self.choice = CaptionChoice(options.captions)
        self.filters = [Filter.parse(text) for text in options.filters]
        self.weights = options.weights(root)
        if not self.weights:
            raise UserError("no shards: give --data.root FOLDER, or --data.shards.sources")
        found = {source: Manifest.find(source) for source in self.weights}
        self.manifests = {source: manifest for source, manifest in found.items() if manifest is not None}
        for source, manifest in self.manifests.items():
            if SPLIT not in manifest.splits:
                raise UserError(f"{source} has no {SPLIT} split; give data that has one")
        kinds = {"webdataset" if manifest is None else manifest.format for manifest in found.values()}
        if len(kinds) > 1:
            raise UserError("--data.shards.sources names both litdata's shards and tars; give one kind")
        self.chunked = kinds == {"litdata"}
        if self.chunked and len(set(self.weights.values())) > 1:
            raise UserError(
                "--data.shards.sources: weights are for tars; of litdata's shards each comes once an epoch"
            )
        if self.chunked and options.samples_per_epoch is not None:
            raise UserError(
                "--data.shards.samples_per_epoch is for tars; an epoch of litdata's shards is every sample "
                "once; --trainer.limit_train_batches ends it earlier"
            )
        self._urls = {} if self.chunked else {name: tars(name, its, SPLIT) for name, its in found.items()}
        self.digest = self._digest()

    def _digest(self) -> str:
        known: dict[str, Any] = {source: manifest.digest() for source, manifest in self.manifests.items()}
        for source, urls in self._urls.items():
            if source not in known:
                known[source] = [(Path(url).name, size) for url, size in identities(urls)]
        # where they lie does not matter, what they hold does
        content = sorted(json.dumps(value) for value in known.values())
        chosen = [dict(self.choice.probabilities), [*self.options.filters]]
        return hashlib.sha256(json.dumps([content, chosen]).encode()).hexdigest()

    def loading(self, reading: Reading) -> tuple[Dataset[Any], Sampler[Any]]:
        """The samples, and the sampler that yields their keys, batch after batch.

        Of litdata's shards the keys are of samples; of tars, of whole batches.

        Raises:
            UserError: there are too few samples for a batch, or it is not known how many.
        """
        if self.chunked:
            return self._chunks(reading)
        batches = self.samples // (reading.batch_size * reading.world_size)
        if not batches:
            raise UserError(
                f"an epoch of {self.samples} samples has not one batch of {reading.batch_size} on each of "
                f"{reading.world_size} devices; lower --data.batch_size or raise "
                "--data.shards.samples_per_epoch"
            )
        sources = [TarSource(tuple(urls), self.weights[source]) for source, urls in self._urls.items()]
        dataset = TarDataset(
            sources, reading, self.choice, self.filters, shuffle_buffer=self.options.shuffle_buffer
        )
        return dataset, BatchSampler(batches)

    def _chunks(self, reading: Reading) -> tuple[ChunkDataset, ChunkSampler]:
        keep = _COPIES_PER_WINDOW * self.options.window
        folders = [ChunkFolder(source, manifest, SPLIT, keep) for source, manifest in self.manifests.items()]
        dataset = ChunkDataset(folders, reading, self.choice, self.filters)
        sampler = ChunkSampler(
            dataset.chunk_sizes,
            reading.batch_size,
            window=self.options.window,
            seed=reading.seed,
            rank=reading.rank,
            world_size=reading.world_size,
        )
        return dataset, sampler

    def held_out(self, split: str) -> list[CaptionedImage]:
        """The pictures of `val` or `test`, as files with all their captions; none where no source has any.

        Raises:
            UserError: they cannot be read.
        """
        source = self.options.val if split == "val" else None
        if source is None:
            source = next((name for name, its in self.manifests.items() if split in its.splits), None)
        return [] if source is None else held_out(source, split, self.choice)

    @property
    def samples(self) -> int:
        """An epoch's, before filters where there are some.

        Raises:
            UserError: nobody has counted them.
        """
        if self.options.samples_per_epoch is not None:
            return self.options.samples_per_epoch
        counted = [manifest.samples(SPLIT) for manifest in self.manifests.values()]
        rest = [urls for source, urls in self._urls.items() if source not in self.manifests]
        return sum([*counted, *map(_counted, rest)])


def _counted(urls: Sequence[str]) -> int:
    """By img2dataset, which leaves NAME_stats.json beside NAME.tar."""
    total = 0
    for url in urls:
        note = url.removesuffix(".tar") + "_stats.json"
        data = read(note)
        try:
            stats: Mapping[str, Any] = {} if data is None else json.loads(data)
            total += int(stats["successes"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"it is not known how many samples {url} holds (no count in {note}); give "
                "--data.shards.samples_per_epoch"
            ) from error
    return total
