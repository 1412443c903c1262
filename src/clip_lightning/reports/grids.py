"""Thumbnails, rounded corners, a font and colors for grids of images."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from clip_lightning.data.images import BrokenImage, decode_image

SIDE = 256
MARGIN = 48
INK, MUTED, LINE, GREEN = "#18181b", "#71717a", "#e4e4e7", "#16a34a"
MOST_KEPT = 256  # cached thumbnails


@lru_cache(MOST_KEPT)
def thumbnail(path: Path) -> Image.Image:
    """Return the center square of an image in RGB, `SIDE` pixels wide, or a gray tile if it cannot be read.

    Thumbnails are cached, because the next epoch shows many of the same images.
    """
    try:
        image = Image.fromarray(decode_image(path).permute(1, 2, 0).numpy())
    except BrokenImage:
        return Image.new("RGB", (SIDE, SIDE), LINE)
    return ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)


@cache
def rounded(side: int, radius: int) -> Image.Image:
    """Draw a mask with rounded corners; both arguments are in pixels."""
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), 4 * radius, 255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)  # Pillow does not smooth edges


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load Pillow's default font with a size in pixels."""
    return ImageFont.load_default(size)
