"""Searches unit-length embeddings, exactly with NumPy or approximately with FAISS.

N embeddings, Q queries, D the width of both. Inner products are cosines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from clip_lightning.errors import UserError

# An exact search reads every embedding for every query: 200 MB for 100,000 of width 512, in about 10 ms.
# Larger indexes are compressed to one bit per number, 64 MB for a million; the best rows are scored again.
MOST_FLAT = 100_000
FEWEST_IVFPQ = 1_000
MOST_SCANNED = 1_000_000  # compressed embeddings per query, about 4 ms on one core
CHUNK = 65_536
QUERIES, SCORES = 64, 1 << 24  # limits per chunk, which bound the memory


def faiss_module() -> Any:
    """Import FAISS, or raise a `UserError` if it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("an index of type ivfpq needs FAISS; pip install faiss-cpu") from error
    return faiss


def chosen_type(given: str, count: int) -> str:
    """Return the given type, or the type for this number of embeddings if it is `auto`."""
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
    for start in range(0, count, CHUNK):  # which bounds the memory
        index.add(vectors[start : start + CHUNK])
    return index


def read_index(file: Path, size: int) -> Any:
    """Read a FAISS index of the given size in bytes, with memory-mapped fp16 embeddings."""
    faiss = faiss_module()
    if file.stat().st_size != size:
        raise ValueError(f"{file.name} is not complete")  # FAISS would crash
    return faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)


def search(index: Any, queries: Any, k: int) -> list[list[tuple[int, float]]]:
    """Find the k best rows, or all if there are fewer, for each query, with their cosines, the best first.

    The index is embeddings (N, D) fp32, which are searched exactly, or was made by `build`. The queries are
    unit-length embeddings (Q, D), as an array or a tensor.
    """
    if k < 1:
        raise UserError(f"--k {k}: expected 1 or more")
    queries = np.asarray(queries.detach().cpu() if hasattr(queries, "detach") else queries, np.float32)
    is_exact = isinstance(index, np.ndarray)
    count, width = index.shape if is_exact else (index.ntotal, index.d)
    if queries.ndim != 2 or queries.shape[1] != width:
        raise UserError(f"embeddings of shape {queries.shape}: expected (queries, {width})")
    k, step = min(k, count), max(1, min(QUERIES, SCORES // count))
    results = []
    for chunk in (queries[start : start + step] for start in range(0, len(queries), step)):
        if is_exact:
            all_scores = chunk @ index.T
            best = np.sort(np.argpartition(-all_scores, k - 1, axis=1)[:, :k], axis=1)  # ties by row
            order = np.argsort(-np.take_along_axis(all_scores, best, 1), axis=1, kind="stable")
            found_rows = np.take_along_axis(best, order, 1)
            found_scores = np.take_along_axis(all_scores, found_rows, 1)
        else:
            # enough candidates for a recall of 96 % on a million uniform random vectors, the hardest case
            candidates = min(count, max(k, math.ceil(2 * math.sqrt(k * min(count, MOST_SCANNED)))))
            parameters = faiss_module().IndexRefineSearchParameters(k_factor=(candidates + 0.5) / k)
            found_scores, found_rows = index.search(chunk, k, params=parameters)
        for scores, rows in zip(found_scores, found_rows, strict=True):
            valid = rows >= 0  # FAISS returns -1 if it finds fewer
            results.append(list(zip(rows[valid].tolist(), scores[valid].tolist(), strict=True)))
    return results
