"""Train from tars: the options, the dataset, the sampler, and the held-out images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, pairwise
from pathlib import Path
from threading import Thread

import numpy as np
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.datasets import MOST_BROKEN_IN_A_ROW, Samples
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import Augmentation, BrokenImage, ImageTransform, augment, decode_bytes
from clip_lightning.data.sampler import TrainSampler
from clip_lightning.data.shards import storage
from clip_lightning.data.shards.index import Index, find
from clip_lightning.data.shards.storage import holds_tars, is_url
from clip_lightning.data.shards.tars import BrokenRecord, Filter, Record, captions_of, draw_captions
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, whole_folder
from clip_lightning.terminal import public

_REMOTE_WINDOW = 16
_BLOCK = 1 << 16


@dataclass(frozen=True)
class ShardOptions:
    """Options for training from tars.

    Attributes:
        sources: folders, URLs (s3://, gs://, hf://, https://) or patterns of tars, such as
            DIR/{00000..00099}.tar, instead of --data.root; or a mapping from these to weights, in proportion
            to which samples are drawn from them.
        captions: fields with captions and their probabilities, such as {txt: 0.5, synthetic: 0.5}; by default
            the first of captions, txt and caption that a sample has.
        filters: conditions on a sample's fields, such as 'width >= 200' or 'similarity > 0.28'.
        samples_per_epoch: number of samples per epoch; by default every sample once. Required for remote tars
            that `data convert` did not write.
        val: captioned images or tars for validation; by default the split `val` next to `train`.
        window: number of tars whose samples are shuffled together; by default all tars if they are on this
            machine, or else 16.
    """

    sources: Mapping[str, PositiveFloat] | Sequence[str] | None = None
    captions: Mapping[str, PositiveFloat] = field(default_factory=dict)
    filters: Sequence[str] = field(default_factory=list)
    samples_per_epoch: PositiveInt | None = None
    val: str | None = None
    window: PositiveInt | None = None


class ShardDataset(Dataset[Samples]):
    """Images in tars with K captions each: samples are pure functions of (seed, epoch, sample)."""

    def __init__(
        self,
        options: ShardOptions,
        root: str,
        transform: ImageTransform,
        augmentation: Augmentation,
        *,
        captions_per_image: int = 1,
        seed: int = 0,
        budget: float = 50e9,
    ) -> None:
        self.options, self.transform, self.augmentation = options, transform, augmentation
        self.captions_per_image, self.seed = captions_per_image, seed
        sources = [*(options.sources or [root])]
        weights = [*options.sources.values()] if isinstance(options.sources, Mapping) else [1.0]
        if not np.isfinite([*weights, *options.captions.values()]).all():
            raise UserError("--data.shards.sources and --data.shards.captions: expected finite numbers")
        self.index = Index(sources, "train", [*map(Filter.parse, options.filters)], budget)
        tars = self.index.tars
        for source, part in zip(sources, self.index.parts, strict=True):
            if not part:
                raise UserError(f"{public(source)} has no train split; give data that has one")
        window = options.window or (_REMOTE_WINDOW if any(map(is_url, sources)) else len(tars))
        self.window = int(min(window, len(tars)))
        # The numbers of the tars that are shuffled together: of all sources, or of each that has a weight.
        self.streams = self.index.parts if len(weights) > 1 else [range(len(tars))]
        self.weights = np.array(weights) / sum(weights)
        if not options.samples_per_epoch and any(tar.spans is None for tar in tars):
            raise UserError(
                "the number of samples in remote tars is unknown; give --data.shards.samples_per_epoch"
            )
        self.samples = int(options.samples_per_epoch or sum(map(self.index.count, range(len(tars)))))
        if not self.samples:
            names = ", ".join(sorted(self.index.fields))
            raise UserError(f"no sample passes --data.shards.filters; the samples have the fields {names}")
        # The digest is of what chooses samples and captions, as far as it is known without reading tars.
        known = [weights, [*map(len, self.streams)], [*options.captions.items()], [*options.filters]]
        known.append([tar.sha256 or storage.known(tar.url) for tar in tars])
        self.digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def held_out(self, split: str) -> list[CaptionedImage]:
        """Return the images of `val` or `test` as files with all their captions, if a source has any."""
        source = self.options.val if split == "val" else None
        source = source or next((name for name, has in self.index.splits.items() if split in has), None)
        return [] if source is None else held_out(source, split, self.options.captions)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Samples:
        """Return the samples of these (epoch, sample); a broken sample is replaced by the next usable one."""
        broken: dict[str, str] = {}
        images, captions, records = zip(*(self._sample(*key, broken) for key in keys), strict=True)
        counts = np.full(len(keys), self.captions_per_image)
        # A hash of the encoded image is equal for copies in all tars.
        hashes = b"".join(hashlib.blake2b(record.image, digest_size=8).digest() for record in records)
        return Samples(
            images=[*images],
            image_id=np.frombuffer(hashes, ">i8").astype(np.int64),
            counts=counts,
            captions=[*chain(*captions)],
            caption_rows=np.full(counts.sum(), -1),  # captions in tars are not numbered
            broken=broken,
            names=[record.name for record in records],
        )

    def _sample(self, epoch: int, sample: int, broken: dict[str, str]) -> tuple[Tensor, list[str], Record]:
        rng = np.random.default_rng((self.seed, epoch, sample))
        for _ in range(MOST_BROKEN_IN_A_ROW):
            record = self.index.read(sample)
            try:
                texts = draw_captions(record.fields, self.options.captions, self.captions_per_image, rng)
                pixels = augment(decode_bytes(record.image), self.transform, self.augmentation, rng)
                return pixels, texts, record
            except (BrokenImage, BrokenRecord) as error:
                broken[record.name] = str(error)
                sample = self.index.after(sample)
        raise UserError(
            f"{MOST_BROKEN_IN_A_ROW} consecutive samples cannot be used (last {record.name}: "
            f"{broken[record.name]}); check the tars and --data.shards.captions"
        )


class ShardSampler(TrainSampler):
    """Shuffled (epoch, sample) pairs for one rank, in repeated passes over the tars.

    Each pass shuffles the tars, and then the samples within windows of `window` tars. An epoch consists of
    the next `samples` samples.
    """

    def __init__(self, dataset: ShardDataset, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset.samples, batch_size, seed=dataset.seed, rank=rank, world_size=world_size)
        self.data, self.index = dataset, dataset.index

    def order(self, epoch: int, skip: int) -> Iterator[int]:
        """Mix the streams in blocks with a fixed number of samples per stream."""
        counts = np.diff(np.round(_BLOCK * np.cumsum(self.data.weights)).astype(int), prepend=0)

        def mixed(block: int) -> np.ndarray:
            streams = np.repeat(np.arange(len(counts)), counts)
            return np.random.default_rng((self.seed, block)).permutation(streams)

        number, first = divmod(epoch * self.size + skip, _BLOCK)
        done = number * counts + np.bincount(mixed(number)[:first], minlength=len(counts))
        streams = [*map(self._stream, range(len(counts)), done.tolist())]
        for block in count(number):
            for stream in mixed(block)[first:].tolist():
                yield next(streams[stream])
            first = 0

    def _stream(self, stream: int, skip: int) -> Iterator[int]:
        """Yield the samples of a stream in repeated passes, without the first `skip`."""
        empty = 0
        for (seeds, now), (_, coming) in pairwise(self._windows(stream)):
            size = sum(map(self.index.count, now))
            empty = 0 if size else empty + len(now)
            if empty >= 2 * len(self.data.streams[stream]):  # at least one complete pass
                raise UserError("a source has no usable sample that passes --data.shards.filters")
            if size > skip:
                Thread(target=self.index.fetch, args=(coming,), daemon=True).start()
                rng = np.random.default_rng(seeds)
                # The numbers have no name, so that only their permutation stays in memory.
                order = rng.permutation(np.concatenate([*map(self.index.samples, now)]))
                yield from map(int, order[skip:])
            skip = max(0, skip - size)

    def _windows(self, stream: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Yield the tars whose samples are shuffled together, with the seeds of the permutation."""
        for number in count():
            seeds = (self.seed, stream, number)
            tars = np.random.default_rng(seeds).permutation(self.data.streams[stream]).tolist()
            for first in range(0, len(tars), self.data.window):
                yield (*seeds, first), tars[first : first + self.data.window]


def held_out(source: str, split: str, fields: Mapping[str, float]) -> list[CaptionedImage]:
    """Return the images for `val` or `test`, with all captions that could be drawn in training.

    Images in tars are written once to the cache folder, as a data set of files. If the source has splits,
    only this split is used, otherwise everything.
    """
    if not holds_tars(source) and find(source) is None:
        data = read_captions(Path(source))
        return [image for image in data.images if not data.has_official_splits or image.split == split]
    index = Index([source], split)
    if not index.tars:
        return []
    known = json.dumps([[tar.key for tar in index.tars], [*fields.items()]])
    folder = cache_folder("shards") / f"{split}-{hashlib.sha256(known.encode()).hexdigest()[:32]}"
    if not folder.exists():
        with whole_folder(folder) as draft, (draft / "captions.jsonl").open("w") as file:
            (draft / "images").mkdir()
            for number, record in enumerate(index.records()):
                try:
                    captions = [*chain(*captions_of(record.fields, fields).values())]
                    name = f"images/{number:08d}.{record.suffix()}"
                except (BrokenImage, BrokenRecord) as error:
                    index.broken[record.name] = str(error)
                    continue
                (draft / name).write_bytes(record.image)
                file.write(json.dumps({"image": name, "captions": captions}) + "\n")
            if not file.tell():
                name, reason = next(iter(index.broken.items()))
                raise UserError(f"{public(source)} has no usable sample for {split} (first {name}: {reason})")
    return list(read_captions(folder).images)
