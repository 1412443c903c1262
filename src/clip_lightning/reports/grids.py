"""Predictions as PNG grids: sentences with the pictures found for them, pictures with their sentences."""

from __future__ import annotations

import statistics
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip_lightning.data.images import BrokenImage, decode_image
from clip_lightning.evaluation.predictions import PictureRow, PredictionRow
from clip_lightning.files import write_atomically
from clip_lightning.terminal import printable

SIDE = 256
TILE, GAP, APART, MARGIN = 160, 16, 64, 48
INK, MUTED, LINE, GREEN = "#18181b", "#71717a", "#e4e4e7", "#16a34a"
NARROWEST, WIDE, HEAD, LEADING = 900, 1200, 150, 32
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


def headline(rows: Sequence[PredictionRow] | Sequence[PictureRow]) -> str:
    """One line that sums the rows up."""
    if not rows:
        return "nothing to show"
    shown = max(len(row.predictions) for row in rows)
    return (
        f"{sum(row.hit for row in rows)} of {len(rows)} found among the first {shown}, "
        f"median rank {statistics.median(row.rank for row in rows):,g} of {rows[0].candidates:,}"
    )


def draw_predictions(rows: Sequence[PredictionRow], path: Path, title: str) -> None:
    """Write a PNG: each sentence, the picture it was written for, and the pictures the model found."""
    columns = max((len(row.predictions) for row in rows), default=0)
    width = max(2 * MARGIN + TILE + APART + columns * (TILE + GAP) - GAP, NARROWEST)
    texts = [_wrap(row.text, font(21), width - 2 * MARGIN - 220, lines=2) for row in rows]
    heights = [30 * len(lines) + TILE + 92 for lines in texts]
    canvas = _canvas(width, sum(heights), title, headline(rows))
    top = HEAD
    for row, lines, height in zip(rows, texts, heights, strict=True):
        _draw_row(canvas, row, lines, top)
        top += height
    _save(canvas, path)


def draw_captions(rows: Sequence[PictureRow], path: Path, title: str) -> None:
    """Write a PNG: each picture, the sentences the model found, and one of its own where none was found."""
    lines = [len(row.predictions) + (not row.hit) for row in rows]
    heights = [max(TILE, LEADING * count) + 40 for count in lines]
    canvas = _canvas(WIDE, sum(heights), title, headline(rows))
    top = HEAD
    for row, height in zip(rows, heights, strict=True):
        _draw_picture(canvas, row, top)
        top += height
    _save(canvas, path)


def _canvas(width: int, height: int, title: str, summary: str) -> Image.Image:
    """White, with a heading, and `height` pixels below it."""
    canvas = Image.new("RGB", (width, HEAD + height + MARGIN // 2), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 40), _wrap(title, font(30), width - 2 * MARGIN, lines=1)[0], INK, font(30))
    draw.text((MARGIN, 84), summary, MUTED, font(18))
    return canvas


def _save(canvas: Image.Image, path: Path) -> None:
    buffer = BytesIO()
    # a tenth larger than Pillow's own choice, in a third of the time
    canvas.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    write_atomically(path, buffer.getvalue())


def _draw_row(canvas: Image.Image, row: PredictionRow, lines: Sequence[str], top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.line((MARGIN, top, canvas.width - MARGIN, top), LINE)
    draw.multiline_text((MARGIN, top + 18), "\n".join(lines), INK, font(21), spacing=6)
    _draw_rank(draw, row, (canvas.width - MARGIN, top + 18))
    y = top + 30 * len(lines) + 28
    _paste(canvas, row.true_path, (MARGIN, y), None)
    draw.text((MARGIN, y + TILE + 8), "wanted", MUTED, font(16))
    x = MARGIN + TILE + APART
    draw.line((x - APART // 2, y, x - APART // 2, y + TILE), LINE, 2)
    for prediction in row.predictions:
        _paste(canvas, prediction.path, (x, y), GREEN if prediction.right else None)
        label = f"{prediction.similarity:.3f}" + ("  right" if prediction.right else "")
        draw.text((x, y + TILE + 8), label, GREEN if prediction.right else MUTED, font(16))
        x += TILE + GAP


def _draw_picture(canvas: Image.Image, row: PictureRow, top: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.line((MARGIN, top, canvas.width - MARGIN, top), LINE)
    y = top + 20
    _paste(canvas, row.path, (MARGIN, y), None)
    _draw_rank(draw, row, (canvas.width - MARGIN, y + 2))
    number, sentence = MARGIN + TILE + APART // 2, MARGIN + TILE + APART // 2 + 118
    room = canvas.width - MARGIN - 150 - sentence
    y += 4
    for found in row.predictions:
        ink = GREEN if found.right else INK
        label = f"{found.similarity:.3f}" + ("  right" if found.right else "")
        draw.text((number, y + 3), label, GREEN if found.right else MUTED, font(16))
        draw.text((sentence, y), _wrap(found.text, font(19), room, lines=1)[0], ink, font(19))
        y += LEADING
    if not row.hit and row.own:
        draw.text((number, y + 3), "wanted", MUTED, font(16))
        draw.text((sentence, y), _wrap(row.own[0], font(19), room, lines=1)[0], MUTED, font(19))


def _draw_rank(draw: ImageDraw.ImageDraw, row: PredictionRow | PictureRow, at: tuple[int, int]) -> None:
    draw.text(at, f"rank {row.rank:,}", GREEN if row.hit else MUTED, font(21), anchor="ra")


def _paste(canvas: Image.Image, path: Path, at: tuple[int, int], frame: str | None) -> None:
    """Paste with round corners, in a thick coloured or a thin grey frame."""
    border = 5 if frame else 1
    side = TILE + 2 * border
    canvas.paste(frame or LINE, (at[0] - border, at[1] - border), rounded(side, 8 + border))
    canvas.paste(_tile(path), at, rounded(TILE, 8))


@lru_cache(MOST_KEPT)
def _tile(path: Path) -> Image.Image:
    return thumbnail(path).resize((TILE, TILE), Image.Resampling.LANCZOS)


@cache
def rounded(side: int, radius: int) -> Image.Image:
    """A mask with round corners, in pixels."""
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), 4 * radius, 255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)  # Pillow itself does not smooth edges


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font in this size, in pixels."""
    return ImageFont.load_default(size)


@lru_cache(MOST_KEPT)
def _wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int
) -> list[str]:
    """At most `lines` lines no wider than `width` pixels, the last one ending in … where text is cut."""
    text = " ".join(printable(text).split())
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
    ends = range(2, len(text) + 1)
    return 1 + bisect_right(ends, width, key=lambda end: font.getlength(text[:end]))
