"""What the embeddings of a whole split say of a model: similarities, recall at every k, the worst misses.

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
MOST_IMAGES, MOST_TEXTS = 1000, 5000  # whose pairs stand for all unmatched ones
CHUNK = 256
MOST_K = 100


@dataclass(frozen=True)
class Similarities:
    """Cosines of matched and unmatched pairs, counted in `BINS` equal bins from -1 to 1.

    Attributes:
        matched: (BINS,) int64, each caption with its own picture.
        unmatched: (BINS,) int64, captions with other pictures.
        matched_mean: mean cosine of the matched pairs; NaN where there are none, as the next.
        unmatched_mean: mean cosine of the unmatched pairs.
    """

    matched: Tensor
    unmatched: Tensor
    matched_mean: float
    unmatched_mean: float

    @property
    def edges(self) -> Tensor:
        """(BINS + 1,) the borders of the bins."""
        return torch.arange(BINS + 1, dtype=torch.float64) / (BINS / 2) - 1

    @property
    def separation(self) -> float:
        """How often, in percent, a matched pair is more similar than an unmatched one.

        50 is chance, 100 perfect (the area under the ROC curve); equal bins count half.
        """
        below = self.unmatched.cumsum(0) - self.unmatched / 2
        pairs = self.matched.sum() * self.unmatched.sum()
        return (100 * (self.matched * below).sum() / pairs).item()


def similarities(embeddings: Embeddings, content: Sequence[int]) -> Similarities:
    """Count the cosines of all matched pairs and of the unmatched ones.

    The unmatched pairs are those of at most `MOST_IMAGES` pictures with at most `MOST_TEXTS` captions,
    evenly spaced, so that time and memory stay bounded and the same pairs are counted in every epoch. A
    caption and a byte-identical twin of its picture are no pair of either kind.

    Args:
        embeddings: of the split, in any order, pictures and captions possibly missing.
        content: for each picture of the split, the group of byte-identical pictures it is in.

    Raises:
        ValueError: an embedding holds NaN or infinity.
    """
    image, text = embeddings.image.cpu().float(), embeddings.text.cpu().float()
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ValueError("the embeddings hold NaN or infinity")
    row = {image_id: number for number, image_id in enumerate(embeddings.image_id.tolist())}
    owner = torch.tensor([row.get(each, -1) for each in embeddings.text_image_id.tolist()], dtype=torch.long)
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
        counts += _counted(cosines)
        total += cosines.sum(dtype=torch.float64).item()
        pairs += len(cosines)
    return Similarities(
        _counted(matched), counts, matched.double().mean().item(), total / pairs if pairs else float("nan")
    )


def recall_curve(ranks: Tensor, most: int = MOST_K) -> Tensor:
    """(most,) R@1 ... R@most in percent, of the ranks from 1; a rank of 0 asked nothing."""
    asked = ranks[ranks > 0]
    found = torch.bincount(asked, minlength=most + 1)[1 : most + 1].cumsum(0)
    return 100 * found.double() / len(asked)


def worst_queries(embeddings: Embeddings, content: Sequence[int], count: int) -> list[int]:
    """Caption rows whose picture ranks worst in the whole split, the worst first, at most one a picture.

    Byte-identical pictures count as one, and what is found at once is no miss.

    Args:
        embeddings: of the split, in any order, pictures and captions possibly missing.
        content: for each picture of the split, the group of byte-identical pictures it is in.
        count: rows at most.

    Raises:
        ValueError: an embedding holds NaN or infinity.
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
    """At most `most` evenly spaced numbers below `length`."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.float64).round().long()


def _counted(cosines: Tensor) -> Tensor:
    """(BINS,) how many lie in each bin; rounding may put the cosine of a perfect pair above 1."""
    return torch.histc(cosines.clamp(-1, 1), BINS, min=-1, max=1).long()
