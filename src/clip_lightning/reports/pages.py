"""Renders predictions as a self-contained HTML page."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import jinja2
from PIL import Image, ImageOps

from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.evaluation.predictions import Query
from clip_lightning.files import write_atomically
from clip_lightning.reports.plots import LINE, Plot

SHOWN = 6  # queries of each kind above the fold
SIDE, MOST_KEPT = 256, 256  # pixels of a thumbnail, and cached thumbnails
Ranks = Mapping[int, Mapping[str, int]]
"""Epoch → id of a query, as a string → rank."""


@dataclass(frozen=True)
class Report:
    """The predictions of an epoch: fixed captions and images with the answers, and their ranks in all epochs.

    The plots and the worst misses of the complete split are added when training ends.
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
        report=report, shown=SHOWN, headline=headline, moves=_moves, embedded=embedded
    )
    write_atomically(path, html.encode(errors="replace"))


def headline(queries: Sequence[Query]) -> str:
    """Summarize the queries in one line."""
    if not queries:
        return "No queries"
    shown = max(len(query.answers) for query in queries)
    return (
        f"{sum(query.hit for query in queries)} of {len(queries)} with a right answer in the top {shown}, "
        f"median rank {statistics.median(query.rank for query in queries):,g} of {queries[0].candidates:,}"
    )


@lru_cache(MOST_KEPT)
def thumbnail(path: Path) -> Image.Image:
    """Return the center square of an image in RGB, or a gray tile if it cannot be read.

    Thumbnails are cached, because the next epoch shows many of the same images.
    """
    try:
        image = Image.fromarray(decode_image(path).permute(1, 2, 0).numpy())
    except BrokenImage:
        return Image.new("RGB", (SIDE, SIDE), LINE)
    return ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)


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
