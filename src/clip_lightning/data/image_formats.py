"""The image formats that are read, as Pillow calls them, their suffixes, and the files that count as data."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

with contextlib.suppress(ImportError):
    import pillow_heif  # type: ignore[import-not-found, unused-ignore]

    pillow_heif.register_heif_opener()

Image.init()
# Not all that Pillow knows: it would start Ghostscript for a file that claims to be PostScript.
PICTURE_SUFFIXES = {
    name: suffix
    for name, suffix in {
        "JPEG": ".jpg",
        "PNG": ".png",
        "WEBP": ".webp",
        "GIF": ".gif",
        "BMP": ".bmp",
        "TIFF": ".tif",
        "PPM": ".ppm",
        "AVIF": ".avif",
        "JPEG2000": ".jp2",
        "HEIF": ".heic",
    }.items()
    if name in Image.OPEN
}
PICTURE_FORMATS = tuple(PICTURE_SUFFIXES)
READ_SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in PICTURE_FORMATS
)
_OTHER_IMAGES = frozenset(
    ".heic .heif .hif .avif .jxl .svg .psd .tga .ico .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .rw2".split()
)
# Synology and macOS keep thumbnails and archives' leftovers in these folders.
_NO_DATA = ("@eaDir", "__MACOSX")


def is_image(name: str) -> bool:
    """Check whether a file of this name is an image that can be read."""
    return os.path.splitext(name)[1].lower() in READ_SUFFIXES


def walk(root: Path, passed_over: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder below `root` with its files, both in order.

    Hidden files and folders, which editors and systems leave behind, and images in formats that are not read
    are passed over, and counted by kind in `passed_over`.
    """
    for folder, subfolders, files in os.walk(root):
        kept = sorted(name for name in subfolders if not (name.startswith(".") or name in _NO_DATA))
        for name in sorted(set(subfolders) - set(kept)):
            with contextlib.suppress(OSError):
                if any(is_image(file) for file in os.listdir(os.path.join(folder, name))):
                    passed_over[f"{name} folders"] += 1
        subfolders[:] = kept
        found = []
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                passed_over["hidden files"] += bool(suffix)
            elif suffix in _OTHER_IMAGES - READ_SUFFIXES:
                passed_over[f"{suffix} files, a format that is not read"] += 1
            else:
                found.append(name)
        yield folder, found


def counted(counts: Counter[str]) -> str:
    """List what was counted, for messages."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items()))
