"""Renders the predictions of a run and the results of `data check` as HTML pages, each in one file."""

from __future__ import annotations

import base64
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageOps

from clip_lightning.data import check
from clip_lightning.data.captions import CaptionSet
from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.evaluation.predictions import Query, spaced
from clip_lightning.files import write_atomically, write_json
from clip_lightning.reports.plots import LINE, Plot, plot_counts

SHOWN = 6  # queries of each kind above the fold
MOST_MOVES = 8  # ranks of a query over the epochs
MOST_CHECKED, MOST_LISTED = 40, 200  # groups of images of each kind, and images that cannot be used
MOST_AUDITED = 200  # accused captions
SIDE, MOST_KEPT = 256, 256  # pixels of a thumbnail, and cached thumbnails
PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
"""The templates of the package by their paths in it, such as `reports/check.html.j2`."""


def write_html(path: Path, name: str, **content: Any) -> None:
    """Render the template `reports/NAME.html.j2` to a file."""
    html = PAGES.get_template(f"reports/{name}.html.j2").render(content, embedded=embedded)
    write_atomically(path, html.encode(errors="replace"))


def write_page(
    path: Path,
    epoch: int,
    queries: Mapping[str, Sequence[Query]],
    history: Mapping[str, Any],
    plots: Sequence[Plot] = (),
    misses: Sequence[Query] = (),
) -> None:
    """Write what a model finds as a page.

    Args:
        path: the file to write.
        epoch: the epoch of the model.
        queries: the queries of each direction.
        history: the ranks of the queries in each epoch, by direction.
        plots: plots of the complete split, which are added when training ends.
        misses: the worst misses of the complete split, which are added then, too.
    """
    content = {"queries": queries, "history": history, "plots": plots, "misses": misses}
    title = f"Predictions, epoch {epoch}"
    write_html(path, "predictions", title=title, **content, shown=SHOWN, headline=headline, moves=_moves)


def headline(queries: Sequence[Query]) -> str:
    """Summarize the queries in one line."""
    if not queries:
        return "No queries"
    shown = max(len(query.answers) for query in queries)
    return (
        f"{sum(query.hit for query in queries)} of {len(queries)} with a right answer in the top {shown}, "
        f"median rank {statistics.median(query.rank for query in queries):,g} of {queries[0].candidates:,}"
    )


def _moves(query: Query, ranks: Mapping[int, Mapping[str, int]]) -> list[tuple[int, int]]:
    """Return (epoch, rank) of evenly spaced epochs; in `ranks`, the ids of the queries are strings."""
    key = str(query.id)
    moves = [(epoch, by_id[key]) for epoch, by_id in sorted(ranks.items()) if key in by_id]
    return [moves[n] for n in spaced(len(moves), MOST_MOVES).tolist()]


@lru_cache(MOST_KEPT)
def thumbnail(path: Path) -> Image.Image:
    """Return the center square of an image in RGB, or a gray tile if it cannot be read.

    Thumbnails are cached, because the next epoch shows many of the same images.
    """
    try:
        image = Image.fromarray(decode_image(path, pauses=()).permute(1, 2, 0).numpy())
    except BrokenImage:
        return Image.new("RGB", (SIDE, SIDE), LINE)
    return ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)


@lru_cache(MOST_KEPT)
def embedded(path: Path) -> str:
    """Return a thumbnail as a `data:` URL."""
    buffer = BytesIO()
    thumbnail(path).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_audit(found: Mapping[str, Any], data: CaptionSet, folder: Path) -> None:
    """Write the results of `data audit` as `audit.json` and `audit.html` into the folder."""
    write_json(folder / "audit.json", found)
    names = data.names()
    images = {names[image.path]: image for image in data.images}
    title = f"Data audit: {found['root']}"
    write_html(folder / "audit.html", "audit", title=title, found=found, images=images, most=MOST_AUDITED)


def write_check(
    found: check.Report, entries: Sequence[check.Entry], folder: Path, others: Sequence[check.Entry] = ()
) -> None:
    """Write the results of `data check`, also against other images, as `check.json` and `check.html`."""
    write_json(folder / "check.json", found)
    readable = [entry for entry in entries if entry.broken is None]
    sides = [entry.short_side for entry in readable]
    words = [len(caption.split()) for entry in entries for caption in entry.image.captions]
    counted = (sides, "Short side in pixels", "images"), (words, "Words per caption", "captions")
    leaks, unusable = found["leaks"] + found["alike_leaks"], found["broken"] | found["left_out"]
    copies = {f"{found['against']}: {other.name}": other for other in others}
    copied = (found["against_same"] | found["against_alike"]).items()
    sample = random.Random(0).sample(readable, min(MOST_CHECKED, len(readable)))
    write_html(
        folder / "check.html",
        "check",
        title=f"Data check: {found['root']}",
        text=[(line.partition(":")[0], line.strip()) for line in check.as_text(found).splitlines()[1:]],
        plots=[Plot(plot_counts(*arguments), arguments[1]) for arguments in counted if arguments[0]],
        galleries={
            "Identical files in different splits": found["leaks"],
            "Near duplicates in different splits": found["alike_leaks"],
            "Copies in the other data": [[name, f"{found['against']}: {copy}"] for name, copy in copied],
            "Near duplicates in one split": [group for group in found["alike"] if group not in leaks],
            "Random sample": [[entry.name] for entry in sample],
        },
        lists={
            "Images that cannot be used": dict(islice(unusable.items(), MOST_LISTED)),
            "Captions shared by several images": found["most_shared"],
        },
        entries={entry.name: entry for entry in entries} | copies,
        most=MOST_CHECKED,
    )
