"""Predictions as a web page that stands alone."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2

from clip_lightning.evaluation.predictions import PictureRow, PredictionRow
from clip_lightning.files import write_atomically
from clip_lightning.reports.grids import MOST_KEPT, thumbnail
from clip_lightning.reports.plots import Plot

Ranks = Mapping[int, Mapping[str, int]]
"""Epoch → caption row or position of a picture, as JSON has it → rank."""


@dataclass(frozen=True)
class Report:
    """What the page shows of an epoch.

    Attributes:
        epoch: the epoch.
        sentences: fixed sentences and the pictures found for them.
        sentence_ranks: their ranks in all epochs so far, this one included.
        pictures: fixed pictures and the sentences found for them.
        picture_ranks: their ranks in all epochs so far, this one included.
        plots: of the whole split; none while training goes on.
        misses: the sentences of the whole split whose picture ranks worst; none while training goes on.
    """

    epoch: int
    sentences: Sequence[PredictionRow]
    sentence_ranks: Ranks
    pictures: Sequence[PictureRow]
    picture_ranks: Ranks
    plots: Sequence[Plot] = ()
    misses: Sequence[PredictionRow] = ()


def template(name: str, folder: Path = Path(__file__).parent) -> jinja2.Template:
    """A page's template, which lies in `folder`, by default beside this file; it escapes what it is given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(name)


def write_page(report: Report, path: Path) -> None:
    """Write the report as one HTML file, pictures inside."""
    page = template("predictions.html.j2")
    html = page.render(
        report=report,
        sentences=[_with_moves(row, row.text_id, report.sentence_ranks) for row in report.sentences],
        pictures=[_with_moves(row, row.image_id, report.picture_ranks) for row in report.pictures],
        misses=[_with_moves(row, row.text_id, {}) for row in report.misses],
        headline=headline,
        embedded=embedded,
    )
    write_atomically(path, html.encode(errors="replace"))


def headline(rows: Sequence[PredictionRow] | Sequence[PictureRow]) -> str:
    """One line that sums the rows up."""
    if not rows:
        return "nothing to show"
    shown = max(len(row.predictions) for row in rows)
    return (
        f"{sum(row.hit for row in rows)} of {len(rows)} found among the first {shown}, "
        f"median rank {statistics.median(row.rank for row in rows):,g} of {rows[0].candidates:,}"
    )


def _with_moves(row: PredictionRow | PictureRow, key: int, history: Ranks) -> dict[str, Any]:
    """The row and how its rank has moved."""
    moves = [(epoch, ranks[str(key)]) for epoch, ranks in sorted(history.items()) if str(key) in ranks]
    return {"row": row, "moves": _thinned(moves), "spark": _spark([rank for _, rank in moves])}


@lru_cache(MOST_KEPT)
def embedded(path: Path) -> str:
    """Return a thumbnail as a `data:` URL."""
    buffer = BytesIO()
    thumbnail(path).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _thinned(moves: Sequence[tuple[int, int]], most: int = 8) -> list[tuple[int, int]]:
    """First, last and evenly spaced moves between."""
    if len(moves) <= most:
        return list(moves)
    return [moves[round(step * (len(moves) - 1) / (most - 1))] for step in range(most)]


def _spark(ranks: Sequence[int]) -> str:
    """Points of an SVG polyline in a box of 100 × 24: rank on a log scale, the first place on top."""
    if len(ranks) < 2:
        return ""
    deepest = math.log(max(*ranks, 10))
    return " ".join(
        f"{100 * step / (len(ranks) - 1):.1f},{2 + 20 * math.log(rank) / deepest:.1f}"
        for step, rank in enumerate(ranks)
    )
