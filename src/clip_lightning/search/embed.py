"""Embeds images and captions into the parts of an embeddings folder, skipping what is embedded already."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from pyarrow import ArrowException
from torch import Tensor
from tqdm import tqdm

from clip_lightning.data.formats import NothingFound, read_captions
from clip_lightning.data.image_formats import READ_SUFFIXES, counted, is_image, walk
from clip_lightning.data.images import RETRY_SECONDS, UnreadableFile, decode_bytes, read_file
from clip_lightning.errors import UserError
from clip_lightning.model.clip import CLIP
from clip_lightning.model.encode import encode_images, encode_texts
from clip_lightning.search.folder import EmbeddingsFolder, Manifest, Row
from clip_lightning.terminal import one_line

_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def find_images(source: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the captions of each image by absolute path, and the reasons for which paths cannot be stored.

    In a folder, all images are found, except those in hidden folders, with the captions of its annotations if
    `read_captions` finds any. In an annotation file, the images that it names are found.

    Raises:
        UserError: there are no images.
    """
    if not source.exists():
        raise UserError(f"no folder or file {source}; give a folder of images or a data set")
    captions_of: dict[str, tuple[str, ...]] = {}
    broken: dict[str, str] = {}
    if source.is_dir():
        skipped: Counter[str] = Counter()
        for folder, names in walk(source.resolve(), skipped):
            captions_of |= {os.path.join(folder, name): () for name in names if is_image(name)}
        if skipped:
            print(one_line(f"skipped: {counted(skipped)}"), file=sys.stderr)
    try:
        data = read_captions(source)
    except UserError as error:
        if not source.is_dir():
            raise
        if not isinstance(error, NothingFound):  # there are captions, but they cannot be read
            print(one_line(f"continuing without captions: {error}"), file=sys.stderr)
    else:
        captions_of |= {os.path.abspath(image.path): image.captions for image in data.images}
        if not source.is_dir():
            for name, reason in data.left_out.items():
                print(one_line(f"left out {name}: {reason}"), file=sys.stderr)
    for path in [path for path in captions_of if path != path.encode(errors="replace").decode()]:
        del captions_of[path]
        broken[path.encode(errors="replace").decode()] = "its name is not UTF-8"
    if not captions_of:
        raise UserError(
            f"no images in {source}; expected files that end in {', '.join(sorted(READ_SUFFIXES))}"
        )
    return dict(sorted(captions_of.items())), broken


