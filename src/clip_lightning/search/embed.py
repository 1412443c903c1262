"""Pictures and captions → embeddings, kept in shards as they are made, so that a killed build goes on."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clip_lightning.data.images import BrokenImage, ImageTransform, decode_bytes
from clip_lightning.model.clip import CLIP
from clip_lightning.search.store import Row, load_shards, save_shard

SHARD_ROWS = 512
TEXT_BATCH = 128
PICTURES, CAPTIONS = "pictures", "captions"
FIELDS = [field.name for field in fields(Row) if field.name != "captions"]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture's size in pixels and its embedding (D,)."""

    width: int
    height: int
    vector: np.ndarray


class Known:
    """Embeddings that are there already, by content, and the content of files that are as they were."""

    def __init__(self) -> None:
        self.contents: dict[str, Embedded] = {}
        self._files: dict[tuple[str, int, int], str] = {}

    def add(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        """Remember these rows and their embeddings (rows, D)."""
        for row, vector in zip(rows, vectors, strict=True):
            self.contents[row.sha256] = Embedded(row.width, row.height, vector)
            self._files[row.path, row.file_size, row.modified_ns] = row.sha256

    def unchanged(self, path: str, status: os.stat_result) -> Row | None:
        """The row of a file whose size and time of change are those of one that is known."""
        sha256 = self._files.get((path, status.st_size, status.st_mtime_ns))
        return None if sha256 is None else _row(path, status, sha256, self.contents[sha256])


@dataclass(frozen=True)
class _Read:
    path: str
    row: Row | None = None
    pixels: Tensor | None = None
    """None where the content is known, too."""
    reason: str = ""


def embed_pictures(
    clip: CLIP, paths: Sequence[str], known: Known, pending: Path, batch_size: int, workers: int
) -> tuple[dict[str, Row], dict[str, str], int]:
    """Read every file, and run those through the image tower whose content is new.

    Args:
        clip: on the device where it is to run.
        paths: of the files.
        known: what need not be computed; what is computed is added.
        pending: folder for the finished shards.
        batch_size: pictures that the tower sees at once.
        workers: threads that read and decode.

    Returns:
        Rows by path, reasons by path of those that cannot be read, and how many went through the tower.
    """
    rows: dict[str, Row] = {}
    left_out: dict[str, str] = {}
    shard = _Shard(pending, known)
    embedded = 0
    with tqdm(total=len(paths), desc="pictures", unit="picture", mininterval=1, disable=not paths) as bar:
        try:
            for batch in _batches(paths, known.contents, clip.transform, batch_size, workers):
                fresh = [read for read in batch if read.pixels is not None]
                if fresh:
                    vectors = _run(clip, [read.pixels for read in fresh if read.pixels is not None])
                    shard.extend([read.row for read in fresh if read.row is not None], vectors)
                    embedded += len(fresh)
                rows |= {read.path: read.row for read in batch if read.row is not None}
                left_out |= {read.path: read.reason for read in batch if read.row is None}
                bar.update(len(batch))
        finally:  # after Ctrl-C too
            shard.flush()
    return rows, left_out, embedded


def embed_captions(clip: CLIP, captions: Sequence[str], known: dict[str, np.ndarray], pending: Path) -> None:
    """Add the embeddings of the captions that are not known."""
    for columns, vectors in load_shards(pending, CAPTIONS):
        known.update(zip(columns["caption"], vectors, strict=True))
    missing = sorted({text for text in captions if text not in known}, key=len)
    # neighbours of similar length, so that little is padding
    with tqdm(total=len(missing), desc="captions", unit="caption", mininterval=1, disable=not missing) as bar:
        for start in range(0, len(missing), 4 * SHARD_ROWS):
            texts = missing[start : start + 4 * SHARD_ROWS]
            vectors = clip.embed_texts(texts, TEXT_BATCH).numpy()
            save_shard(pending, CAPTIONS, {"caption": texts}, vectors)
            known.update(zip(texts, vectors.astype(np.float16), strict=True))
            bar.update(len(texts))


def load_pending(pending: Path, known: Known) -> None:
    """Remember what a build that was stopped has left."""
    for columns, vectors in load_shards(pending, PICTURES):
        values = zip(*(columns[name] for name in FIELDS), strict=True)
        known.add([Row(path, (), *rest) for path, *rest in values], vectors)


class _Shard:
    """Gathers rows until they are worth a file."""

    def __init__(self, folder: Path, known: Known) -> None:
        self._folder, self._known = folder, known
        self._rows: list[Row] = []
        self._vectors: list[np.ndarray] = []

    def extend(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
        self._rows += rows
        self._vectors.append(vectors)
        if len(self._rows) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        vectors = np.concatenate(self._vectors).astype(np.float16)
        columns = {name: [getattr(row, name) for row in self._rows] for name in FIELDS}
        save_shard(self._folder, PICTURES, columns, vectors)
        self._known.add(self._rows, vectors)
        self._rows, self._vectors = [], []


def _batches(
    paths: Sequence[str],
    known: Mapping[str, Embedded],
    transform: ImageTransform,
    batch_size: int,
    workers: int,
) -> Iterator[list[_Read]]:
    """The files in batches, two ahead of whoever asks, so that the tower need not wait.

    Threads, not processes: decoding, resizing and hashing let go of the interpreter's lock, and nothing has
    to be sent.
    """
    read: Callable[[str], _Read] = lambda path: _read(path, known, transform)  # noqa: E731
    # decoding hides warnings, which is not safe in threads: what is left over ends here
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        starts = range(0, len(paths), batch_size)
        batches = (pool.map(read, paths[start : start + batch_size]) for start in starts)
        ahead = deque(islice(batches, 2))
        while ahead:
            batch = list(ahead.popleft())
            ahead.extend(islice(batches, 1))
            yield batch


def _read(path: str, known: Mapping[str, Embedded], transform: ImageTransform) -> _Read:
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in known:
            return _Read(path, _row(path, status, sha256, known[sha256]))
        pixels = decode_bytes(data)
        now = os.stat(path)
    except BrokenImage as error:
        return _Read(path, reason=str(error))
    except OSError as error:
        return _Read(path, reason=error.strerror or str(error))
    if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        return _Read(path, reason="it changed while it was read; the next run takes it")
    size = Embedded(pixels.shape[2], pixels.shape[1], np.empty(0))
    return _Read(path, _row(path, status, sha256, size), transform(pixels))


def _row(path: str, status: os.stat_result, sha256: str, size: Embedded) -> Row:
    return Row(path, (), size.width, size.height, status.st_size, status.st_mtime_ns, sha256)


@torch.inference_mode()
def _run(clip: CLIP, pixels: list[Tensor]) -> np.ndarray:
    # channels last, as the decoders left them
    batch = torch.stack([picture.permute(1, 2, 0) for picture in pixels]).permute(0, 3, 1, 2)
    vectors: np.ndarray = clip.encode_image(batch.to(clip.logit_scale.device)).cpu().numpy()
    return vectors
