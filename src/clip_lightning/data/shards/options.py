"""`--data.shards.*`: what is read, how it is mixed, what is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.data.images import Augmentation, ImageTransform
from clip_lightning.errors import UserError


@dataclass(frozen=True)
class ShardOptions:
    """Training from shards, with `--data.dataset shards`.

    Attributes:
        sources: folders, URLs (s3://, gs://, hf://, https://) or patterns of tars, DIR/{00000..00099}.tar; or
            each of them with its weight. In place of --data.root.
        captions: fields that captions are taken from, with probabilities: {txt: 0.5, synthetic: 0.5}; by
            default the first there is of captions, txt and caption.
        filters: conditions on a sample's fields: 'width >= 200', 'similarity > 0.28'.
        samples_per_epoch: of tars; by default as many as `shards.json` or img2dataset's *_stats.json say.
        val: captioned pictures or shards to validate on; by default the split `val` beside `train`.
        shuffle_buffer: samples that each worker mixes, of tars.
        window: chunks that are read at a time, of litdata; their samples are shuffled among each other.
    """

    sources: Mapping[str, float] | Sequence[str] | None = None
    captions: Mapping[str, float] = field(default_factory=dict)
    filters: Sequence[str] = ()
    samples_per_epoch: int | None = None
    val: str | None = None
    shuffle_buffer: int = 1000
    window: int = 16

    def __post_init__(self) -> None:
        """Check the ranges."""
        filters = [self.filters] if isinstance(self.filters, str) else self.filters
        object.__setattr__(self, "filters", tuple(filters))  # to compare with others: YAML has lists
        if isinstance(self.sources, str):
            object.__setattr__(self, "sources", [self.sources])
        counts = {
            "samples_per_epoch": self.samples_per_epoch,
            "shuffle_buffer": self.shuffle_buffer,
            "window": self.window,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise UserError(f"--data.shards.{name} {value}: expected 1 or more")
        for source, weight in self.weights(None).items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"--data.shards.sources gives {source} {weight}; expected a weight above 0")

    def weights(self, root: Path | str | None) -> dict[str, float]:
        """Each source with its weight; that of `root` where no sources are named."""
        if isinstance(self.sources, Mapping):
            return dict(self.sources)
        named = [str(root)] if root is not None and not self.sources else [*(self.sources or ())]
        return dict.fromkeys(named, 1.0)


@dataclass(frozen=True)
class Reading:
    """What decides on a sample, beside the shards.

    Attributes:
        transform: the image tower's.
        augmentation: what is left to chance in a picture.
        captions_per_image: captions drawn of each picture.
        batch_size: pictures per rank and step.
        seed: of the order, the captions and the augmentation.
        rank: of this process, of
        world_size: processes.
    """

    transform: ImageTransform
    augmentation: Augmentation
    captions_per_image: int
    batch_size: int
    seed: int
    rank: int
    world_size: int


class TrainingSource(Protocol):
    """What the data module asks of shards.

    Attributes:
        digest: of what is known of them.
        chunked: whether a loader's keys are of samples; of whole batches otherwise.
        samples: of an epoch.
    """

    digest: str
    chunked: bool

    @property
    def samples(self) -> int: ...

    def loading(self, reading: Reading) -> tuple[Any, Any]:
        """The samples, and the sampler of their keys."""

    def held_out(self, split: str) -> list[CaptionedImage]:
        """The pictures of `val` or `test`."""


def training_shards(options: ShardOptions, root: Path | str) -> TrainingSource:
    """The shards that training reads.

    Raises:
        UserError: they cannot be read, or what reads them is not installed.
    """
    try:
        from clip_lightning.data.shards.training import TrainingShards
    except ModuleNotFoundError as error:
        raise UserError(
            f"--data.dataset shards needs {error.name}; pip install 'clip-lightning[shards]'"
        ) from error
    return TrainingShards(options, root)
