"""Draws the results of a search as one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clip_lightning.files import complete_file
from clip_lightning.reports.pages import thumbnail
from clip_lightning.reports.plots import INK, MUTED
from clip_lightning.search.index import FoundImage
from clip_lightning.terminal import one_line

TILE, GAP, LABEL, HEADING, MARGIN = 240, 20, 62, 108, 48
MOST_COLUMNS = 6


def draw_found(queries: Sequence[tuple[str | Path, Sequence[FoundImage]]], path: Path) -> None:
    """Write a PNG with each query, a sentence or the path of an image, and its results with scores."""
    most = max((len(found) for _, found in queries), default=0)
    columns = min(MOST_COLUMNS, max(3, math.ceil(math.sqrt(most))))
    width = 2 * MARGIN + columns * (TILE + GAP) - GAP
    heights = [HEADING + math.ceil(len(found) / columns) * (TILE + LABEL) for _, found in queries]
    canvas = Image.new("RGB", (width, MARGIN // 2 + sum(heights)), "white")
    top = 0
    for (query, found), height in zip(queries, heights, strict=True):
        left = MARGIN
        if isinstance(query, Path):
            canvas.paste(thumbnail(query).resize((68, 68), Image.Resampling.LANCZOS), (left, top + 22))
            left += 68 + GAP
        text = f"images like {query.name}" if isinstance(query, Path) else query
        _write(canvas, text, (left, top + 28), 28, INK, width - MARGIN - left)
        summary = f"{len(found)} most similar images with their cosine similarity"
        _write(canvas, summary, (left, top + 66), 17, MUTED, width - MARGIN - left)
        for number, hit in enumerate(found):
            row, column = divmod(number, columns)
            x, y = MARGIN + column * (TILE + GAP), top + HEADING + row * (TILE + LABEL)
            canvas.paste(thumbnail(hit.path).resize((TILE, TILE), Image.Resampling.LANCZOS), (x, y))
            name = hit.path.name + (" (missing)" if hit.missing else "")
            _write(canvas, f"{hit.score:.3f}", (x + 2, y + TILE + 8), 17, INK, TILE)
            _write(canvas, name, (x + 62, y + TILE + 9), 15, MUTED, TILE - 62)
            _write(canvas, "".join(hit.captions[:1]), (x + 2, y + TILE + 31), 14, MUTED, TILE - 2)
        top += height
    with complete_file(path) as draft:
        canvas.save(draft, "PNG", compress_level=1)


def _write(canvas: Image.Image, text: str, at: tuple[int, int], size: int, colour: str, width: float) -> None:
    """Write text on one line of at most `width` pixels, truncated with … if it is longer."""
    font = ImageFont.load_default(size)  # Pillow's own, whose size is in pixels
    text = complete = one_line(text[:500])
    while text and font.getlength(text + "…" * (text != complete)) > width:
        text = text[:-1]
    ImageDraw.Draw(canvas).text(at, text + "…" * (text != complete), colour, font)
