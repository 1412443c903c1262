"""From what each rank has embedded of a split to the embeddings of the whole of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_lightning.evaluation.retrieval import Embeddings

Part = dict[str, Tensor]


class EmbeddingCollector:
    """Keeps the embeddings of batch after batch, and joins those of all ranks at the end."""

    def __init__(self) -> None:
        self._parts: list[Part] = []

    def clear(self) -> None:
        """Forget what an interrupted pass has left."""
        self._parts = []

    def add(self, image: Tensor, text: Tensor, batch: dict[str, Any]) -> None:
        """Keep embeddings (B, D) and (N, D) of a batch, with its `image_id`, `text_image_id`, `text_id`."""
        ids = {name: batch[name] for name in ("image_id", "text_image_id", "text_id")}
        part = {"image": image, "text": text, **ids}
        self._parts.append({name: tensor.cpu() for name, tensor in part.items()})

    def join(self, world_size: int) -> Embeddings | None:
        """One row for each picture and each caption, in the order of the split; None where there are none.

        Samplers pad the ranks to equal length by repeating pictures; the repeats are dropped here, so that
        nothing counts twice. All ranks call this together, and all have the same afterwards.
        """
        parts, self._parts = self._parts, []
        if world_size > 1:  # they may differ in length, so each travels as an object
            everyone: list[list[Part]] = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(everyone, parts)
            parts = [part for rank in everyone for part in rank]
        if not parts:
            return None
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        image_id, image_rows = _first_of_each(joined["image_id"])
        text_id, text_rows = _first_of_each(joined["text_id"])
        return Embeddings(
            image=joined["image"][image_rows],
            text=joined["text"][text_rows],
            image_id=image_id,
            text_image_id=joined["text_image_id"][text_rows],
            text_id=text_id,
        )


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids (K,) in ascending order, and for each the first row that has it."""
    unique, inverse = torch.unique(ids, sorted=True, return_inverse=True)
    rows = torch.full((len(unique),), len(ids), dtype=torch.long)
    rows.scatter_reduce_(0, inverse, torch.arange(len(ids)), reduce="amin")
    return unique, rows
