"""Retrieval within folds of a fixed number of images, as MS-COCO's "1k" figures are counted."""

from __future__ import annotations

from torch import Tensor

from clip_lightning.evaluation.retrieval import retrieval_metrics


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
