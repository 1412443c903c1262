"""Which pictures to index: those below a folder, those of an annotation file, and what is said of them."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from clip_lightning.data.formats import NothingFound, read_captions
from clip_lightning.data.image_formats import READ_SUFFIXES, counted, is_image, walk
from clip_lightning.errors import UserError
from clip_lightning.terminal import one_line


def find_pictures(source: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Absolute path → captions of every picture, and path → reason of those that cannot be had.

    Of a folder, these are all pictures below it, except in hidden folders, and what its annotations name;
    captions are those of the annotations, if `read_captions` finds any. Of an annotation file, they are the
    pictures that it names.

    Raises:
        UserError: there are none.
    """
    if not source.exists():
        raise UserError(f"there is no folder or file {source}; give a folder of pictures or a data set")
    left_out: dict[str, str] = {}
    passed_over: Counter[str] = Counter()
    found: dict[str, tuple[str, ...]] = {}
    if source.is_dir():
        found = {path: () for path in _below(source.resolve(), left_out, passed_over)}
    if passed_over:
        print(one_line(f"passed over: {counted(passed_over)}"), file=sys.stderr)
    captions = _captions(source)
    found |= {os.path.abspath(path): texts for path, texts in captions.items()}
    if not found:
        raise UserError(
            f"there is no image below {source}; expected files that end in {', '.join(sorted(READ_SUFFIXES))}"
        )
    return dict(sorted(found.items())), left_out


def _captions(source: Path) -> dict[Path, tuple[str, ...]]:
    try:
        data = read_captions(source)
    except UserError as error:
        if not source.is_dir():
            raise
        if not isinstance(error, NothingFound):  # there are captions, and something is wrong with them
            print(one_line(f"without captions: {error}"), file=sys.stderr)
        return {}
    if not source.is_dir():
        for name, reason in data.left_out.items():
            print(one_line(f"left out {name}: {reason}"), file=sys.stderr)
    return {image.path: image.captions for image in data.images}


def _below(folder: Path, left_out: dict[str, str], passed_over: Counter[str]) -> list[str]:
    paths = []
    for place, files in walk(folder, passed_over):
        for path in (os.path.join(place, name) for name in files if is_image(name)):
            try:
                path.encode()
            except UnicodeEncodeError:
                left_out[path.encode(errors="replace").decode()] = "its name is not UTF-8"
                continue
            paths.append(path)
    return paths
