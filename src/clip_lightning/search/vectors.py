"""Searches unit-length embeddings, exactly with NumPy or approximately with FAISS.

N embeddings, Q queries, D the width of both. Inner products are cosines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from clip_lightning.errors import UserError
from clip_lightning.search.folder import IndexType

# An exact search reads every embedding for every query: 200 MB for 100,000 of width 512, in about 10 ms.
# Larger indexes are compressed to one bit per number, 64 MB for a million; the best rows are scored again.
MOST_FLAT = 100_000
FEWEST_IVFPQ = 1_000
MOST_SCANNED = 1_000_000  # compressed embeddings per query, about 4 ms on one core
CHUNK = 65_536
QUERIES, SCORES = 64, 1 << 24  # limits per chunk, which bound the memory


def faiss_module() -> Any:
    """Import FAISS.

    Raises:
        UserError: FAISS is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("an index of type ivfpq needs FAISS; pip install faiss-cpu") from error
    return faiss


def chosen_type(given: str, count: int) -> IndexType:
    """Return the given type, or the type for this number of embeddings if it is `auto`.

    Raises:
        UserError: there are too few embeddings for the type, or FAISS is not installed.
    """
    if given not in ("auto", "flat", "ivfpq"):
        raise UserError(f"--type {given}: expected auto, flat or ivfpq")
    if given == "flat" or (given == "auto" and count < MOST_FLAT):
        return "flat"
    if count < FEWEST_IVFPQ:
        raise UserError(
            f"--type ivfpq needs {FEWEST_IVFPQ:,} images or more, got {count:,}; give --type flat"
        )
    faiss_module()
    return "ivfpq"


def build(vectors: np.ndarray) -> Any:
    """Build an approximate FAISS index of embeddings (N, D), in their order.

    The embeddings are compressed to one bit per number, in a layout of which a processor scans 16 at a time,
    and also stored in fp16 to score candidates exactly. Up to `MOST_SCANNED` embeddings form one list; more
    are divided into several lists, of which a query scans the nearest.
    """
    faiss = faiss_module()
    count, width = vectors.shape
    parts = max(part for part in range(1, max(1, width // 4) + 1) if width % part == 0)
    lists = round(math.sqrt(count)) if count > MOST_SCANNED else 1
    kind = f"PQ{parts}x4fs" if lists == 1 else f"IVF{lists},PQ{parts}x4fs"
    index = faiss.index_factory(width, f"{kind},Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(count)[: max(64 * lists, CHUNK)]
    index.train(vectors[np.sort(sample)])
    if lists > 1:
        faiss.extract_index_ivf(index).nprobe = math.ceil(lists * MOST_SCANNED / count)
    for start in range(0, count, CHUNK):
        index.add(vectors[start : start + CHUNK])
    return index


def write_index(index: Any, path: Path) -> None:
    """Write a FAISS index."""
    faiss_module().write_index(index, str(path))


def read_index(path: Path, size: int) -> Any:
    """Read a FAISS index of the given size in bytes, with memory-mapped fp16 embeddings."""
    faiss = faiss_module()
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} is not complete")  # FAISS would crash
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def search(index: Any, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
    """Find the k best rows for each query (Q, D), with their cosines, the best first.

    Args:
        index: embeddings (N, D) fp32, which are searched exactly, or an index returned by `build`.
        queries: unit-length embeddings.
        k: number of rows per query; all rows are returned if there are fewer.
    """
    if k < 1:
        raise UserError(f"--k {k}: expected 1 or more")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    exact = isinstance(index, np.ndarray)
    count = len(index) if exact else index.ntotal
    step = max(1, min(QUERIES, SCORES // count))
    results = []
    for start in range(0, len(queries), step):
        find = _search_exactly if exact else _search_approximately
        scored = find(index, queries[start : start + step], min(k, count))
        for scores, rows in zip(*scored, strict=True):
            valid = rows >= 0  # FAISS returns -1 if it finds fewer
            results.append(list(zip(rows[valid].tolist(), scores[valid].tolist(), strict=True)))
    return results


def _search_exactly(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ vectors.T
    rows = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    best = np.take_along_axis(scores, rows, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)


def _search_approximately(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    # enough candidates for a recall of 96 % on a million uniform random vectors, the hardest case
    candidates = max(k, math.ceil(2 * math.sqrt(k * min(index.ntotal, MOST_SCANNED))))
    wide = (min(index.ntotal, candidates) + 0.5) / k
    scores_and_rows: tuple[np.ndarray, np.ndarray] = index.search(
        queries, k, params=faiss_module().IndexRefineSearchParameters(k_factor=wide)
    )
    return scores_and_rows
