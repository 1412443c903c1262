"""Diagnostics of the embeddings of a complete split: similarities, recall at every k, the worst misses.

Dimensions: I images, N captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_lightning.evaluation.predictions import different_images
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks, rows_of

BINS = 200
MOST_IMAGES, MOST_TEXTS = 1000, 5000  # sampled for the unmatched pairs
MOST_K = 100


@dataclass(frozen=True)
class Similarities:
    """Histograms of the cosines of captions with their own images (matched) and with others (unmatched)."""

    matched: Tensor  # (BINS,) int64, counts in equal bins from -1 to 1
    unmatched: Tensor
    matched_mean: float  # NaN if there are no pairs
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
    spaced, so that time and memory are bounded and every epoch counts the same pairs. `content` has the group
    of byte-identical images that each image of the split belongs to: a caption and a copy of its image are
    neither a matched nor an unmatched pair.
    """
    image, text = embeddings.image, embeddings.text
    owner = rows_of(embeddings.text_image_id, embeddings.image_id)
    known = owner >= 0
    matched = (image[owner[known]] * text[known]).sum(1)

    group = torch.as_tensor(content, dtype=torch.long)
    images, texts = _spaced(len(image), MOST_IMAGES), _spaced(len(text), MOST_TEXTS)
    different = group[embeddings.image_id[images], None] != group[embeddings.text_image_id[texts]]
    unmatched = (image[images] @ text[texts].T)[different]
    # rounding may put a cosine slightly outside -1 to 1
    of_matched, of_others = (torch.histc(part.clamp(-1, 1), BINS, -1, 1) for part in (matched, unmatched))
    means = matched.double().mean().item(), unmatched.double().mean().item()
    return Similarities(of_matched.long(), of_others.long(), *means)


def recall_curve(ranks: Tensor, most: int = MOST_K) -> Tensor:
    """Return R@1 ... R@most in percent (most,) of ranks from 1; ranks of 0 are not counted."""
    queries = ranks[ranks > 0]
    hits = torch.bincount(queries, minlength=most + 1)[1 : most + 1].cumsum(0)
    return 100 * hits.double() / len(queries)


def worst_queries(embeddings: Embeddings, content: Sequence[int], count: int) -> list[int]:
    """Return the ids of the captions whose images rank worst in the complete split, the worst first.

    At most `count` captions are returned, at most one per image, and none whose image has rank 1.
    Byte-identical images, as in `similarities`, count as one.
    """
    candidates = different_images(embeddings, content)
    groups = torch.as_tensor(content, dtype=torch.long)[embeddings.text_image_id]
    image_id = torch.tensor(list(candidates))
    ranks, _ = retrieval_ranks(
        embeddings.image[list(candidates.values())], embeddings.text, groups, image_id=image_id
    )
    worst: dict[int, int] = {}  # group → id of the caption
    for row in (-ranks).argsort(stable=True).tolist():
        if len(worst) == count or ranks[row] <= 1:
            break
        worst.setdefault(int(groups[row]), int(embeddings.text_id[row]))
    return list(worst.values())


def _spaced(length: int, most: int) -> Tensor:
    """Return at most `most` evenly spaced integers below `length`."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.float64).round().long()
