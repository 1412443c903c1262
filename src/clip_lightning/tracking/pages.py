"""Predictions for people: a PNG grid and a web page that stands alone."""

from __future__ import annotations

import base64
import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip_lightning.data.transforms import BrokenImage, decode_image
from clip_lightning.files import write_atomically
from clip_lightning.tracking.predictions import PredictionRow

History = Mapping[int, Mapping[int, int]]
"""Epoch → caption row → rank of the right picture."""

SIDE = 256
TILE, GAP, APART, MARGIN = 160, 16, 64, 48
INK, MUTED, LINE, GREEN = "#18181b", "#71717a", "#e4e4e7", "#16a34a"
MOST_KEPT = 256  # of what the next epoch shows again


@lru_cache(MOST_KEPT)
def thumbnail(path: Path) -> Image.Image:
    """The middle square of a picture, RGB, `SIDE` pixels wide; a grey tile when it cannot be read.

    Kept for the next epoch, which shows many of the same pictures.
    """
    try:
        image = Image.fromarray(decode_image(path).permute(1, 2, 0).numpy())
    except BrokenImage:
        return Image.new("RGB", (SIDE, SIDE), LINE)
    return ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)


def headline(rows: Sequence[PredictionRow]) -> str:
    """One line that sums the rows up."""
    if not rows:
        return "no queries"
    shown = max(len(row.predictions) for row in rows)
    return (
        f"{sum(row.hit for row in rows)} of {len(rows)} found among the first {shown}, "
        f"median rank {statistics.median(row.rank for row in rows):g} of {rows[0].candidates:,}"
    )


def draw_predictions(rows: Sequence[PredictionRow], path: Path, title: str) -> None:
    """Write a PNG: each sentence, the picture it was written for, and the pictures the model found."""
    columns = max((len(row.predictions) for row in rows), default=0)
    width = max(2 * MARGIN + TILE + APART + columns * (TILE + GAP) - GAP, 900)
    texts = [_wrap(row.text, _font(21), width - 2 * MARGIN - 220, lines=2) for row in rows]
    heights = [30 * len(lines) + TILE + 92 for lines in texts]
    canvas = Image.new("RGB", (width, 150 + sum(heights) + MARGIN // 2), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 40), _wrap(title, _font(30), width - 2 * MARGIN, lines=1)[0], INK, _font(30))
    draw.text((MARGIN, 84), headline(rows), MUTED, _font(18))
    top = 150
    for row, lines, height in zip(rows, texts, heights, strict=True):
        _draw_row(canvas, row, lines, top)
        top += height
    buffer = BytesIO()
    # a tenth larger than Pillow's own choice, in a third of the time
    canvas.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    write_atomically(path, buffer.getvalue())


def _draw_row(canvas: Image.Image, row: PredictionRow, lines: Sequence[str], top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.line((MARGIN, top, canvas.width - MARGIN, top), LINE)
    draw.multiline_text((MARGIN, top + 18), "\n".join(lines), INK, _font(21), spacing=6)
    draw.text(
        (canvas.width - MARGIN, top + 18),
        f"rank {row.rank:,}",
        GREEN if row.hit else MUTED,
        _font(21),
        anchor="ra",
    )
    y = top + 30 * len(lines) + 28
    _paste(canvas, row.true_path, (MARGIN, y), None)
    draw.text((MARGIN, y + TILE + 8), "wanted", MUTED, _font(16))
    x = MARGIN + TILE + APART
    draw.line((x - APART // 2, y, x - APART // 2, y + TILE), LINE, 2)
    for prediction in row.predictions:
        _paste(canvas, prediction.path, (x, y), GREEN if prediction.right else None)
        label = f"{prediction.similarity:.3f}" + ("  right" if prediction.right else "")
        draw.text((x, y + TILE + 8), label, GREEN if prediction.right else MUTED, _font(16))
        x += TILE + GAP


def _paste(canvas: Image.Image, path: Path, at: tuple[int, int], frame: str | None) -> None:
    """Paste with round corners, in a thick coloured or a thin grey frame."""
    border = 5 if frame else 1
    side = TILE + 2 * border
    canvas.paste(frame or LINE, (at[0] - border, at[1] - border), _rounded(side, 8 + border))
    canvas.paste(_tile(path), at, _rounded(TILE, 8))


@lru_cache(MOST_KEPT)
def _tile(path: Path) -> Image.Image:
    return thumbnail(path).resize((TILE, TILE), Image.Resampling.LANCZOS)


@cache
def _rounded(side: int, radius: int) -> Image.Image:
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), 4 * radius, 255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)  # Pillow itself does not smooth edges


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@lru_cache(MOST_KEPT)
def _wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int
) -> list[str]:
    """At most `lines` lines no wider than `width` pixels, the last one ending in … where text is cut."""
    text = " ".join(_printable(text).split())
    wrapped: list[str] = []
    while text and len(wrapped) < lines:
        fits = _fitting(text, font, width)
        if fits < len(text) and len(wrapped) == lines - 1:
            return [*wrapped, text[: _fitting(text, font, width - font.getlength("…"))].rstrip() + "…"]
        if fits < len(text):  # break at a blank where there is one
            fits = text.rfind(" ", 1, fits + 1) if " " in text[1 : fits + 1] else fits
        wrapped.append(text[:fits].rstrip())
        text = text[fits:].lstrip()
    return wrapped or [""]


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> int:
    """How many characters from the start fit in `width` pixels, at least one."""
    end = 1
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    return end


def _printable(text: str) -> str:
    """Without the halves of broken emoji, which no font and no UTF-8 file takes."""
    return text.encode(errors="replace").decode()


def write_predictions_page(rows: Sequence[PredictionRow], history: History, path: Path) -> None:
    """Write the newest rows and how their ranks moved as one HTML file, pictures inside.

    Args:
        rows: of the newest epoch.
        history: the ranks of all epochs so far, the newest included.
        path: of the page.
    """
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("predictions.html.j2")
    queries = []
    for row in rows:
        moves = [
            (epoch, ranks[row.text_id]) for epoch, ranks in sorted(history.items()) if row.text_id in ranks
        ]
        queries.append({"row": row, "moves": _thinned(moves), "spark": _spark([rank for _, rank in moves])})
    html = page.render(
        epoch=max(history, default=0), headline=headline(rows), queries=queries, embedded=_embedded
    )
    write_atomically(path, html.encode(errors="replace"))


@lru_cache(MOST_KEPT)
def _embedded(path: Path) -> str:
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
