"""Assign samples to batches and ranks, as pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler, SequentialSampler

from clip_lightning.errors import UserError


class TrainSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs for one rank; the last partial global batch is dropped.

    The global batch b of an epoch is `permutation[b * B * W : (b + 1) * B * W]`, of which rank r takes the
    r-th slice of B samples. So its members are the same for every number of ranks W with the same B * W.

    Attributes:
        start_batch: number of batches that the next iteration skips, to resume in the middle of an epoch;
            this iteration resets it to 0.

    Raises:
        UserError: there are too few samples for one global batch.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Sample from `size` indices, with `batch_size` per batch on each of `world_size` ranks."""
        if size < batch_size * world_size:
            ranks = f" on each of {world_size} devices" if world_size > 1 else ""
            remedy = (
                f"reduce --data.batch_size to at most {size // world_size}"
                if size >= world_size
                else "use data with more images, or reduce --trainer.devices"
            )
            raise UserError(
                f"a batch of {batch_size}{ranks} is larger than the training set of {size} images; {remedy}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples of a complete epoch on this rank, regardless of `start_batch`."""
        return self.batches * self.batch_size

    @property
    def batches(self) -> int:
        """The number of batches of a complete epoch."""
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield this rank's pairs, batch by batch."""
        epoch, start, self.start_batch = self.epoch, self.start_batch, 0
        size, first = self.batch_size * self.world_size, self.batch_size * self.rank
        order = self.order(epoch, start * size)
        for _ in range(start, self.batches):
            for index in list(islice(order, size))[first : first + self.batch_size]:
                yield epoch, index

    def order(self, epoch: int, skip: int) -> Iterator[int]:
        """Yield the indices of an epoch in order, without the first `skip`."""
        return map(int, np.random.default_rng((self.seed, epoch)).permutation(self.size)[skip:])


class FirstEpoch(SequentialSampler):
    """Repeats the first epoch of another sampler, for `--trainer.overfit_batches`.

    It is a SequentialSampler so that Lightning does not replace it.
    """

    def __init__(self, sampler: Any) -> None:
        """Repeat `sampler`, which may start in the middle of an epoch."""
        self.sampler = sampler

    def __len__(self) -> int:
        """Return the length of the sampler."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of the first epoch."""
        self.sampler.set_epoch(0)
        return iter(self.sampler)


class EvalSampler(SequentialSampler):
    """Yields all indices in order, distributed to the ranks in turn, so that all ranks have equally many.

    The few duplicates at the end are removed by image id when the embeddings are gathered.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Distribute `size` indices to `world_size` ranks."""
        self.size, self.rank, self.world_size = size, rank, world_size

    def __len__(self) -> int:
        """Return the number of indices per rank."""
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        """Yield rank, rank + world_size, ..."""
        for position in range(len(self)):
            yield (position * self.world_size + self.rank) % self.size
