"""Exact image-text retrieval from embeddings: ranks, R@k, median and mean rank, both ways.

Dimensions: I images, N captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_lightning.evaluation.metrics import DIRECTIONS, KS, MEASURES, recall_at

# Scores that differ by less than this are ties. They are computed in float64, whose rounding error (1e-16)
# is far smaller, so neither the chunk size nor the order of the rows can change a rank.
TIE = 1e-9


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a complete split, in its order, without those of samples that could not be read."""

    image: Tensor  # (I, D) float32, unit length
    text: Tensor  # (N, D) float32, unit length
    image_id: Tensor  # (I,) int64, position of each image in the split
    text_image_id: Tensor  # (N,) int64, the image that each caption belongs to
    text_id: Tensor  # (N,) int64, position of each caption among all captions of the split

    def to(self, device: torch.device) -> Embeddings:
        """Return them on a device."""
        return Embeddings(**{name: tensor.to(device) for name, tensor in vars(self).items()})


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
    both = retrieval_ranks(image, text, text_image_id, image_id=image_id, chunk_size=chunk_size)
    if not both[0].any():
        raise ValueError(
            "no caption belongs to any of the images; expected text_image_id to contain values of image_id"
        )
    others = {name: measure for name, measure in MEASURES.items() if not name.startswith("R@")}
    measures = {f"R@{k}": recall_at(k) for k in ks} | others
    metrics, rsum = dict[str, float](), 0.0
    for direction, all_ranks in zip(DIRECTIONS, both, strict=True):
        ranks = all_ranks[all_ranks > 0].double()
        metrics |= {f"{direction}_{name}": measure.of(ranks) for name, measure in measures.items()}
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

    owner = rows_of(text_image_id, image_id)
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


def fold_metrics(image: Tensor, text: Tensor, owner: Tensor, fold: int = 1000) -> dict[str, float]:
    """Compute the mean of `retrieval_metrics` over consecutive folds of images that are searched separately.

    Fewer candidates make the task easier: the metrics are not comparable with those of the complete split.
    `owner` (N,) is the row of each caption's image. An incomplete fold at the end is left out. Return the
    metrics as `fold1000_...`, or nothing if there are fewer than two folds.
    """
    folds = []
    for start in range(0, len(image) - fold + 1, fold) if len(image) >= 2 * fold else ():
        captions = (owner >= start) & (owner < start + fold)
        folds.append(retrieval_metrics(image[start : start + fold], text[captions], owner[captions] - start))
    names = folds[0] if folds else ()
    return {f"fold{fold}_{name}": fmean(metrics[name] for metrics in folds) for name in names}


def split_metrics(embeddings: Embeddings, prefixes: Iterable[int]) -> dict[str, float]:
    """Compute `retrieval_metrics` of a split, and R@1 and rsum with the first numbers of the embeddings.

    The latter are normalized again, and called `dims128_rsum` and so on for each of the prefixes.
    """

    def metrics_of(image: Tensor, text: Tensor) -> dict[str, float]:
        return retrieval_metrics(image, text, embeddings.text_image_id, image_id=embeddings.image_id)

    found = metrics_of(embeddings.image, embeddings.text)
    for dims in prefixes:
        shorter = (F.normalize(rows[:, :dims], dim=-1) for rows in (embeddings.image, embeddings.text))
        metrics = metrics_of(*shorter)
        found |= {f"dims{dims}_{name}": metrics[name] for name in (*(f"{d}_R@1" for d in DIRECTIONS), "rsum")}
    return found


def rows_of(wanted: Tensor, ids: Tensor) -> Tensor:
    """Return the position of each wanted id in `ids` (N,), or -1 if it is absent."""
    ordered, row = ids.sort()
    position = torch.searchsorted(ordered, wanted).clamp(max=len(ids) - 1)
    return row[position].where(ordered[position] == wanted, -1)


def _check(image: Tensor, text: Tensor, text_image_id: Tensor, image_id: Tensor, chunk_size: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in (image, text, text_image_id, image_id)]
    rows, captions, width = len(image), len(text), shapes[0][-1:]
    if shapes != [(rows, *width), (captions, *width), (captions,), (rows,)] or not rows or not captions:
        raise ValueError(
            "expected image (I, D), text (N, D), text_image_id (N,) and image_id (I,) with I and N above 0, "
            f"got {', '.join(map(str, shapes))}"
        )
    if len(image_id.unique()) < rows:
        raise ValueError("image_id contains an id twice; expected each image once")
    if chunk_size < 1:
        raise ValueError(f"expected a chunk_size of 1 or more, got {chunk_size}")
    check_finite({"image": image, "text": text})


def check_finite(embeddings: Mapping[str, Tensor]) -> None:
    """Refuse embeddings that are not finite."""
    for name, values in embeddings.items():
        if broken := int((~values.isfinite().all(1)).sum()):
            raise ValueError(f"{broken} of {len(values)} {name} embeddings contain NaN or infinity")


def part_of_split(image: Tensor, text: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return embeddings (B, D) and (N, D) with the ids of their batch, on the CPU."""
    part: dict[str, Tensor] = {"image": image, "text": text}
    part |= {name: batch[name] for name in ("image_id", "text_image_id", "text_id") if name in batch}
    return {name: tensor.cpu() for name, tensor in part.items()}


def join_parts(parts: list[dict[str, Tensor]], world_size: int) -> Embeddings | None:
    """Return one row per image and per caption, in the order of the split, or None if there are no parts.

    Samplers repeat images so that all ranks have the same number; the repetitions are dropped here. Without
    `text_id`, every text counts. All ranks must call this together, and all get the same result.
    """
    if world_size > 1:  # as objects, because their lengths may differ
        all_parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(all_parts, parts)
        parts = [part for rank in all_parts for part in rank]
    if not parts:
        return None
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    image_id, image_rows = distinct(joined["image_id"])
    text_id, text_rows = distinct(joined.get("text_id", torch.arange(len(joined["text"]))))
    owner = joined["text_image_id"][text_rows]
    return Embeddings(joined["image"][image_rows], joined["text"][text_rows], image_id, owner, text_id)


def distinct(ids: Tensor) -> list[Tensor]:
    """Return the distinct ids in ascending order, and the first row of each."""
    return [torch.from_numpy(found) for found in np.unique(ids.numpy(), return_index=True)]
