"""Wilson's interval against its equation; the bootstrap against a loop that repeats rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clip_lightning.evaluation.folds import fold_metrics
from clip_lightning.evaluation.intervals import (
    Hits,
    bootstrap_intervals,
    hits,
    paired_bootstrap,
    wilson,
)
from clip_lightning.evaluation.retrieval import retrieval_metrics, retrieval_ranks


def random_split(images: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Embeddings of images with 1 to 3 captions each, and the captions' owners."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(images, 16, generator=generator)
    owner = torch.arange(images).repeat_interleave(torch.randint(1, 4, (images,), generator=generator))
    text = image[owner] + noise * torch.randn(len(owner), 16, generator=generator)
    normal = torch.nn.functional.normalize
    return normal(image, dim=1), normal(text, dim=1), owner


def split_hits(images: int, noise: float, seed: int = 0) -> Hits:
    image, text, owner = random_split(images, noise, seed)
    return hits(*retrieval_ranks(image, text, owner), owner)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (10, 10), (94, 505), (1, 1)])
def test_wilson_solves_its_equation(right: int, total: int):
    """The ends are the shares p for which |right/total - p| is 1.96 standard errors of p."""
    for end in (end / 100 for end in wilson(right, total)):
        error = math.sqrt(end * (1 - end) / total)
        assert abs(right / total - end) == pytest.approx(1.959964 * error, abs=1e-6)


def test_wilson_of_a_textbook():
    # 81 of 263 (Newcombe 1998, table I): 0.2553 to 0.3662
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.005)


@pytest.mark.parametrize(("right", "total"), [(0, 0), (2, 1), (-1, 3)])
def test_wilson_of_nothing(right: int, total: int):
    with pytest.raises(ValueError, match="expected 0 <= right <= total"):
        wilson(right, total)


def test_hits_give_the_metrics_of_the_split():
    image, text, owner = random_split(60, 1.5)
    found = hits(*retrieval_ranks(image, text, owner), owner)
    metrics = retrieval_metrics(image, text, owner)
    whole = found.recalls(np.ones((1, 60)))[0]
    assert dict(zip((*found.names, "rsum"), whole, strict=True)) == pytest.approx(
        {name: metrics[name] for name in (*found.names, "rsum")}
    )


def test_resampling_equals_repeating_rows():
    image, text, owner = random_split(40, 1.5)
    text_rank, image_rank = retrieval_ranks(image, text, owner)
    found = hits(text_rank, image_rank, owner)
    rng = np.random.default_rng(5)
    drawn = rng.integers(40, size=40)
    recalls = found.recalls(np.bincount(drawn, minlength=40)[None])[0]
    captions = np.concatenate([text_rank.numpy()[owner.numpy() == row] for row in drawn])
    for place, k in enumerate((1, 5, 10)):
        assert recalls[place] == pytest.approx(100 * (captions <= k).mean())
        assert recalls[3 + place] == pytest.approx(100 * (image_rank.numpy()[drawn] <= k).mean())
    assert recalls[6] == pytest.approx(recalls[:6].sum())


def test_queries_without_an_answer_are_not_counted():
    # the second caption's image is absent, the second image has no caption
    found = hits(torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([0, 0]), ks=(1,))
    assert found.asked.tolist() == [[1, 1], [0, 0]] and found.right.tolist() == [[1, 0], [0, 0]]


def test_intervals_are_seeded_and_hold_the_value():
    found = split_hits(200, 1.5)
    bounds = bootstrap_intervals(found, seed=1)
    assert bounds == bootstrap_intervals(found, seed=1) != bootstrap_intervals(found, seed=2)
    whole = dict(zip((*found.names, "rsum"), found.recalls(np.ones((1, 200)))[0], strict=True))
    assert all(low < whole[name] < high for name, (low, high) in bounds.items())
    # one query an image: the width is that of a share, 2 × 1.96 standard errors
    low, high = bounds["image_to_text_R@1"]
    share = whole["image_to_text_R@1"] / 100
    assert high - low == pytest.approx(392 * math.sqrt(share * (1 - share) / 200), rel=0.15)


def test_parts_of_the_draws_do_not_change_them(monkeypatch: pytest.MonkeyPatch):
    found = split_hits(50, 1.5)
    whole = bootstrap_intervals(found)
    monkeypatch.setattr("clip_lightning.evaluation.intervals._RESAMPLED_AT_A_TIME", 700)
    assert bootstrap_intervals(found) == whole


def test_paired_test_sees_a_difference_and_none():
    better, worse = split_hits(150, 1.0), split_hits(150, 1.6)
    difference, low, high, p = paired_bootstrap(better, worse)["rsum"]
    assert 0 < low < difference < high and p == pytest.approx(2 / 1001)
    difference, low, high, p = paired_bootstrap(worse, better)["rsum"]
    assert low < difference < high < 0 and p == pytest.approx(2 / 1001)
    assert paired_bootstrap(better, better)["rsum"] == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="same images"):
        paired_bootstrap(better, split_hits(150, 1.0, seed=1))


def test_folds_are_the_mean_of_their_own_retrievals():
    image, text, owner = random_split(25, 1.5)
    parts = [
        retrieval_metrics(image[a : a + 10], text[mine], owner[mine] - a)
        for a in (0, 10)
        for mine in [(owner >= a) & (owner < a + 10)]
    ]
    expected = {f"fold10_{name}": (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    assert fold_metrics(image, text, owner, fold=10) == pytest.approx(expected)
    assert fold_metrics(image, text, owner, fold=13) == {}
