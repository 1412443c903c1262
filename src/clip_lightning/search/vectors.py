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
# width 512, some ten milliseconds. A graph answers several times as fast, with links and fp32 vectors in
# memory, 2.3 GB for a million. Beyond that 128 bytes a picture are kept in memory instead of 2,048.
MOST_FLAT, MOST_HNSW = 100_000, 1_000_000
FEWEST_IVFPQ = 1_000
POINTS_PER_CENTROID = 39  # fewer and FAISS warns
CHUNK = 65_536
# Candidates for one result where the index knows only compressed vectors; the stored ones decide.
REFINE = 20


def faiss_module() -> Any:
    """The package faiss.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("an index needs FAISS: pip install 'clip-lightning[search]'") from error
    return faiss


def chosen_type(given: str, count: int) -> IndexType:
    """The type itself, or the one for this many vectors where it is `auto`.

    Raises:
        UserError: no such type, or too few vectors for it.
    """
    if given == "auto":
        return "flat" if count < MOST_FLAT else "hnsw" if count <= MOST_HNSW else "ivfpq"
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
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
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
    if kind == "hnsw":
        index.hnsw.efSearch = max(128, 2 * k)
    wide = min(index.ntotal, REFINE * k) if kind == "ivfpq" else k
    scores, ids = index.search(queries, wide)
    found = []
    for query, row_ids, row_scores in zip(queries, ids, scores, strict=True):
        there = row_ids >= 0  # -1 where an approximate index found no more
        row_ids, row_scores = row_ids[there], row_scores[there]
        if kind == "ivfpq":  # its own scores are of compressed vectors
            row_scores = vectors[row_ids].astype(np.float32) @ query
            order = np.argsort(-row_scores, kind="stable")[:k]
            row_ids, row_scores = row_ids[order], row_scores[order]
        found.append(list(zip(row_ids.tolist(), row_scores.tolist(), strict=True)))
    return found


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
    """Lists of compressed vectors: four numbers a byte, as many lists as are usual and can be learnt."""
    count, width = vectors.shape
    lists = max(1, min(round(4 * math.sqrt(count)), count // POINTS_PER_CENTROID))
    bits = min(8, int(math.log2(count / POINTS_PER_CENTROID)))
    parts = max(part for part in range(1, max(1, width // 4) + 1) if width % part == 0)
    index = faiss.index_factory(width, f"IVF{lists},PQ{parts}x{bits}", faiss.METRIC_INNER_PRODUCT)
    wanted = max(64 * lists, 64 * 256)
    chosen = np.arange(count)
    if count > wanted:
        chosen = np.sort(np.random.default_rng(0).choice(count, wanted, replace=False))
    index.train(_single(vectors[chosen]))
    index.nprobe = max(16, lists // 16)
    return index


def _single(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32)
