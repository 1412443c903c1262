"""Training from tars: the options, the samples, the order that they come in, and what is held out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from threading import Thread

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.datasets import MOST_BROKEN_IN_A_ROW, Samples
from clip_lightning.data.formats import read_captions
from clip_lightning.data.images import Augmentation, BrokenImage, ImageTransform, augment, decode_bytes
from clip_lightning.data.sampler import TrainSampler
from clip_lightning.data.shards import storage
from clip_lightning.data.shards.index import Index
from clip_lightning.data.shards.manifest import find
from clip_lightning.data.shards.record import BrokenRecord, CaptionChoice, Filter, Record
from clip_lightning.data.shards.storage import holds_tars, is_url
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, whole_folder
from clip_lightning.terminal import public

_REMOTE_WINDOW = 16
_BLOCK = 1 << 16


@dataclass(frozen=True)
class ShardOptions:
    """Training from tars, with `--data.dataset shards`.

    Attributes:
        sources: folders, URLs (s3://, gs://, hf://, https://) or patterns of tars, DIR/{00000..00099}.tar,
            in place of --data.root; or each of them with its weight, in proportion to which samples are
            taken from it.
        captions: fields that captions are taken from, with probabilities: {txt: 0.5, synthetic: 0.5}; by
            default the first of captions, txt and caption that a sample has.
        filters: conditions on a sample's fields: 'width >= 200', 'similarity > 0.28'.
        samples_per_epoch: by default every sample once; needed for remote tars without a NAME_stats.json.
        val: captioned images or tars to validate on; by default the split `val` beside `train`.
        window: tars whose samples are shuffled among each other; by default all if they are on this machine,
            else 16.
    """

    sources: Mapping[str, float] | Sequence[str] | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    filters: Sequence[str] = ()
    samples_per_epoch: int | None = None
    val: str | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        filters = [self.filters] if isinstance(self.filters, str) else self.filters
        object.__setattr__(self, "filters", tuple(filters))  # to compare with others: YAML has lists
        if isinstance(self.sources, str):
            object.__setattr__(self, "sources", [self.sources])
        for name in ("samples_per_epoch", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--data.shards.{name} {value}: expected 1 or more")
        for source, weight in (self.sources if isinstance(self.sources, Mapping) else {}).items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"--data.shards.sources gives {public(source)} {weight}; expected above 0")


class ShardDataset(Dataset[Samples]):
    """Images out of tars with K captions of their own: pure functions of (seed, epoch, sample).

    Attributes:
        index: the tars and their samples.
        streams: the numbers of tars whose samples are shuffled together: all, or one stream per source if the
            sources have weights.
        weights: the fraction of the samples that comes from each stream.
        window: the number of tars of a stream whose samples are shuffled among each other.
        samples: the number of samples of an epoch.
        digest: SHA-256 (hex) of the options that choose samples and captions, and of what is known of the
            tars without reading them.
    """

    def __init__(
        self,
        options: ShardOptions,
        root: Path | str,
        transform: ImageTransform,
        augmentation: Augmentation,
        *,
        captions_per_image: int = 1,
        seed: int = 0,
        budget: float = 50e9,
    ) -> None:
        """Look for the tars, or raise UserError; of remote ones, copies of `budget` bytes are kept."""
        self.transform, self.augmentation = transform, augmentation
        self.captions_per_image, self.seed = captions_per_image, seed
        self.options, self.choice = options, CaptionChoice(options.captions)
        sources = [*(options.sources or [str(root)])]
        weights = [*options.sources.values()] if isinstance(options.sources, Mapping) else [1.0]
        window = options.window or (_REMOTE_WINDOW if any(map(is_url, sources)) else 0)
        filters = [Filter.parse(text) for text in options.filters]
        self.index = Index(sources, "train", filters, budget, recent=2 * len(weights) * window or 1)
        for source, part in zip(sources, self.index.parts, strict=True):
            if not part:
                raise UserError(f"{public(source)} has no train split; give data that has one")
        self.window = min(window or len(self.index.tars), len(self.index.tars))
        self.streams = self.index.parts if len(weights) > 1 else [range(len(self.index.tars))]
        self.weights = np.array(weights) / sum(weights)
        self.samples = options.samples_per_epoch or sum(tar.expected() for tar in self.index.tars)
        if not self.samples:
            names = ", ".join(sorted(self.index.fields))
            raise UserError(f"no sample passes --data.shards.filters; there are the fields {names}")
        known = [weights, [*map(len, self.streams)], [*options.captions.items()], options.filters]
        known.append([tar.sha256 or storage.known(tar.url) for tar in self.index.tars])
        self.digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def held_out(self, split: str) -> list[CaptionedImage]:
        """Return the images of `val` or `test`, as files with all their captions, if a source has any."""
        source = self.options.val if split == "val" else None
        source = source or next((name for name, has in self.index.splits.items() if split in has), None)
        return [] if source is None else held_out(source, split, self.choice)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Samples:
        """Return the samples of these (epoch, sample), and for a broken one the next that can be used.

        Raises:
            UserError: a hundred in a row are broken, or a tar cannot be read.
        """
        broken: dict[str, str] = {}
        samples = [self._sample(*each, broken) for each in keys]
        counts = np.full(len(keys), self.captions_per_image)
        return Samples(
            pictures=[pixels for pixels, _, _ in samples],
            image_id=np.array([record.image_id for _, _, record in samples]),
            counts=counts,
            captions=[text for _, texts, _ in samples for text in texts],
            caption_rows=np.full(int(counts.sum()), -1),  # nobody has counted the captions
            broken=broken,
            names=[record.name for _, _, record in samples],
        )

    def _sample(self, epoch: int, sample: int, broken: dict[str, str]) -> tuple[Tensor, list[str], Record]:
        rng = np.random.default_rng((self.seed, epoch, sample))
        for _ in range(MOST_BROKEN_IN_A_ROW):
            record = self.index.read(sample)
            try:
                texts = self.choice.draw(record.fields, self.captions_per_image, rng)
                pixels = augment(decode_bytes(record.image), self.transform, self.augmentation, rng)
                return pixels, texts, record
            except (BrokenImage, BrokenRecord) as error:
                broken[record.name] = str(error)
                sample = self.index.after(sample)
        raise UserError(
            f"{MOST_BROKEN_IN_A_ROW} samples in a row cannot be used, the last is {record.name}: "
            f"{broken[record.name]}; look at the tars, and at --data.shards.captions"
        )


class ShardSampler(TrainSampler):
    """Shuffled (epoch, sample) pairs for one rank, pass after pass over the tars.

    In each pass the tars come in another order, and the samples of `window` tars are shuffled among each
    other. An epoch is the next `samples` of these. Batches have the same members for every number of ranks
    and of workers, as those of `TrainSampler`.
    """

    def __init__(self, dataset: ShardDataset, batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Sample from tars; arguments as for `TrainSampler`."""
        super().__init__(dataset.samples, batch_size, seed=dataset.seed, rank=rank, world_size=world_size)
        self.dataset, self.index = dataset, dataset.index

    def order(self, epoch: int, skip: int) -> Iterator[int]:
        """Mix the streams, in blocks that each hold the same number of samples of a stream."""
        number, first = divmod(epoch * self.size + skip, _BLOCK)
        counts = np.diff(np.round(_BLOCK * np.cumsum(self.dataset.weights)).astype(int), prepend=0)
        streams: list[Iterator[int]] = []
        for block in count(number):
            mixed = np.repeat(np.arange(len(counts)), counts)
            np.random.default_rng((self.seed, block)).shuffle(mixed)
            if not streams:
                done = block * counts + np.bincount(mixed[:first], minlength=len(counts))
                streams = [*map(self._stream, range(len(counts)), done.tolist())]
            for stream in mixed[first:].tolist():
                yield next(streams[stream])
            first = 0

    def _stream(self, stream: int, skip: int) -> Iterator[int]:
        """Yield the samples of a stream, pass after pass, without the first `skip`."""
        empty = 0
        for (seeds, now), (_, coming) in pairwise(self._windows(stream)):
            size = sum(map(self.index.count, now))
            empty = 0 if size else empty + len(now)
            if empty >= 2 * len(self.dataset.streams[stream]):  # a whole pass, wherever it began
                raise UserError("a source has no sample that can be used and passes --data.shards.filters")
            if skip >= size:
                skip -= size
                continue
            self.index.fetch(now)
            Thread(target=self._fetch_ahead, args=(coming,), daemon=True).start()
            samples = np.concatenate([*map(self.index.samples, now)])
            yield from map(int, np.random.default_rng(seeds).permutation(samples)[skip:])
            skip = 0

    def _windows(self, stream: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Yield the tars whose samples are shuffled among each other, with the seeds of their order."""
        for number in count():
            seeds = (self.seed, stream, number)
            tars = np.random.default_rng(seeds).permutation(self.dataset.streams[stream]).tolist()
            for first in range(0, len(tars), self.dataset.window):
                yield (*seeds, first), tars[first : first + self.dataset.window]

    def _fetch_ahead(self, tars: list[int]) -> None:
        with contextlib.suppress(Exception):  # raised again when these tars are wanted
            self.index.fetch(tars)


def held_out(source: str, split: str, choice: CaptionChoice) -> list[CaptionedImage]:
    """Return the images for `val` or `test`, with all captions that might be drawn in training.

    Those of tars are written once as files into the cache folder: a data set like any other. Of a source that
    has splits, this one is taken, else everything.

    Raises:
        UserError: the source cannot be read, or holds no sample.
    """
    if not holds_tars(source) and find(source) is None:
        found = read_captions(Path(source))
        return [image for image in found.images if not found.has_official_splits or image.split == split]
    index = Index([source], split)
    if not index.tars:
        return []
    known = json.dumps([[tar.key for tar in index.tars], [*choice.probabilities.items()]])
    folder = cache_folder("shards") / f"{split}-{hashlib.sha256(known.encode()).hexdigest()[:32]}"
    if not folder.exists():
        with whole_folder(folder) as draft, (draft / "captions.jsonl").open("w") as file:
            (draft / "images").mkdir()
            for number, record in enumerate(index.records()):
                try:
                    captions = choice.all(record.fields)
                    name = f"images/{number:08d}.{record.suffix()}"
                except BrokenRecord as error:
                    index.broken[record.name] = str(error)
                    continue
                (draft / name).write_bytes(record.image)
                file.write(json.dumps({"image": name, "captions": captions}) + "\n")
            if not file.tell():
                name, reason = next(iter(index.broken.items()), ("there is none", ""))
                raise UserError(f"{public(source)} holds no sample to validate on ({name}: {reason})")
    return list(read_captions(folder).images)