class Embedder:
    """Writes the parts of a folder, and reuses embeddings that are in the folder already.

    Attributes:
        broken: reasons for which images cannot be decoded, by path.
        unreadable: reasons for which files could not be read this time, by path.
        embedded: number of images that were embedded.
    """

    def __init__(
        self, clip: CLIP, folder: EmbeddingsFolder, wanted: Manifest, batch_size: int, threads: int
    ) -> None:
        """Read the rows that are in the folder."""
        self.clip, self.folder, self.wanted = clip, folder, wanted
        self.batch_size, self.threads = batch_size, threads
        self.broken: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.embedded = 0
        self._pauses: Sequence[float] = RETRY_SECONDS
        self._rows: dict[str, list[Row]] = {}
        self._known: dict[Any, tuple[str, int]] = {}
        self._vectors = lru_cache(4)(folder.vectors)
        if folder.root.is_dir():
            self._look_for("")

    def write(self, captions_of: Mapping[str, Sequence[str]], *, wait: bool) -> dict[str, int]:
        """Write the missing parts, and return the number of rows of each part by name.

        Args:
            captions_of: captions of each image by absolute path; other processes may be writing the same.
            wait: whether to wait for parts that other processes are writing, instead of leaving them out.
        """
        parts = self._plan(captions_of)
        names = {stem: self._part_of(stem, rows) for stem, rows in parts.items()}
        missing = [stem for stem, name in names.items() if name is None]
        total = sum(len(parts[stem]) for stem in missing)
        off = not total or not wait
        with tqdm(total=total, desc="embedding", unit="row", disable=off) as self._bar:
            for waits, stem in product((False, True) if wait else (False,), missing):
                lock = FileLock(self.folder.root / f".{stem}.lock", timeout=-1 if waits else 0)
                if names[stem] is None:
                    with contextlib.suppress(Timeout), lock:
                        self._look_for(stem)
                        names[stem] = self._part_of(stem, parts[stem]) or self._write(stem, parts[stem])
        return {name: len(self._rows[name]) for name in names.values() if name is not None}

    def digests(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 of each image in these parts by path."""
        rows = (row for part in parts for row in self._rows.get(part, []))
        return {row["path"]: row["sha256"] for row in rows if "sha256" in row}

    def _plan(self, captions_of: Mapping[str, Sequence[str]]) -> dict[str, list[Row]]:
        """Return the known values of the rows of each part by stem; all processes get the same result."""
        images: list[Row] = []
        for path, texts in captions_of.items():
            try:
                status = os.stat(path)
            except OSError as error:
                self.unreadable[path] = error.strerror or str(error)
            else:
                about = {"file_size": status.st_size, "modified_ns": status.st_mtime_ns}
                images.append({"path": path, "captions": list(texts), **about})
        captions = [{"path": path, "caption": text} for path, texts in captions_of.items() for text in texts]
        size = self.wanted.shard_size
        return {
            f"{kind}-{start // size:05}-of-{-(-len(rows) // size):05}": rows[start : start + size]
            for kind, rows in (("images", images), ("captions", captions))
            if self.wanted.what in (kind, "both")
            for start in range(0, len(rows), size)
        }

    def _look_for(self, stem: str) -> None:
        """Read parts that this process has not written."""
        for name in self.folder.parts(stem):
            # an incomplete, damaged or just replaced part is ignored
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, ArrowException):
                if name not in self._rows and self.folder.is_intact(name):
                    self._learn(name, [json.loads(line) for line in self.folder.lines(name)])

    def _learn(self, name: str, rows: list[Row]) -> None:
        for number, row in enumerate(rows):
            self._known[_key(row)] = self._known[row.get("sha256")] = name, number
        self._rows[name] = rows

    def _part_of(self, stem: str, wanted: list[Row]) -> str | None:
        """Return the name of a part with exactly the wanted rows, if there is one."""
        for name, rows in self._rows.items():
            if name.startswith(f"{stem}-") and name.endswith(self.wanted.format) and len(rows) == len(wanted):
                if all(row.items() >= about.items() for row, about in zip(rows, wanted, strict=True)):
                    return name
        return None

    def _write(self, stem: str, wanted: list[Row]) -> str:
        missing = [row for row in wanted if _key(row) not in self._known]
        self._bar.update(len(wanted) - len(missing))
        fresh: dict[Any, np.ndarray] = {}
        try:
            (self._embed_images if stem.startswith("images") else self._embed_captions)(missing, fresh)
        finally:  # after Ctrl-C, too: the next command resumes from here
            rows, vectors = [], []
            for row in wanted:
                if (key := _key(row)) in fresh:
                    rows.append(row)
                    vectors.append(fresh[key])
                elif key in self._known:
                    name, number = self._known[key]
                    rows.append(self._rows[name][number] | row)
                    vectors.append(self._vectors(name)[number])
            array = np.array(vectors, np.float32).reshape(-1, self.wanted.width)
            part = self.folder.write_part(stem, self.wanted.format, rows, array)
            self._learn(part, rows)
        return part

    def _embed_images(self, missing: list[Row], fresh: dict[Any, np.ndarray]) -> None:
        def decode(row: Row) -> Tensor | None:
            data = read_file(Path(row["path"]), self._pauses)
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 in self._known:
                self._known[_key(row)] = self._known[sha256]
                return None
            pixels = decode_bytes(data)
            row |= {"sha256": sha256, "width": pixels.shape[2], "height": pixels.shape[1]}
            return self.clip.transform(pixels)

        batches = encode_images(
            self.clip.image_tower,
            missing,
            decode,
            project=self.clip.project_image,
            batch_size=self.batch_size,
            threads=self.threads,
            precision=_AUTOCAST[self.wanted.precision],
        )
        for batch in batches:
            fresh |= zip((_key(missing[row]) for row in batch.rows), batch.features.numpy(), strict=True)
            for row, _, reason in batch.broken:
                if isinstance(reason, UnreadableFile):
                    self._pauses = ()  # retry only for the first unreadable file
                    self.unreadable[missing[row]["path"]] = str(reason)
                else:
                    self.broken[missing[row]["path"]] = str(reason)
            self.embedded += len(batch.rows)
            self._bar.update(batch.size)

    def _embed_captions(self, missing: list[Row], fresh: dict[Any, np.ndarray]) -> None:
        texts = list(dict.fromkeys(map(_key, missing)))
        vectors = encode_texts(
            self.clip.text_tower,
            texts,
            project=self.clip.project_text,
            batch_size=self.batch_size,
            precision=_AUTOCAST[self.wanted.precision],
        )
        fresh |= zip(texts, vectors.numpy(), strict=True)
        self._bar.update(len(missing))


def _key(row: Row) -> Any:
    """Return the identity of a row: its caption, or its file with size and modification time."""
    return row["caption"] if "caption" in row else (row["path"], row["file_size"], row["modified_ns"])
