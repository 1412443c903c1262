"""How sure a figure is: Wilson's interval of a share, bootstrap intervals of recall, and of differences.

Dimensions: I images, N captions, R resamples, M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Z95 = 1.959963984540054
_RESAMPLED_AT_A_TIME = 4_000_000  # counts in memory: 32 MB


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval, in percent, of the share `right / total` (Wilson 1927).

    Raises:
        ValueError: there is nothing to take a share of, or more is right than there is.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"expected 0 <= right <= total and total >= 1, got {right} and {total}")
    share, spread = right / total, Z95**2 / total
    centre = share + spread / 2
    half = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


@dataclass(frozen=True)
class Hits:
    """What each image adds to the recalls of a split, so that images can be drawn again.

    Attributes:
        names: of the M metrics, R@k both ways.
        right: (I, M) queries of each image that were answered.
        asked: (I, M) queries of each image.
    """

    names: tuple[str, ...]
    right: np.ndarray
    asked: np.ndarray

    def recalls(self, counts: np.ndarray) -> np.ndarray:
        """(R, M + 1) in percent where image i is drawn `counts[:, i]` times, (R, I); rsum comes last."""
        weights = counts.astype(np.float64)
        found = 100 * (weights @ self.right) / (weights @ self.asked)
        return np.concatenate([found, found.sum(1, keepdims=True)], axis=1)


def hits(text_rank: Tensor, image_rank: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Hits:
    """Count the answered queries of each image.

    Args:
        text_rank: (N,) of `retrieval_ranks`; 0 where a caption asks nothing.
        image_rank: (I,) of `retrieval_ranks`.
        owner: (N,) the row of each caption's image; any row where the rank is 0.
        ks: the k of R@k.
    """
    text, image, rows = (tensor.cpu().numpy() for tensor in (text_rank, image_rank, owner))
    size = len(image)

    def per_image(asked: np.ndarray) -> np.ndarray:
        return np.bincount(rows[asked], minlength=size).astype(np.float64)

    right = [per_image((text > 0) & (text <= k)) for k in ks]
    right += [((image > 0) & (image <= k)).astype(np.float64) for k in ks]
    asked = [per_image(text > 0)] * len(ks) + [(image > 0).astype(np.float64)] * len(ks)
    names = tuple(f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in ks)
    return Hits(names, np.stack(right, 1), np.stack(asked, 1))


def bootstrap_intervals(
    found: Hits, *, resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of R@k and rsum, over images drawn with replacement (Efron).

    Images and their captions are drawn as queries; what they are searched among stays the whole split,
    else a picture drawn twice would tie with itself.
    """
    drawn = np.concatenate([found.recalls(counts) for counts in _draws(found, resamples, seed)])
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    names = (*found.names, "rsum")
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def paired_bootstrap(
    one: Hits, other: Hits, *, resamples: int = 1000, seed: int = 0
) -> Mapping[str, tuple[float, float, float, float]]:
    """How much better `one` is than `other`, both scored on the same draws of the same images.

    Returns:
        metric → difference, the ends of its 95 % interval, and the two-sided p of no difference (at least
        2 / (resamples + 1), since so many draws cannot show less).

    Raises:
        ValueError: the two do not have the same images and captions.
    """
    if one.names != other.names or not np.array_equal(one.asked, other.asked):
        raise ValueError("a paired test needs the same images and captions on both sides")
    whole = np.ones((1, len(one.right)))
    observed = (one.recalls(whole) - other.recalls(whole))[0]
    drawn = np.concatenate(
        [one.recalls(counts) - other.recalls(counts) for counts in _draws(one, resamples, seed)]
    )
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    tails = np.minimum((drawn <= 0).sum(0), (drawn >= 0).sum(0))
    p = np.minimum(2 * (tails + 1) / (len(drawn) + 1), 1.0)
    names = (*one.names, "rsum")
    return {
        name: (float(observed[i]), float(low[i]), float(high[i]), float(p[i])) for i, name in enumerate(names)
    }


def _draws(found: Hits, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (R, I) in parts; the same for the same seed and number of images."""
    rng = np.random.default_rng(seed)
    size = len(found.right)
    step = max(_RESAMPLED_AT_A_TIME // size, 1)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        counts = np.zeros((rows, size), np.int32)
        np.add.at(counts, (np.arange(rows)[:, None], rng.integers(size, size=(rows, size))), 1)
        yield counts
