"""Assign samples to batches and ranks, as pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from clip_lightning.errors import UserError


class TrainSampler(DistributedSampler[Any], SequentialSampler):
    """Shuffled (epoch, index) pairs for one rank; the last partial global batch is dropped.

    The global batch b of an epoch is `permutation[b * B * W : (b + 1) * B * W]`, of which rank r takes the
    r-th slice of B samples. So its members are the same for every number of ranks W with the same B * W.
    Lightning replaces only samplers of other classes, for several ranks and to overfit batches.

    Attributes:
        epoch: the epoch of the next iteration, which Lightning sets.
        repeats: whether every epoch repeats the first one, for `--trainer.overfit_batches`.
        start_batch: number of batches that the next iteration skips, to resume in the middle of an epoch;
            this iteration resets it to 0.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if size < batch_size * world_size:
            raise UserError(
                f"a global batch of {batch_size} × {world_size} images is larger than the training set of "
                f"{size} images; reduce --data.batch_size or --trainer.devices"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.repeats, self.start_batch = 0, False, 0

    def __len__(self) -> int:
        """Return the number of samples of a complete epoch on this rank, regardless of `start_batch`."""
        return self.batches * self.batch_size

    @property
    def batches(self) -> int:
        """The number of batches of a complete epoch."""
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's pairs, batch by batch."""
        epoch, start, self.start_batch = 0 if self.repeats else self.epoch, self.start_batch, 0
        size, first = self.batch_size * self.world_size, self.batch_size * self.rank
        order = self.order(epoch, start * size)
        for _ in range(start, self.batches):
            for index in list(islice(order, size))[first : first + self.batch_size]:
                yield epoch, index

    def order(self, epoch: int, skip: int) -> Iterator[int]:
        """Yield the indices of an epoch in order, without the first `skip`."""
        return map(int, np.random.default_rng((self.seed, epoch)).permutation(self.size)[skip:])


class EvalSampler(DistributedSampler[Any], SequentialSampler):
    """Yields all indices in order, distributed to the ranks in turn, so that all ranks have equally many.

    The few duplicates at the end are removed by image id when the embeddings are gathered.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.rank, self.world_size = size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        for position in range(len(self)):
            yield (position * self.world_size + self.rank) % self.size
