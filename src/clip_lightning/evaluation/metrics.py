"""The metrics that every validation computes and logs. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Measure(NamedTuple):
    """A metric of one direction; `of` computes it from the ranks (Q,) of all queries, float64 from 1."""

    title: str  # in tables
    of: Callable[[Tensor], float]


def recall_at(k: int) -> Measure:
    """Return R@k: the percentage of queries with a right answer among the first k."""
    return Measure(f"R@{k}", lambda ranks: 100 * (ranks <= k).double().mean().item())


# To add a measure in both directions, add a line here: it is then logged, printed, compared and tuned.
KS = (1, 5, 10)
MEASURES: dict[str, Measure] = {
    **{f"R@{k}": recall_at(k) for k in KS},
    "median_rank": Measure("median rank", lambda ranks: ranks.quantile(0.5).item()),
    "mean_rank": Measure("mean rank", lambda ranks: ranks.mean().item()),
}
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
METRICS = {"rsum": "rsum"} | {
    f"{direction}_{name}": f"{title} {measure.title}"
    for direction, title in DIRECTIONS.items()
    for name, measure in MEASURES.items()
}
"""The titles of all metrics by their names."""
RECALLS = [f"{direction}_R@{k}" for direction in DIRECTIONS for k in KS]
BEST = dict.fromkeys(RECALLS, 100.0) | {"rsum": 100.0 * len(RECALLS)}
"""The best possible values of the recalls and of their sum."""
