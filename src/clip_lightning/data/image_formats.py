"""Define the supported image formats, by Pillow's names and by suffix, and list the files of a data set."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

with contextlib.suppress(ImportError):
    import pillow_heif  # type: ignore[import-not-found, unused-ignore]

    pillow_heif.register_heif_opener()

Image.init()
# Not all formats of Pillow: it would start Ghostscript for a file that claims to be PostScript.
IMAGE_SUFFIXES = {
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
IMAGE_FORMATS = tuple(IMAGE_SUFFIXES)
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


def walk(root: Path, passed_over: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield `root` and every folder below it with its files, both in order.

    Hidden files and folders, which editors and systems leave behind, images in unsupported formats, and
    folders that cannot be read are skipped, and counted by kind in `passed_over`.
    """
    for folder, subfolders, files in os.walk(root, onerror=partial(count_unreadable, root, passed_over)):
        kept = sorted(name for name in subfolders if not (name.startswith(".") or name in _NO_DATA))
        for name in sorted(set(subfolders) - set(kept)):
            with contextlib.suppress(OSError):
                if any(is_image(file) for file in os.listdir(os.path.join(folder, name))):
                    passed_over[f"{name} folders"] += 1
        subfolders[:] = kept
        data_files = []
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                passed_over["hidden files"] += bool(suffix)
            elif suffix in _OTHER_IMAGES - READ_SUFFIXES:
                passed_over[f"{suffix} files, an unsupported format"] += 1
            else:
                data_files.append(name)
        yield folder, data_files


def count_unreadable(root: Path, passed_over: Counter[str], error: OSError) -> None:
    """Count a folder below `root` that cannot be read because of `error`."""
    passed_over[f"unreadable folder {os.path.relpath(error.filename, root)} ({error.strerror})"] += 1


def counted(counts: Counter[str]) -> str:
    """Return the counts by kind as text for messages."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
