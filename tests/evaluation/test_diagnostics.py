"""Similarities, recall curves and misses against values computed by hand and by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from clip_lightning.evaluation import diagnostics
from clip_lightning.evaluation.diagnostics import recall_curve, similarities, worst_queries
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_metrics, retrieval_ranks


def embed(image: list[list[float]], text: list[list[float]], owner: list[int]) -> Embeddings:
    vectors = (normalize(torch.tensor(rows, dtype=torch.float32)) for rows in (image, text))
    return Embeddings(*vectors, torch.arange(len(image)), torch.tensor(owner), torch.arange(len(text)))


def random_embeddings(images: int, each: int) -> Embeddings:
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(each)
    image = normalize(torch.randn(images, 16, generator=generator))
    text = normalize(image[owner] + torch.randn(len(owner), 16, generator=generator))
    return Embeddings(image, text, torch.arange(images), owner, torch.arange(len(owner)))


def test_similarities_by_hand() -> None:
    # Cosines, pictures down and captions across: 1.0 0.6 0.0 / 0.0 0.8 1.0, the owners being 0, 0, 1.
    found = similarities(embed([[1, 0], [0, 1]], [[1, 0], [0.6, 0.8], [0, 1]], [0, 0, 1]), range(2))
    assert found.matched.sum() == found.unmatched.sum() == 3
    assert found.matched[199] == 2 and found.matched[159:161].sum() == 1  # 0.6 and 0.8 lie on borders
    assert found.unmatched[100] == 2 and found.unmatched[179:181].sum() == 1
    assert found.matched_mean == pytest.approx(2.6 / 3)
    assert found.unmatched_mean == pytest.approx(0.8 / 3)
    assert found.separation == pytest.approx(100 * 8 / 9)  # 0.6 loses against 0.8 alone
    assert found.edges[[0, 100, -1]].tolist() == [-1, 0, 1]


def test_identical_pictures_are_no_unmatched_pair_and_missing_ones_no_matched_one() -> None:
    whole = embed([[1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]], [0, 1, 2])
    found = similarities(whole, [0, 0, 2])
    assert (found.matched.sum(), found.unmatched.sum(), found.unmatched_mean) == (3, 4, 0)
    part = Embeddings(whole.image[:2], whole.text, whole.image_id[:2], whole.text_image_id, whole.text_id)
    found = similarities(part, [0, 0, 2])
    assert (found.matched.sum(), found.unmatched.sum(), found.matched_mean) == (2, 2, 1)


def test_one_picture_has_no_unmatched_pair() -> None:
    found = similarities(embed([[1, 0]], [[1, 0]], [0]), [0])
    assert found.unmatched.sum() == 0
    assert math.isnan(found.unmatched_mean) and math.isnan(found.separation)


def test_samples_count_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = random_embeddings(50, 3)
    whole = similarities(embeddings, range(50))
    scores = (embeddings.image @ embeddings.text.T)[torch.arange(50)[:, None] != embeddings.text_image_id]
    assert whole.unmatched.sum() == len(scores) == 50 * 147
    assert whole.unmatched_mean == pytest.approx(scores.mean().item(), abs=1e-6)
    beaten = (embeddings.image[embeddings.text_image_id] * embeddings.text).sum(1)[:, None] > scores
    assert whole.separation == pytest.approx(100 * beaten.double().mean().item(), abs=0.5)
    monkeypatch.setattr(diagnostics, "MOST_IMAGES", 10)
    monkeypatch.setattr(diagnostics, "MOST_TEXTS", 30)
    few = similarities(embeddings, range(50))
    assert 300 - 30 <= few.unmatched.sum() <= 300
    assert torch.equal(few.matched, whole.matched)
    assert torch.equal(few.unmatched, similarities(embeddings, range(50)).unmatched)


def test_recall_curve_by_hand_and_as_the_metric_has_it() -> None:
    ranks = torch.tensor([1, 3, 0, 2, 250, 3])  # 0 asked nothing
    assert recall_curve(ranks, 4).tolist() == [20, 40, 80, 80]
    assert recall_curve(torch.tensor([0]), 2).isnan().all()
    embeddings = random_embeddings(60, 4)
    metrics = retrieval_metrics(embeddings.image, embeddings.text, embeddings.text_image_id)
    ranks, _ = retrieval_ranks(embeddings.image, embeddings.text, embeddings.text_image_id)
    curve = recall_curve(ranks)
    assert len(curve) == 100 and (curve.diff() >= 0).all()
    for k in (1, 5, 10):
        assert curve[k - 1].item() == pytest.approx(metrics[f"text_to_image_R@{k}"])


def test_the_worst_queries_are_the_worst_one_a_picture() -> None:
    embeddings = random_embeddings(60, 4)
    ranks, _ = retrieval_ranks(embeddings.image, embeddings.text, embeddings.text_image_id)
    worst = worst_queries(embeddings, range(60), 5)
    found = [int(ranks[text_id]) for text_id in worst]
    assert found == sorted(found, reverse=True) and found[0] == ranks.max()
    assert len({text_id // 4 for text_id in worst}) == 5
    others = [n for n in range(240) if n // 4 not in {text_id // 4 for text_id in worst}]
    assert ranks[others].max() <= found[-1]


def test_identical_pictures_and_hits_are_no_misses() -> None:
    embeddings = embed([[1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0.1], [1, 0.9]], [0, 1, 2])
    assert worst_queries(embeddings, [0, 1, 2], 9) == [2, 0, 1]  # a picture's twin outranks it
    assert worst_queries(embeddings, [0, 0, 2], 9) == [2]
    assert worst_queries(embeddings, [0, 0, 2], 0) == []
