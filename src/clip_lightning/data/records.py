"""Read captioned images from Python: a list, a DataFrame, or a torch or Hugging Face data set."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torchvision.transforms.functional import to_pil_image

from clip_lightning.data.columns import ReadOptions, sentences
from clip_lightning.data.hub import NoImage, store_image
from clip_lightning.data.images import BrokenImage, to_pixels
from clip_lightning.errors import UserError
from clip_lightning.files import cache_folder, make_once


class Records:
    """Python data that is written once, as a folder of images and a table, and then read like other data.

    Args:
        records: rows, or a mapping from `train`, `val` and `test` to rows. A row is (image, captions),
            (image, captions, split), or a mapping with columns as in a table. An image is a file name or
            anything else that `CLIP.embed_images` accepts; captions are one string or several.
        read: the columns, if they are not recognized.
    """

    def __init__(self, records: Any, read: ReadOptions) -> None:
        parts = records if isinstance(records, Mapping) else {None: records}
        self._parts = {split: _indexed(rows) for split, rows in parts.items()}
        self._read = read
        self._folder: Path | None = None

    def folder(self) -> Path:
        """Return the folder to which `fetch` writes the data; its name depends on the content."""
        if self._folder is None:
            sha = hashlib.sha256()
            for image, captions, split in self._rows():
                content = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else image
                sha.update(json.dumps([content, captions, split]).encode())
            self._folder = cache_folder("data") / f"records-{sha.hexdigest()[:16]}"
        return self._folder

    def fetch(self) -> None:
        """Write the folder, unless it exists."""
        make_once(self.folder(), self._write)

    def _write(self, draft: Path) -> Path:
        with (draft / "captions.jsonl").open("w", encoding="utf-8") as file:
            for number, (image, captions, split) in enumerate(self._rows()):
                if isinstance(image, bytes):
                    try:
                        image = store_image(image, draft, split or "all")
                    except NoImage as error:
                        image = f"record {number} ({error})"  # counted later, as there is no such file
                file.write(json.dumps({"image": image, "captions": captions, "split": split}) + "\n")
        return draft

    def _rows(self) -> Iterator[tuple[str | bytes, list[str], str | None]]:
        for part, rows in self._parts.items():
            for number in range(len(rows)):
                row = rows[number]
                try:
                    if isinstance(row, Mapping):
                        columns = self._read.find("records", row)
                        image, texts = row[columns.image], [row[name] for name in columns.captions]
                        split = row[columns.split] if columns.split else None
                    else:
                        image, texts, split = (*row, None)[:3]
                        texts = list(texts) if isinstance(texts, tuple) else texts
                    yield _content(image), sentences(texts), split or part
                except (TypeError, ValueError) as error:
                    if isinstance(error, UserError):
                        raise
                    expected = "expected (image, captions), (image, captions, split) or a mapping"
                    raise UserError(f"record {number}: {expected} ({error})") from error


def _indexed(rows: Any) -> Any:
    if hasattr(rows, "iterrows"):  # a DataFrame of pandas
        return rows.to_dict("records")
    return rows if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") else list(rows)


def _content(image: Any) -> str | bytes:
    """Return the absolute name of a file, or the encoded content of an image."""
    if isinstance(image, str | Path):
        return str(Path(image).expanduser().absolute())
    if isinstance(image, bytes):
        return image
    try:
        pixels = to_pixels(image)
    except BrokenImage as error:
        return str(error).encode()  # not an image, so it is counted as broken
    encoded = io.BytesIO()
    to_pil_image(pixels).save(encoded, "PNG")
    return encoded.getvalue()
