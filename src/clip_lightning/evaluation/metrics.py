"""The metrics that every validation computes and logs. This module does not import torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A metric that every validation logs, with its title in tables and the direction that is better."""

    title: str
    best: Literal["max", "min"]


@dataclass(frozen=True)
class Measure(Metric):
    """A metric of one direction; `of` computes it from the ranks (Q,) of all queries, float64 from 1."""

    of: Callable[[Tensor], float]


def recall_at(k: int) -> Measure:
    """Return R@k: the percentage of queries with a right answer among the first k."""
    return Measure(f"R@{k}", "max", lambda ranks: 100 * (ranks <= k).double().mean().item())


# To add a measure in both directions, add a line here: it is then logged, printed, compared and tuned.
KS = (1, 5, 10)
MEASURES: dict[str, Measure] = {
    **{f"R@{k}": recall_at(k) for k in KS},
    "median_rank": Measure("median rank", "min", lambda ranks: ranks.quantile(0.5).item()),
    "mean_rank": Measure("mean rank", "min", lambda ranks: ranks.mean().item()),
}
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}
METRICS: dict[str, Metric] = {
    "rsum": Metric("rsum", "max"),
    **{
        f"{direction}_{name}": Metric(f"{title} {measure.title}", measure.best)
        for direction, title in DIRECTIONS.items()
        for name, measure in MEASURES.items()
    },
}
