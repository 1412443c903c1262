"""Exact image-text retrieval from embeddings: ranks, R@k, median and mean rank, both ways.

Dimensions: I images, N captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lightning.evaluation.metrics import DIRECTIONS, KS, MEASURES, recall_at

# Scores closer than this are ties. They are computed in float64, whose rounding (1e-16) is far below it:
# how BLAS orders its sums, and so the chunk size and the order of the rows, cannot change a rank.
TIE = 1e-9


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of a whole split, in any order; what could not be read is simply absent.

    Attributes:
        image: (I, D) float32, unit length.
        text: (N, D) float32, unit length.
        image_id: (I,) int64, position of each picture in the split.
        text_image_id: (N,) int64, the picture that each caption belongs to.
        text_id: (N,) int64, row of each caption among all captions of the split.
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
    """Retrieval as the VSE++ and CLIP papers count it, by inner product, with ties against the model.

    A caption is answered by its own image, an image by any of its captions; `rank` is 1 + the number of
    wrong items that score at least as high as the best right one. An image without captions and a caption
    whose image is absent are candidates but ask nothing themselves.

    Args:
        image: (I, D) embeddings.
        text: (N, D) embeddings.
        text_image_id: (N,) the id of the image that each caption belongs to.
        image_id: (I,) the distinct ids of the images; 0 ... I-1 by default.
        ks: the k of R@k.
        chunk_size: images scored at a time; memory grows with chunk_size × N, the result stays the same.

    Returns:
        For `text_to_image` and `image_to_text` each of `MEASURES`: `_R@k` in percent, `_median_rank` and
        `_mean_rank` (from 1); and `rsum`, the sum of R@1, R@5 and R@10 in both directions (0-600).

    Raises:
        ValueError: wrong shapes, values that are not finite, repeated ids, or no caption with its image.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive numbers, got {tuple(ks)}")
    text_rank, image_rank = retrieval_ranks(
        image, text, text_image_id, image_id=image_id, chunk_size=chunk_size
    )
    if not text_rank.any():
        raise ValueError(
            "none of the captions belongs to any of the images: text_image_id and image_id disagree"
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
    """Rank of each caption's image (N,) and of each image's best caption (I,), int64 from 1.

    The rank is 0 where there is nothing to find. Arguments, ties and errors as in `retrieval_metrics`.
    """
    if image_id is None:
        image_id = torch.arange(len(image), device=image.device)
    _check(image, text, text_image_id, image_id, chunk_size)
    if image.device.type == "mps":  # no float64 there
        image, text, text_image_id, image_id = (t.cpu() for t in (image, text, text_image_id, image_id))
    image, text = image.double(), text.double()

    owner = _rows_of(text_image_id, image_id)
    known = owner >= 0
    # An infinite bar is never reached: whoever asks nothing ends up with rank 0.
    right = torch.einsum("nd,nd->n", image[owner.clamp(min=0)], text).where(known, torch.inf)
    best = right.new_full((len(image),), -torch.inf).scatter_reduce(0, owner[known], right[known], "amax")
    best = best.where(best.isfinite(), torch.inf)
    tied_right = known & (right >= best[owner] - TIE)

    text_rank = torch.zeros(len(text), dtype=torch.int64, device=text.device)
    image_rank = torch.zeros(len(image), dtype=torch.int64, device=text.device)
    for start in range(0, len(image), chunk_size):
        rows = slice(start, start + chunk_size)
        scores = image[rows] @ text.T
        text_rank += (scores >= right - TIE).sum(0)  # its own image counts itself: the 1 of the rank
        image_rank[rows] = (scores >= best[rows, None] - TIE).sum(1)
    image_rank += best.isfinite().long() - torch.bincount(owner[tied_right], minlength=len(image))
    return text_rank, image_rank


@torch.no_grad()
def true_recall(
    image: Tensor, text: Tensor, owner: Tensor, *, ks: Sequence[int] = (1, 5, 10), chunk_size: int = 64
) -> dict[str, float]:
    """The mean over images of (own captions among the k best) / (own captions).

    With c captions an image it cannot exceed k / c. R@k, as `retrieval_metrics` counts it, is a hit rate:
    an image counts as soon as one of its captions is there. With one caption an image, and so for
    text→image, the two are the same.

    Args:
        image: (I, D) embeddings.
        text: (N, D) embeddings.
        owner: (N,) the row of each caption's image.
        ks: the k of recall@k.
        chunk_size: images scored at a time; the result stays the same.

    Returns:
        `image_to_text_true_recall@k` in percent, over the images that have captions. Ties count against the
        model.
    """
    image, text = image.double(), text.double()
    found = torch.zeros(len(ks), dtype=torch.float64)
    counts = torch.bincount(owner, minlength=len(image))
    own = owner.argsort(stable=True).split(counts.tolist())
    for start in range(0, len(image), chunk_size):
        scores = image[start : start + chunk_size] @ text.T
        for row, mine in zip(scores, own[start : start + chunk_size], strict=True):
            if not len(mine):
                continue
            best = row[mine].sort(descending=True).values
            row[mine] = -torch.inf
            wrong = (row >= best[:, None] - TIE).sum(1)
            rank = wrong + torch.arange(1, len(mine) + 1, device=row.device)
            found += torch.stack([(rank <= k).double().mean() for k in ks]).cpu()
    asked = int((counts > 0).sum())
    return {f"image_to_text_true_recall@{k}": 100 * found[i].item() / asked for i, k in enumerate(ks)}


def fold_metrics(image: Tensor, text: Tensor, owner: Tensor, fold: int = 1000) -> dict[str, float]:
    """The mean of `retrieval_metrics` over consecutive folds, each searched by itself, as `fold1000_...`.

    Fewer candidates are an easier task: these figures are not comparable with those of the whole split.

    Args:
        image: (I, D) embeddings, in the order of the split.
        text: (N, D) embeddings.
        owner: (N,) the row of each caption's image.
        fold: images in a fold; what is left over at the end belongs to none.

    Returns:
        Nothing where there are not two folds.
    """
    folds = len(image) // fold
    if folds < 2:
        return {}
    totals: dict[str, float] = {}
    for start in range(0, folds * fold, fold):
        mine = (owner >= start) & (owner < start + fold)
        found = retrieval_metrics(image[start : start + fold], text[mine], owner[mine] - start)
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + value / folds
    return {f"fold{fold}_{name}": value for name, value in totals.items()}


def _rows_of(wanted: Tensor, ids: Tensor) -> Tensor:
    """(N,) position of each wanted id in `ids`, -1 where it is absent."""
    ordered, row = ids.sort()
    position = torch.searchsorted(ordered, wanted).clamp(max=len(ids) - 1)
    return row[position].where(ordered[position] == wanted, -1)


def _check(image: Tensor, text: Tensor, text_image_id: Tensor, image_id: Tensor, chunk_size: int) -> None:
    if image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(
            f"expected image (I, D) and text (N, D), got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if not len(image) or not len(text):
        raise ValueError(f"nothing to retrieve: {len(image)} images, {len(text)} captions")
    if text_image_id.shape != text.shape[:1] or image_id.shape != image.shape[:1]:
        raise ValueError(
            f"expected one id a row, got text_image_id {tuple(text_image_id.shape)} for {len(text)} captions "
            f"and image_id {tuple(image_id.shape)} for {len(image)} images"
        )
    if len(image_id.unique()) < len(image_id):
        raise ValueError("image_id names an image twice: gather every image once")
    for name, values in (("image", image), ("text", text)):
        broken = (~values.isfinite().all(1)).sum().item()
        if broken:
            raise ValueError(f"{broken} of {len(values)} {name} embeddings hold NaN or infinity")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
