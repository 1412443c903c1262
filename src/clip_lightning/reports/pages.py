"""What the model finds for fixed captions and images, as a page that needs no other file."""

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

Ranks = Mapping[int, Mapping[str, int]]
"""Epoch → id of a query, as JSON has it → rank."""


@dataclass(frozen=True)
class Report:
    """What the page shows of an epoch.

    Attributes:
        epoch: the epoch.
        captions: fixed captions and the images found for them.
        caption_ranks: their ranks in all epochs so far, this one included.
        images: fixed images and the captions found for them.
        image_ranks: their ranks in all epochs so far, this one included.
        plots: of the whole split; none before training ends.
        misses: the captions of the whole split whose image ranks worst; none before training ends.
    """

    epoch: int
    captions: Sequence[Query]
    caption_ranks: Ranks
    images: Sequence[Query]
    image_ranks: Ranks
    plots: Sequence[Plot] = ()
    misses: Sequence[Query] = ()


def template(name: str, folder: Path = Path(__file__).parent) -> jinja2.Template:
    """Return a page's template from `folder`, by default that of this file; it escapes what it is given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(name)


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file, with the images in it."""
    html = template("predictions.html.j2").render(
        report=report, headline=headline, moves=_moves, spark=_spark, embedded=embedded
    )
    write_atomically(path, html.encode(errors="replace"))


def headline(queries: Sequence[Query]) -> str:
    """Sum the queries up in one line."""
    if not queries:
        return "nothing to show"
    shown = max(len(query.answers) for query in queries)
    return (
        f"{sum(query.hit for query in queries)} of {len(queries)} found among the first {shown}, "
        f"median rank {statistics.median(query.rank for query in queries):,g} of {queries[0].candidates:,}"
    )


@lru_cache(MOST_KEPT)
def embedded(path: Path) -> str:
    """Return a thumbnail as a `data:` URL."""
    buffer = BytesIO()
    thumbnail(path).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _moves(query: Query, ranks: Ranks, most: int = 8) -> list[tuple[int, int]]:
    """(epoch, rank) of the first, the last and evenly spaced epochs between."""
    key = str(query.id)
    moves = [(epoch, found[key]) for epoch, found in sorted(ranks.items()) if key in found]
    if len(moves) <= most:
        return moves
    return [moves[round(step * (len(moves) - 1) / (most - 1))] for step in range(most)]


def _spark(query: Query, ranks: Ranks) -> str:
    """Points of an SVG polyline in a box of 100 × 24: rank on a log scale, the first place on top."""
    moves = [rank for _, rank in _moves(query, ranks, most=100)]
    if len(moves) < 2:
        return ""
    deepest = math.log(max(*moves, 10))
    return " ".join(
        f"{100 * step / (len(moves) - 1):.1f},{2 + 20 * math.log(rank) / deepest:.1f}"
        for step, rank in enumerate(moves)
    )
