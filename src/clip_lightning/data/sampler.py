"""Which samples come in which batch on which rank: pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler, SequentialSampler

from clip_lightning.errors import UserError


class TrainSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs for one rank; the last partial global batch is dropped.

    The global batch b of an epoch is `permutation[b * B * W : (b + 1) * B * W]`, of which rank r takes its
    r-th slice of B: its members are the same for every number of ranks W with the same B * W.

    Attributes:
        start_batch: how many batches the next iteration skips, to go on in the middle of an epoch; the
            iteration that does so sets it back to 0.

    Raises:
        UserError: when not one global batch can be filled.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Sample from `size` indices, `batch_size` of them a batch on each of `world_size` ranks."""
        if size < batch_size * world_size:
            ranks = f" on each of {world_size} devices" if world_size > 1 else ""
            remedy = (
                f"lower --data.batch_size to at most {size // world_size}"
                if size >= world_size
                else "give more pictures to --data.root or lower --trainer.devices"
            )
            raise UserError(
                f"a batch of {batch_size}{ranks} is larger than the training set of {size} images; {remedy}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start_batch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The samples of a whole epoch on this rank, whatever `start_batch` is."""
        return self.batches * self.batch_size

    @property
    def batches(self) -> int:
        """Those of a whole epoch."""
        return self.size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield this rank's pairs, batch after batch."""
        epoch, start, self.start_batch = self.epoch, self.start_batch, 0
        size, first = self.batch_size * self.world_size, self.batch_size * self.rank
        order = self.order(epoch, start * size)
        for _ in range(start, self.batches):
            for index in list(islice(order, size))[first : first + self.batch_size]:
                yield epoch, index

    def order(self, epoch: int, skip: int) -> Iterator[int]:
        """Yield the indices of an epoch in its order, without the first `skip`."""
        return map(int, np.random.default_rng((self.seed, epoch)).permutation(self.size)[skip:])


class FirstEpoch(SequentialSampler):
    """The first epoch of another sampler in every epoch, for `--trainer.overfit_batches`.

    Lightning takes it for one without shuffling, and does not put its own in its place.
    """

    def __init__(self, sampler: Any) -> None:
        """Repeat `sampler`, which may be set to begin within an epoch."""
        self.sampler = sampler

    def __len__(self) -> int:
        """As many as the sampler itself."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """Yield what the sampler does in its first epoch."""
        self.sampler.set_epoch(0)
        return iter(self.sampler)


class EvalSampler(SequentialSampler):
    """Every index in order, dealt to the ranks in turn, wrapped so that all ranks have as many.

    The few that come twice are removed, by image id, where the embeddings are gathered.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1) -> None:
        """Deal `size` indices to `world_size` ranks."""
        self.size, self.rank, self.world_size = size, rank, world_size

    def __len__(self) -> int:
        """The number of indices of this rank, the same on all."""
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        """Yield rank, rank + world_size, ..."""
        for position in range(len(self)):
            yield (position * self.world_size + self.rank) % self.size
