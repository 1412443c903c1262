"""The formats of pictures that are read, as Pillow calls them, and their suffixes."""

from __future__ import annotations

# Not all that Pillow knows: it would start Ghostscript for a file that says it is PostScript.
PICTURE_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
}
PICTURE_FORMATS = tuple(PICTURE_SUFFIXES)
