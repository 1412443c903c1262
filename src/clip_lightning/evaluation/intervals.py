"""Computes 95 % confidence intervals of fractions, recalls, and differences between two models.

Dimensions: I images, N captions, M metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np
from torch import Tensor

from clip_lightning.evaluation.metrics import BEST, KS

Z95 = 1.959963984540054


def wilson(right: float, total: float) -> tuple[float, float]:
    """Return the 95 % interval, in percent, of the fraction `right / total` (Wilson 1927)."""
    fraction, spread = right / total, Z95**2 / total
    center = fraction + spread / 2
    half = Z95 * math.sqrt(fraction * (1 - fraction) / total + Z95**2 / (4 * total**2))
    low, high = (center - half) / (1 + spread), (center + half) / (1 + spread)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def accuracy(name: str, right: int, total: int) -> dict[str, float]:
    """Return an accuracy in percent as `NAME`, with its interval as `NAME_low` and `NAME_high`."""
    low, high = wilson(right, total)
    return {name: 100 * right / total, f"{name}_low": low, f"{name}_high": high}


@dataclass(frozen=True)
class Hits:
    """The contribution of each image to the recalls of a split, the M metrics of `BEST` except rsum."""

    right: np.ndarray  # (I, M) number of correctly answered queries of each image
    asked: np.ndarray  # (I, M) number of queries of each image

    def per_image(self, counts: np.ndarray) -> np.ndarray:
        """Divide `right` or `asked` by the mean number of queries per image, and append the mean."""
        parts = counts / self.asked.mean(0)
        return np.column_stack([parts, parts.mean(1)])


def hits(text_rank: Tensor, image_rank: Tensor, owner: Tensor) -> Hits:
    """Count the queries of each image, and those that were answered correctly.

    The ranks (N,) and (I,) are those of `retrieval_ranks`; `owner` (N,) is the row of each caption's image.
    """
    text, image, rows = (tensor.cpu().numpy() for tensor in (text_rank, image_rank, owner))
    per_image = partial(np.bincount, minlength=len(image))
    right: list[np.ndarray] = [per_image(rows[(text > 0) & (text <= k)]) for k in KS]
    right += [(image > 0) & (image <= k) for k in KS]
    asked: list[np.ndarray] = [per_image(rows[text > 0])] * len(KS) + [image > 0] * len(KS)
    return Hits(np.stack(right, 1).astype(float), np.stack(asked, 1).astype(float))


def recall_intervals(hits: Hits) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of R@k and rsum whose coverage also holds near 0 and 100 %.

    The captions of an image are not independent. Each interval is therefore Wilson's for the number of
    independent queries whose mean would have the variance observed over images. If all images are equal, that
    variance is zero: two additional images with every query answered and two with none (Agresti and Coull
    1998) then make that number the number of images. For one query per image, the interval is exactly
    Wilson's.
    """
    right, asked = hits.per_image(hits.right), hits.per_image(hits.asked)
    images = len(right)
    mean = (right.sum(0) + 2) / (images + 4)
    squares = np.square(right - mean * asked).sum(0) + 2 * np.square(mean) + 2 * np.square(1 - mean)
    queries = images * (images + 4) * mean * (1 - mean) / squares
    recalls = np.minimum(right.mean(0), 1.0)
    bounds = [wilson(recall * count, count) for recall, count in zip(recalls, queries, strict=True)]
    return {
        name: (low * best / 100, high * best / 100)
        for (name, best), (low, high) in zip(BEST.items(), bounds, strict=True)
    }


def paired_differences(one: Hits, other: Hits) -> dict[str, tuple[float, ...]]:
    """Return, for each metric, the difference of two models, its 95 % interval, and the two-sided p-value.

    The interval and the p-value assume that the mean of the images' differences is normally distributed. Two
    images are added, each answered by only one of the models (Bonett and Price 2012), because agreement on a
    few images does not show that two models are equal.
    """
    if not np.array_equal(one.asked, other.asked):
        raise ValueError("the two models have different images or captions; expected the same for both")
    gain, asked = one.per_image(one.right - other.right), one.per_image(one.asked)
    count = len(gain) + 2
    mean = gain.sum(0) / count
    squares = np.square(gain - mean * asked).sum(0) + np.square(1 - mean) + np.square(1 + mean)
    error = np.sqrt(squares) / count
    p = [2 * NormalDist().cdf(-z) for z in np.abs(mean) / error]
    scale = np.array([*BEST.values()])
    low, high = (scale * np.clip(mean + sign * Z95 * error, -1, 1) for sign in (-1, 1))
    table = np.stack([scale * gain.mean(0), low, high, p], 1)
    return {name: tuple(row) for name, row in zip(BEST, table.tolist(), strict=True)}
