"""True recall of image→text: the share of an image's captions that is found, where R@k asks for any of them.

Dimensions: I images, N captions, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_lightning.evaluation.retrieval import TIE


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
