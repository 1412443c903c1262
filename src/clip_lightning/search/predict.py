"""Embedding by Lightning's `Trainer.predict`: batches that stay within a shard, ranks that own whole shards.

B rows of a batch, D width of the embeddings.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip_lightning.data.images import BrokenImage, ImageTransform, decode_image
from clip_lightning.model.clip import CLIP
from clip_lightning.model.towers import Tokenize
from clip_lightning.search.embeddings import Store
from clip_lightning.search.plan import Plan, Shard

Batch = dict[str, Any]
"""`shard` (position), `last` of the shard or not, number `read`, `rows` that could be, `broken`, and what the
tower takes."""


class ShardBatches(Dataset[Batch]):
    """Whole batches as items: the rows of each shard in turn, so that no batch holds rows of two.

    Attributes:
        rows: in all batches.
    """

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[tuple[int, Shard]],
        transform: ImageTransform,
        tokenize: Tokenize,
        size: int,
    ) -> None:
        """Batches of `size` rows of these (position, shard)."""
        self.rows = sum(len(shard.rows) for _, shard in shards)
        self._plan, self._transform, self._tokenize = plan, transform, tokenize
        self._batches = [
            (position, shard, shard.rows[start : start + size])
            for position, shard in shards
            for start in range(0, len(shard.rows), size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        position, shard, rows = self._batches[index]
        about = {"shard": position, "last": rows.stop == shard.rows.stop, "read": len(rows)}
        if shard.kind == "captions":
            tokens = self._tokenize([self._plan.captions[row][1] for row in rows])
            return {**about, "rows": list(rows), "broken": {}, **tokens}
        good: list[int] = []
        pictures: list[Tensor] = []
        broken: dict[str, str] = {}
        for row in rows:
            path = self._plan.images[row][0]
            try:
                pictures.append(self._transform(decode_image(Path(path))).permute(1, 2, 0))
                good.append(row)
            except BrokenImage as error:
                broken[path] = str(error)
        # channels last, as the decoders left them
        pixels = {"pixel_values": torch.stack(pictures).permute(0, 3, 1, 2)} if pictures else {}
        return {**about, "rows": good, "broken": broken, **pixels}


class ShardData(LightningDataModule):
    """Gives each rank the unfinished shards that are its own: shard s is of rank s % world."""

    # a rank may have nothing left to do
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self, store: Store, done: Sequence[str], clip: CLIP, batch_size: int, num_workers: int
    ) -> None:
        """Leave out the shards named by `done`."""
        super().__init__()
        self._store, self._done, self._clip = store, set(done), clip
        self._batch_size, self._num_workers = batch_size, num_workers

    def predict_dataloader(self) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        shards = [
            (position, shard)
            for position, shard in enumerate(self._store.plan.shards())
            if position % world == rank and shard.name not in self._done
        ]
        dataset = ShardBatches(
            self._store.plan, shards, self._clip.transform, self._clip.tokenize, self._batch_size
        )
        collate: Any = _as_it_is  # its type is for batches that are lists
        return DataLoader(
            dataset,
            batch_size=None,  # items are batches
            num_workers=min(self._num_workers, len(dataset)),
            collate_fn=collate,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )


class Embedder(LightningModule):
    """Embeds batches and writes each shard once its last batch is there."""

    def __init__(self, clip: CLIP, store: Store) -> None:
        """Use this model for this folder."""
        super().__init__()
        self.clip, self._store = clip, store
        self._shards = store.plan.shards()
        self._rows: list[int] = []
        self._vectors: list[np.ndarray] = []
        self._broken: dict[str, str] = {}
        self._bar: Any = None

    def on_predict_start(self) -> None:
        if self.trainer.is_global_zero:
            loader: Any = self.trainer.predict_dataloaders
            self._bar = tqdm(
                total=loader.dataset.rows, desc="rows of this process", unit="row", mininterval=1
            )

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Unit-length embeddings (B, D) of the rows that could be read, none perhaps."""
        if "input_ids" in batch:
            return self.clip.encode_text(batch["input_ids"], batch["attention_mask"])
        if "pixel_values" in batch:
            return self.clip.encode_image(batch["pixel_values"])
        return torch.empty(0, self._store.plan.width)

    def on_predict_batch_end(self, outputs: Tensor, batch: Batch, *_: Any) -> None:
        """Keep the rows of the shard in hand, and write it when its last are there."""
        self._vectors.append(outputs.float().cpu().numpy())
        self._rows += batch["rows"]
        self._broken |= batch["broken"]
        if self._bar is not None:
            self._bar.update(batch["read"])
        if batch["last"]:
            shard, vectors = self._shards[batch["shard"]], np.concatenate(self._vectors)
            self._store.write(shard, self._rows, vectors, self._broken)
            self._rows, self._vectors, self._broken = [], [], {}

    def on_predict_end(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _start_worker(worker_id: int) -> None:
    """Leave Ctrl-C to the main process, and one core to each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
