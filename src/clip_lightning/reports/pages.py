"""Renders predictions as a self-contained HTML page."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import jinja2

from clip_lightning.evaluation.predictions import Query
from clip_lightning.files import write_atomically
from clip_lightning.reports.grids import MOST_KEPT, thumbnail
from clip_lightning.reports.plots import Plot

SHOWN = 6  # queries of each kind above the fold
Ranks = Mapping[int, Mapping[str, int]]
"""Epoch → id of a query, as a string → rank."""


@dataclass(frozen=True)
class Report:
    """The predictions of an epoch.

    Attributes:
        epoch: number of the epoch.
        captions: fixed captions and the images retrieved for them.
        caption_ranks: ranks of the captions in all epochs so far, including this one.
        images: fixed images and the captions retrieved for them.
        image_ranks: ranks of the images in all epochs so far, including this one.
        plots: plots of the complete split; empty before training ends.
        misses: captions whose images rank worst in the complete split; empty before training ends.
    """

    epoch: int
    captions: Sequence[Query]
    caption_ranks: Ranks
    images: Sequence[Query]
    image_ranks: Ranks
    plots: Sequence[Plot] = ()
    misses: Sequence[Query] = ()


def template(name: str, folder: Path = Path(__file__).parent) -> jinja2.Template:
    """Load a page's template from `folder`, by default that of this file, with escaping of all values."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(name)


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file with embedded images."""
    html = template("predictions.html.j2").render(
        report=report, shown=SHOWN, headline=headline, moves=_moves, spark=_spark, embedded=embedded
    )
    write_atomically(path, html.encode(errors="replace"))


def headline(queries: Sequence[Query]) -> str:
    """Summarize the queries in one line."""
    if not queries:
        return "no queries"
    shown = max(len(query.answers) for query in queries)
    return (
        f"{sum(query.hit for query in queries)} of {len(queries)} with a right answer in the top {shown}, "
        f"median rank {statistics.median(query.rank for query in queries):,g} of {queries[0].candidates:,}"
    )


@lru_cache(MOST_KEPT)
def embedded(path: Path) -> str:
    """Return a thumbnail as a `data:` URL."""
    buffer = BytesIO()
    thumbnail(path).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _moves(query: Query, ranks: Ranks, most: int = 8) -> list[tuple[int, int]]:
    """Return (epoch, rank) of evenly spaced epochs, including the first and the last one."""
    key = str(query.id)
    moves = [(epoch, by_id[key]) for epoch, by_id in sorted(ranks.items()) if key in by_id]
    if len(moves) <= most:
        return moves
    return [moves[round(step * (len(moves) - 1) / (most - 1))] for step in range(most)]


def _spark(query: Query, ranks: Ranks) -> str:
    """Return the points of an SVG polyline in 100 × 24 pixels, with the rank on a logarithmic scale."""
    moves = [rank for _, rank in _moves(query, ranks, most=100)]
    if len(moves) < 2:
        return ""
    deepest = math.log(max(*moves, 10))
    return " ".join(
        f"{100 * step / (len(moves) - 1):.1f},{2 + 20 * math.log(rank) / deepest:.1f}"
        for step, rank in enumerate(moves)
    )
