"""Exact image-text retrieval from embeddings: ranks, R@k, median and mean rank, both ways.

Dimensions: I images, N captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_lightning.evaluation.metrics import DIRECTIONS, KS, MEASURES, recall_at

# Scores that differ by less than this are ties. They are computed in float64, whose rounding error (1e-16)
# is far smaller, so neither the chunk size nor the order of the rows can change a rank.
TIE = 1e-9


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a complete split, in any order, without those of samples that could not be read.

    Attributes:
        image: (I, D) float32, unit length.
        text: (N, D) float32, unit length.
        image_id: (I,) int64, position of each image in the split.
        text_image_id: (N,) int64, the image that each caption belongs to.
        text_id: (N,) int64, position of each caption among all captions of the split.
    """

    image: Tensor
    text: Tensor
    image_id: Tensor
    text_image_id: Tensor
    text_id: Tensor


@torch.no_grad()
def retrieval_metrics(
    image: Tensor,
    text: Tensor,
    text_image_id: Tensor,
    *,
    image_id: Tensor | None = None,
    ks: Sequence[int] = KS,
    chunk_size: int = 256,
) -> dict[str, float]:
    """Compute retrieval metrics as in the VSE++ and CLIP papers; ties count against the model.

    The right answer to a caption is its image, and to an image any of its captions. The rank of a query is
    1 + the number of wrong items that score at least as high as the best right one. An image without captions
    and a caption whose image is absent are candidates, but not queries.

    Args:
        image: (I, D) embeddings.
        text: (N, D) embeddings.
        text_image_id: (N,) id of each caption's image.
        image_id: (I,) distinct ids of the images; by default, 0 ... I-1.
        ks: the values of k in R@k.
        chunk_size: number of images scored at a time. Memory grows with chunk_size × N, and
            results do not change.

    Returns:
        Each of `MEASURES` for `text_to_image` and `image_to_text`: `_R@k` in percent, `_median_rank` and
        `_mean_rank` (from 1); and `rsum`, the sum of R@1, R@5 and R@10 in both directions (0-600).

    Raises:
        ValueError: shapes do not match, values are not finite, ids are repeated, or no caption has its image.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"expected positive numbers as ks, got {tuple(ks)}")
    text_rank, image_rank = retrieval_ranks(
        image, text, text_image_id, image_id=image_id, chunk_size=chunk_size
    )
    if not text_rank.any():
        raise ValueError(
            "no caption belongs to any of the images; expected text_image_id to contain values of image_id"
        )
    measures = MEASURES | {f"R@{k}": recall_at(k) for k in ks}
    wanted = [name for name in measures if not name.startswith("R@") or int(name[2:]) in ks]
    metrics: dict[str, float] = {}
    rsum = 0.0
    for direction, all_ranks in zip(DIRECTIONS, (text_rank, image_rank), strict=True):
        ranks = all_ranks[all_ranks > 0].double()
        metrics |= {f"{direction}_{name}": measures[name].of(ranks) for name in wanted}
        rsum += sum(recall_at(k).of(ranks) for k in (1, 5, 10))
    return metrics | {"rsum": rsum}


@torch.no_grad()
def retrieval_ranks(
    image: Tensor,
    text: Tensor,
    text_image_id: Tensor,
    *,
    image_id: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Return the rank of each caption's image (N,) and of each image's best caption (I,), int64 from 1.

    The rank is 0 if there is no right answer. Arguments, ties and errors are those of `retrieval_metrics`.
    """
    if image_id is None:
        image_id = torch.arange(len(image), device=image.device)
    _check(image, text, text_image_id, image_id, chunk_size)
    if image.device.type == "mps":  # no float64 there
        image, text, text_image_id, image_id = (t.cpu() for t in (image, text, text_image_id, image_id))
    image, text = image.double(), text.double()

    owner = _rows_of(text_image_id, image_id)
    known = owner >= 0
    # No score reaches infinity, so that a query without a right answer has rank 0.
    right = torch.einsum("nd,nd->n", image[owner.clamp(min=0)], text).where(known, torch.inf)
    best = right.new_full((len(image),), -torch.inf).scatter_reduce(0, owner[known], right[known], "amax")
    best = best.where(best.isfinite(), torch.inf)
    tied_right = known & (right >= best[owner] - TIE)

    text_rank = torch.zeros(len(text), dtype=torch.int64, device=text.device)
    image_rank = torch.zeros(len(image), dtype=torch.int64, device=text.device)
    for start in range(0, len(image), chunk_size):
        rows = slice(start, start + chunk_size)
        scores = image[rows] @ text.T
        text_rank += (scores >= right - TIE).sum(0)  # from 1: it counts the right image
        image_rank[rows] = (scores >= best[rows, None] - TIE).sum(1)
    image_rank += best.isfinite().long() - torch.bincount(owner[tied_right], minlength=len(image))
    return text_rank, image_rank


