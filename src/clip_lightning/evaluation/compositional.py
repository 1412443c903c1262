"""Scores compositional understanding. E entries, M images per entry (1 or 2), D embedding width."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from clip_lightning.evaluation.intervals import accuracy
from clip_lightning.evaluation.retrieval import TIE


def compositional_metrics(image: Tensor, text: Tensor, categories: Sequence[str]) -> dict[str, float]:
    """Score entries with embeddings (E, M, D) and (E, 2, D), in all and by category; ties count as wrong.

    With one image, it must be more similar to its first caption (`accuracy`; Hsieh et al. 2023, SugarCrepe).
    With two images, each must be more similar to its caption than to the other (`text_score`), or each
    caption to its image (`image_score`), or both (`group_score`; Thrush et al. 2022, Winoground).

    Return percentages with Wilson's intervals, and the mean accuracy of the categories.
    """
    similarity = torch.einsum("emd,ecd->emc", image.double(), text.double())
    matched = similarity.diagonal(dim1=1, dim2=2)  # (E, M)
    swapped = similarity.flip(2).diagonal(dim1=1, dim2=2)  # of each image with the other caption
    right = {"accuracy": (matched > swapped + TIE).all(1)}
    if image.shape[1] == 2:
        right = {"text_score": right["accuracy"], "image_score": (matched > swapped.flip(1) + TIE).all(1)}
        right["group_score"] = right["text_score"] & right["image_score"]
    metrics: dict[str, float] = {}
    for name, values in right.items():
        metrics |= accuracy(name, int(values.sum()), len(values))
        for category in dict.fromkeys(categories):
            part = values[[own == category for own in categories]]
            metrics |= accuracy(f"{category}_{name}", int(part.sum()), len(part))
    if "accuracy" in metrics:
        metrics["mean_accuracy"] = fmean(metrics[f"{category}_accuracy"] for category in set(categories))
    return metrics
