"""Search among embeddings against brute force: what is found, with which scores, in which batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_lightning.errors import UserError
from clip_lightning.search import vectors

Patch = pytest.MonkeyPatch
Hits = list[list[tuple[int, float]]]


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, seed: int, width: int = 32) -> np.ndarray:
    """Unit vectors around 40 centres, the same ones for every seed, as embeddings of a model are."""
    centres = np.random.default_rng(0).normal(size=(40, width))
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(40, size=count)] + 0.5 * rng.normal(size=(count, width)))


def uniform(count: int, seed: int, width: int = 32) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def recall(found: Hits, stored: np.ndarray, queries: np.ndarray, k: int) -> float:
    """The fraction of the k best by brute force that were found."""
    best = np.argsort(-(queries @ stored.T), axis=1, kind="stable")[:, :k]
    shared = [
        len({row for row, _ in hits} & set(rows)) for hits, rows in zip(found, best.tolist(), strict=True)
    ]
    return sum(shared) / best.size


def on_disk(stored: np.ndarray, folder: Path) -> Any:
    """The approximate index as a search reads it."""
    vectors.faiss_module().write_index(vectors.build(stored), str(folder / "é.faiss"))
    return vectors.read_index(folder / "é.faiss", (folder / "é.faiss").stat().st_size)


@pytest.mark.parametrize(("kind", "rounding"), [("flat", 1e-6), ("ivfpq", 5e-4)])
def test_scores_are_exact_and_the_best_come_first(kind: str, rounding: float, tmp_path: Path) -> None:
    stored, queries = clustered(4000, 1), clustered(20, 2)
    found = vectors.search(stored if kind == "flat" else on_disk(stored, tmp_path), queries, 30)
    assert recall(found, stored, queries, 30) >= (1 if kind == "flat" else 0.95)
    for query, hits in zip(queries, found, strict=True):
        rows, scores = zip(*hits, strict=True)
        np.testing.assert_allclose(scores, stored[list(rows)] @ query, atol=rounding)
        assert list(scores) == sorted(scores, reverse=True)
        assert len(set(rows)) == 30


@pytest.mark.parametrize(
    ("draw", "count", "width", "k", "least"),
    [
        # uniform vectors have no neighbours that compression would keep together
        *((uniform, count, 32, k, 0.93) for count in (1000, 4000) for k in (1, 10, 100)),
        *((clustered, 3000, width, 10, 0.95) for width in (32, 30, 33)),
        (clustered, 4000, 32, 3000, 0.999),
        (clustered, 4000, 32, 9000, 0.99999),  # all of them
    ],
)
def test_compressed_embeddings_are_found(
    draw: Callable[..., np.ndarray], count: int, width: int, k: int, least: float
) -> None:
    stored, queries = draw(count, 1, width), draw(50, 2, width)
    assert recall(vectors.search(vectors.build(stored), queries, k), stored, queries, k) > least


def test_many_queries_find_what_each_finds_alone() -> None:
    stored, queries = clustered(4000, 1), clustered(2 * vectors.QUERIES + 3, 2)
    index = vectors.build(stored)
    together = vectors.search(index, queries, 5)
    assert together == [vectors.search(index, query[None], 5)[0] for query in queries]
    assert vectors.search(index, queries[:0], 5) == vectors.search(stored, queries[:0], 5) == []


def test_more_than_a_query_scans_are_divided_into_lists(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(vectors, "MOST_SCANNED", 1000)
    stored, queries = clustered(4000, 1), clustered(50, 2)
    index = on_disk(stored, tmp_path)
    lists = vectors.faiss_module().extract_index_ivf(index)
    assert (lists.nlist, lists.nprobe) == (63, 16)
    assert recall(vectors.search(index, queries, 10), stored, queries, 10) > 0.95


def test_the_type_depends_on_the_number_of_images() -> None:
    types = {count: vectors.chosen_type("auto", count) for count in (1, 99_999, 100_000)}
    assert list(types.values()) == ["flat", "flat", "ivfpq"]
    with pytest.raises(UserError, match="give --type flat"):
        vectors.chosen_type("ivfpq", 50)