@torch.no_grad()
def true_recall(
    image: Tensor, text: Tensor, owner: Tensor, *, ks: Sequence[int] = (1, 5, 10), chunk_size: int = 64
) -> dict[str, float]:
    """Compute the mean over images of (own captions among the k best) / (own captions).

    With c captions per image, it cannot exceed k / c. R@k, as computed by `retrieval_metrics`, is a hit rate
    instead: one of the captions among the k best is enough. With one caption per image, and therefore for
    text→image, the two are the same.

    Args:
        image: (I, D) embeddings.
        text: (N, D) embeddings.
        owner: (N,) row of each caption's image.
        ks: the values of k in recall@k.
        chunk_size: number of images scored at a time; results do not change.

    Returns:
        `image_to_text_true_recall@k` in percent, over the images that have captions. Ties count against the
        model.
    """
    image, text = image.double(), text.double()
    totals = torch.zeros(len(ks), dtype=torch.float64)
    counts = torch.bincount(owner, minlength=len(image))
    own = owner.argsort(stable=True).split(counts.tolist())
    for start in range(0, len(image), chunk_size):
        scores = image[start : start + chunk_size] @ text.T
        for row, captions in zip(scores, own[start : start + chunk_size], strict=True):
            if not len(captions):
                continue
            best = row[captions].sort(descending=True).values
            row[captions] = -torch.inf
            wrong = (row >= best[:, None] - TIE).sum(1)
            rank = wrong + torch.arange(1, len(captions) + 1, device=row.device)
            totals += torch.stack([(rank <= k).double().mean() for k in ks]).cpu()
    queries = int((counts > 0).sum())
    return {f"image_to_text_true_recall@{k}": 100 * totals[i].item() / queries for i, k in enumerate(ks)}


def fold_metrics(image: Tensor, text: Tensor, owner: Tensor, fold: int = 1000) -> dict[str, float]:
    """Compute the mean of `retrieval_metrics` over consecutive folds that are searched separately.

    Fewer candidates make the task easier: the metrics are not comparable with those of the complete split.

    Args:
        image: (I, D) embeddings, in the order of the split.
        text: (N, D) embeddings.
        owner: (N,) row of each caption's image.
        fold: number of images per fold; an incomplete fold at the end is left out.

    Returns:
        The metrics as `fold1000_...`, or nothing if there are fewer than two folds.
    """
    folds = len(image) // fold
    if folds < 2:
        return {}
    totals: dict[str, float] = {}
    for start in range(0, folds * fold, fold):
        captions = (owner >= start) & (owner < start + fold)
        metrics = retrieval_metrics(image[start : start + fold], text[captions], owner[captions] - start)
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value / folds
    return {f"fold{fold}_{name}": value for name, value in totals.items()}


def _rows_of(wanted: Tensor, ids: Tensor) -> Tensor:
    """Return the position of each wanted id in `ids` (N,), or -1 if it is absent."""
    ordered, row = ids.sort()
    position = torch.searchsorted(ordered, wanted).clamp(max=len(ids) - 1)
    return row[position].where(ordered[position] == wanted, -1)


def _check(image: Tensor, text: Tensor, text_image_id: Tensor, image_id: Tensor, chunk_size: int) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(
            f"expected image (I, D) and text (N, D), got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if not len(image) or not len(text):
        raise ValueError(f"expected images and captions, got {len(image)} images and {len(text)} captions")
    if text_image_id.shape != text.shape[:1] or image_id.shape != image.shape[:1]:
        raise ValueError(
            f"expected one id per row, got text_image_id {tuple(text_image_id.shape)} for {len(text)} "
            f"captions and image_id {tuple(image_id.shape)} for {len(image)} images"
        )
    if len(image_id.unique()) < len(image_id):
        raise ValueError("image_id contains an id twice; expected each image once")
    for name, values in (("image", image), ("text", text)):
        broken = (~values.isfinite().all(1)).sum().item()
        if broken:
            raise ValueError(f"{broken} of {len(values)} {name} embeddings contain NaN or infinity")
    if chunk_size < 1:
        raise ValueError(f"expected a chunk_size of 1 or more, got {chunk_size}")


Part = dict[str, Tensor]


class EmbeddingCollector:
    """Collects the embeddings of each batch, and joins those of all ranks at the end."""

    def __init__(self) -> None:
        self._parts: list[Part] = []

    def clear(self) -> None:
        """Discard the embeddings of an interrupted pass."""
        self._parts = []

    def add(self, image: Tensor, text: Tensor, batch: dict[str, Any]) -> None:
        """Add embeddings (B, D) and (N, D) of a batch with its `image_id`, `text_image_id` and `text_id`.

        Without `text_id`, every text of a batch counts.
        """
        names = ("image_id", "text_image_id", *(["text_id"] if "text_id" in batch else []))
        ids = {name: batch[name] for name in names}
        part = {"image": image, "text": text, **ids}
        self._parts.append({name: tensor.cpu() for name, tensor in part.items()})

    def join(self, world_size: int) -> Embeddings | None:
        """Return one row per image and per caption, in the order of the split, or None if nothing was added.

        Samplers repeat images so that all ranks have the same number; the repetitions are dropped here. All
        ranks must call this together, and all get the same result.
        """
        parts, self._parts = self._parts, []
        if world_size > 1:  # as objects, because their lengths may differ
            all_parts: list[list[Part]] = [[] for _ in range(world_size)]
            torch.distributed.all_gather_object(all_parts, parts)
            parts = [part for rank in all_parts for part in rank]
        if not parts:
            return None
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        image_id, image_rows = _first_rows(joined["image_id"])
        text_id, text_rows = _first_rows(joined.get("text_id", torch.arange(len(joined["text"]))))
        return Embeddings(
            image=joined["image"][image_rows],
            text=joined["text"][text_rows],
            image_id=image_id,
            text_image_id=joined["text_image_id"][text_rows],
            text_id=text_id,
        )


def _first_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ids (K,) in ascending order, and the first row of each."""
    unique, inverse = torch.unique(ids, sorted=True, return_inverse=True)
    rows = torch.full((len(unique),), len(ids), dtype=torch.long)
    rows.scatter_reduce_(0, inverse, torch.arange(len(ids)), reduce="amin")
    return unique, rows
