"""Define the supported image formats, by Pillow's names and by suffix, and list the files of a data set."""

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
# Not all formats of Pillow: it would start Ghostscript for a file that claims to be PostScript.
IMAGE_SUFFIXES = {
    **{"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"},
    **{"PPM": ".ppm", "AVIF": ".avif", "JPEG2000": ".jp2", "HEIF": ".heic"},
}
IMAGE_FORMATS = tuple(name for name in IMAGE_SUFFIXES if name in Image.OPEN)
READ_SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS
)
_OTHER_IMAGES = frozenset(
    ".heic .heif .hif .avif .jxl .svg .psd .tga .ico .exr .hdr .dng .cr2 .cr3 .nef .arw .orf .rw2".split()
)
# Synology and macOS store thumbnails and metadata in these folders.
_NO_DATA = ("@eaDir", "__MACOSX")


def is_image(name: str) -> bool:
    """Return whether a file with this name is an image in a supported format."""
    return os.path.splitext(name)[1].lower() in READ_SUFFIXES


def walk(root: Path, skipped: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and every folder below it with its files, both in order.

    Hidden files and folders, which editors and systems leave behind, images in unsupported formats, and
    folders that cannot be read are left out, and counted by kind in `skipped`.
    """

    def count_unreadable(error: OSError) -> None:
        skipped[f"unreadable folder {os.path.relpath(error.filename, root)} ({error.strerror})"] += 1

    for folder, subfolders, files in os.walk(root, onerror=count_unreadable):
        hidden = {name for name in subfolders if name.startswith(".") or name in _NO_DATA}
        skipped.update(f"{name} folders" for name in hidden)
        subfolders[:] = sorted({*subfolders} - hidden)
        data_files = []
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") and suffix:
                skipped["hidden files"] += 1
            elif suffix in _OTHER_IMAGES - READ_SUFFIXES:
                skipped[f"{suffix} files, an unsupported format"] += 1
            elif not name.startswith("."):
                data_files.append(name)
        yield folder, data_files


def counted(counts: Counter[str]) -> str:
    """Return the counts by kind as text for messages."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
