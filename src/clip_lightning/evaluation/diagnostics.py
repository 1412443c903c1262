"""Diagnostics of the embeddings of a complete split: similarities, recall at every k, the worst misses.

Dimensions: I images, N captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lightning.evaluation.predictions import different_images
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks

BINS = 200
MOST_IMAGES, MOST_TEXTS = 1000, 5000  # sampled for the unmatched pairs
CHUNK = 256
MOST_K = 100


@dataclass(frozen=True)
class Similarities:
    """Histograms of the cosines of matched and unmatched pairs, with `BINS` equal bins from -1 to 1.

    Attributes:
        matched: (BINS,) int64, counts of captions paired with their own images.
        unmatched: (BINS,) int64, counts of captions paired with other images.
        matched_mean: mean cosine of the matched pairs, or NaN if there are none.
        unmatched_mean: mean cosine of the unmatched pairs, or NaN if there are none.
    """

    matched: Tensor
    unmatched: Tensor
    matched_mean: float
    unmatched_mean: float

    @property
    def edges(self) -> Tensor:
        """Edges of the bins (BINS + 1,)."""
        return torch.arange(BINS + 1, dtype=torch.float64) / (BINS / 2) - 1

    @property
    def separation(self) -> float:
        """Percentage of comparisons in which a matched pair is more similar than an unmatched pair.

        This is the area under the ROC curve: 50 is chance, 100 is perfect. Pairs in the same bin count half.
        """
        below = self.unmatched.cumsum(0) - self.unmatched / 2
        pairs = self.matched.sum() * self.unmatched.sum()
        return (100 * (self.matched * below).sum() / pairs).item()


def similarities(embeddings: Embeddings, content: Sequence[int]) -> Similarities:
    """Count the cosines of all matched pairs and of a sample of unmatched pairs.

    The unmatched pairs combine at most `MOST_IMAGES` images with at most `MOST_TEXTS` captions, evenly
    spaced, so that time and memory are bounded and every epoch counts the same pairs. A caption and a
    byte-identical copy of its image are neither a matched nor an unmatched pair.

    Args:
        embeddings: embeddings of the split, in any order; images and captions may be missing.
        content: group of byte-identical images that each image of the split belongs to.

    Raises:
        ValueError: an embedding contains NaN or infinity.
    """
    image, text = embeddings.image.cpu().float(), embeddings.text.cpu().float()
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ValueError("the embeddings contain NaN or infinity")
    row = {image_id: number for number, image_id in enumerate(embeddings.image_id.tolist())}
    image_ids = embeddings.text_image_id.tolist()
    owner = torch.tensor([row.get(image_id, -1) for image_id in image_ids], dtype=torch.long)
    known = (owner >= 0).nonzero().flatten()
    matched = torch.cat(
        [(image[owner[part]] * text[part]).sum(1) for part in known.split(4096)] or [image[:0, 0]]
    )

    group = torch.as_tensor(content, dtype=torch.long)
    image_rows, text_rows = _spaced(len(image), MOST_IMAGES), _spaced(len(text), MOST_TEXTS)
    image_group = group[embeddings.image_id.cpu()][image_rows]
    text_group = group[embeddings.text_image_id.cpu()][text_rows]
    text = text[text_rows]
    counts, total, pairs = torch.zeros(BINS, dtype=torch.int64), 0.0, 0
    for rows, groups in zip(image_rows.split(CHUNK), image_group.split(CHUNK), strict=True):
        cosines = (image[rows] @ text.T)[groups[:, None] != text_group]
        counts += _histogram(cosines)
        total += cosines.sum(dtype=torch.float64).item()
        pairs += len(cosines)
    return Similarities(
        _histogram(matched), counts, matched.double().mean().item(), total / pairs if pairs else float("nan")
    )


def recall_curve(ranks: Tensor, most: int = MOST_K) -> Tensor:
    """Return R@1 ... R@most in percent (most,) of ranks from 1; ranks of 0 are not counted."""
    queries = ranks[ranks > 0]
    hits = torch.bincount(queries, minlength=most + 1)[1 : most + 1].cumsum(0)
    return 100 * hits.double() / len(queries)


def worst_queries(embeddings: Embeddings, content: Sequence[int], count: int) -> list[int]:
    """Return the rows of the captions whose images rank worst in the complete split, the worst first.

    At most one caption per image is returned, and none whose image has rank 1. Byte-identical images count as
    one.

    Args:
        embeddings: embeddings of the split, in any order; images and captions may be missing.
        content: group of byte-identical images that each image of the split belongs to.
        count: maximum number of rows.

    Raises:
        ValueError: an embedding contains NaN or infinity.
    """
    candidates = different_images(embeddings, content)
    groups = torch.as_tensor(content, dtype=torch.long)[embeddings.text_image_id.cpu()]
    ranks, _ = retrieval_ranks(
        embeddings.image[list(candidates.values())].cpu(),
        embeddings.text.cpu(),
        groups,
        image_id=torch.tensor(list(candidates)),
    )
    misses = sorted(zip((-ranks).tolist(), embeddings.text_id.tolist(), groups.tolist(), strict=True))
    worst: dict[int, int] = {}  # group → caption row
    for rank, text_id, group in misses:
        if len(worst) >= count or rank >= -1:
            break
        worst.setdefault(group, text_id)
    return list(worst.values())


def _spaced(length: int, most: int) -> Tensor:
    """Return at most `most` evenly spaced integers below `length`."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.float64).round().long()


def _histogram(cosines: Tensor) -> Tensor:
    """Return the histogram (BINS,) of cosines, which rounding may put slightly outside -1 to 1."""
    return torch.histc(cosines.clamp(-1, 1), BINS, min=-1, max=1).long()
