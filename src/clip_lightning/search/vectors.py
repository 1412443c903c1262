"""FAISS: which index for how many vectors, building it, and exact cosines of what it finds.

N vectors, Q queries, D their width; all of unit length, so that inner products are cosines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_lightning.errors import UserError

IndexType = Literal["flat", "hnsw", "ivfpq"]
# A flat index is exact and needs no training. It reads every vector for every query: 200 MB for 100,000 of
# width 512, some ten milliseconds. Beyond that, vectors are compressed to a bit a number: 64 MB for a
# million. A graph answers several times as fast where pictures have neighbours, for 1.3 GB of memory and
# minutes of building.
MOST_FLAT = 100_000
FEWEST_IVFPQ = 1_000
CHUNK = 65_536
MOST_SCANNED = 1_000_000  # compressed vectors that a query passes over, some four milliseconds on a core
# Queries at a time; and candidates, so that they stay in the processor's cache
QUERIES, ROWS = 64, 512


def faiss_module() -> Any:
    """The package faiss.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("an index needs FAISS: pip install faiss-cpu") from error
    return faiss


def chosen_type(given: str, count: int) -> IndexType:
    """The type itself, or the one for this many vectors where it is `auto`.

    Raises:
        UserError: no such type, or too few vectors for it.
    """
    if given == "auto":
        return "flat" if count < MOST_FLAT else "ivfpq"
    if given not in ("flat", "hnsw", "ivfpq"):
        raise UserError(f"--type {given}: expected flat, hnsw, ivfpq or auto")
    if given == "ivfpq" and count < FEWEST_IVFPQ:
        raise UserError(
            f"--type ivfpq learns from the vectors, {FEWEST_IVFPQ:,} or more, and there are {count:,}; "
            "use --type flat"
        )
    return given  # type: ignore[return-value]


def build(kind: IndexType, vectors: np.ndarray) -> Any:
    """A FAISS index over vectors (N, D), in their order."""
    faiss = faiss_module()
    count, width = vectors.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        # fp16, as the vectors are stored: nothing is lost
        index = faiss.IndexHNSWSQ(width, faiss.ScalarQuantizer.QT_fp16, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 100, 128
    else:
        index = _trained_ivfpq(faiss, vectors)
    for start in range(0, count, CHUNK):
        index.add(_single(vectors[start : start + CHUNK]))
    return index


def search(
    index: Any, kind: IndexType, vectors: np.ndarray, queries: np.ndarray, k: int
) -> list[list[tuple[int, float]]]:
    """For each query (Q, D) the k best rows with their cosines, the best first; fewer where N is smaller."""
    k = min(k, index.ntotal)
    queries = _single(queries)
    wide = k
    if kind == "hnsw":
        index.hnsw.efSearch = max(128, 2 * k, index.ntotal // 2_000)
    elif kind == "ivfpq":
        # of uniform random vectors, which are the hardest, that many hold 96 % of the k best of a million
        wide = min(index.ntotal, math.ceil(2 * math.sqrt(k * min(index.ntotal, MOST_SCANNED))))
    found = []
    for start in range(0, len(queries), QUERIES):
        block = queries[start : start + QUERIES]
        for query, scores, rows in zip(block, *index.search(block, wide), strict=True):
            there = rows >= 0  # -1 where an approximate index found no more
            rows, scores = rows[there], scores[there]
            if kind == "ivfpq":  # its own scores are of compressed vectors
                rows, scores = _scored(vectors, rows, query, k)
            found.append(list(zip(rows.tolist(), scores.tolist(), strict=True)))
    return found


def _scored(
    vectors: np.ndarray, rows: np.ndarray, query: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of some rows with their exact cosines, the best first.

    FAISS multiplies fp16 vectors in a tenth of the time in which NumPy turns them into fp32.
    """
    faiss = faiss_module()
    exact = faiss.IndexScalarQuantizer(len(query), faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    best = [(np.empty(0, rows.dtype), np.empty(0, np.float32))]
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        exact.reset()
        exact.add_sa_codes(np.asarray(vectors[part], np.float16).view(np.uint8))
        scores, places = exact.search(query[None], min(k, len(part)))
        best.append((part[places[0]], scores[0]))
    found, scores = (np.concatenate(each) for each in zip(*best, strict=True))
    order = np.argsort(-scores, kind="stable")[:k]
    return found[order], scores[order]


def write_index(index: Any, path: Path) -> None:
    """Write a FAISS index."""
    faiss_module().write_index(index, str(path))


def read_index(path: Path) -> Any:
    """Read a FAISS index into memory."""
    faiss = faiss_module()
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-120:]
        raise UserError(f"{path} is damaged ({reason}); build the index anew in another folder") from error


def _trained_ivfpq(faiss: Any, vectors: np.ndarray) -> Any:
    """An index of compressed vectors, a bit a number, laid out so that a processor scans 16 at a time.

    Up to `MOST_SCANNED` of them are one list; more are divided into lists, of which a query sees the nearest.
    """
    count, width = vectors.shape
    parts = max(part for part in range(1, max(1, width // 4) + 1) if width % part == 0)
    lists = round(math.sqrt(count)) if count > MOST_SCANNED else 1
    kind = f"PQ{parts}x4fs" if lists == 1 else f"IVF{lists},PQ{parts}x4fs"
    index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    wanted = max(64 * lists, 65_536)
    chosen = np.arange(count)
    if count > wanted:
        chosen = np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))
    index.train(_single(vectors[chosen]))
    if lists > 1:
        index.nprobe = math.ceil(lists * MOST_SCANNED / count)
    return index


def _single(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)
