"""Approximate indexes against brute force: what they find, with which scores, in which batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clip_lightning.search import vectors


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int, width: int = 32) -> np.ndarray:
    """Unit vectors around 40 centres, the same ones for every seed."""
    centres = np.random.default_rng(0).normal(size=(40, width))
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(40, size=count)] + 0.5 * rng.normal(size=(count, width)))


def uniform(count: int, seed: int, width: int = 32) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def recall(found: list[list[tuple[int, float]]], stored: np.ndarray, queries: np.ndarray, k: int) -> float:
    """The share of the k best by brute force that were found."""
    best = np.argsort(-(queries @ stored.astype(np.float32).T), axis=1)[:, :k]
    assert all(len(hits) == k for hits in found)
    shared = [
        len({row for row, _ in hits} & set(rows)) for hits, rows in zip(found, best.tolist(), strict=True)
    ]
    return sum(shared) / best.size


@pytest.fixture
def on_disk(tmp_path: Path) -> np.ndarray:
    """4,000 vectors as an index keeps them: fp16, memory-mapped."""
    np.save(tmp_path / "vectors.npy", clustered(4000, 1).astype(np.float16))
    mapped: np.ndarray = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    return mapped


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_scores_are_exact_and_best_first(kind: vectors.IndexType, on_disk: np.ndarray) -> None:
    queries = clustered(20, 2)
    found = vectors.search(vectors.build(kind, on_disk), kind, on_disk, queries, 30)
    for query, hits in zip(queries, found, strict=True):
        rows, scores = zip(*hits, strict=True)
        np.testing.assert_allclose(scores, on_disk[list(rows)].astype(np.float32) @ query, atol=1e-6)
        assert list(scores) == sorted(scores, reverse=True)
        assert len(set(rows)) == 30


@pytest.mark.parametrize("count", [1000, 4000])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_uniform_vectors_are_found_too(count: int, k: int) -> None:
    """They have no neighbours that compression would keep together."""
    stored, queries = uniform(count, 1).astype(np.float16), uniform(100, 2)
    found = vectors.search(vectors.build("ivfpq", stored), "ivfpq", stored, queries, k)
    assert recall(found, stored, queries, k) > 0.93


@pytest.mark.parametrize("width", [32, 30, 33])
def test_any_width_can_be_compressed(width: int) -> None:
    stored, queries = clustered(3000, 1, width).astype(np.float16), clustered(30, 2, width)
    found = vectors.search(vectors.build("ivfpq", stored), "ivfpq", stored, queries, 10)
    assert recall(found, stored, queries, 10) > 0.95


def test_a_large_k_has_enough_candidates(on_disk: np.ndarray) -> None:
    queries = clustered(5, 2)
    index = vectors.build("ivfpq", on_disk)
    assert recall(vectors.search(index, "ivfpq", on_disk, queries, 3000), on_disk, queries, 3000) == 1
    assert [len(hits) for hits in vectors.search(index, "ivfpq", on_disk, queries, 9000)] == [4000] * 5


def test_many_queries_find_what_each_finds_alone(on_disk: np.ndarray) -> None:
    queries = clustered(2 * vectors.QUERIES + 3, 2)
    index = vectors.build("ivfpq", on_disk)
    together = vectors.search(index, "ivfpq", on_disk, queries, 5)
    assert together == [vectors.search(index, "ivfpq", on_disk, query[None], 5)[0] for query in queries]
    assert vectors.search(index, "ivfpq", on_disk, queries[:0], 5) == []


def test_more_than_a_query_scans_are_divided_into_lists(
    on_disk: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "MOST_SCANNED", 1000)
    vectors.write_index(vectors.build("ivfpq", on_disk), tmp_path / "lists.index")
    index = vectors.read_index(tmp_path / "lists.index")
    assert (index.nlist, index.nprobe) == (63, 16)
    queries = clustered(50, 2)
    found = vectors.search(index, "ivfpq", on_disk, queries, 10)
    assert recall(found, on_disk, queries, 10) > 0.95
