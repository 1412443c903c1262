"""Intervals against equations, the bootstrap, and simulations of how often they hold the true value."""

import math
import re
from statistics import NormalDist

import numpy as np
import pytest
import torch

from clip_lightning.evaluation.intervals import Hits, hits, paired_differences, recall_intervals, wilson
from clip_lightning.evaluation.retrieval import fold_metrics, retrieval_metrics, retrieval_ranks


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


def test_queries_without_an_answer_are_not_counted():
    # the second caption's image is absent, the second image has no caption
    found = hits(torch.tensor([1, 0]), torch.tensor([2, 0]), torch.tensor([0, 0]))
    assert found.asked.tolist() == [[1] * 6, [0] * 6]
    assert found.right.tolist() == [[1, 1, 1, 0, 1, 1], [0] * 6]


def bootstrap(one: Hits, other: Hits | None = None) -> np.ndarray:
    """R@k and rsum (or their differences) of 2,000 draws of images with replacement."""
    rng, images = np.random.default_rng(0), len(one.right)
    counts = rng.multinomial(images, np.full(images, 1 / images), size=2000)
    right = one.right - (0 if other is None else other.right)
    recalls = 100 * (counts @ right) / (counts @ one.asked)
    return np.column_stack([recalls, recalls.sum(1)])


def test_intervals_are_those_of_the_bootstrap_far_from_the_edge():
    image, text, owner = random_split(400, 2.5)
    found = hits(*retrieval_ranks(image, text, owner), owner)
    metrics = retrieval_metrics(image, text, owner)
    low, high = np.percentile(bootstrap(found), (2.5, 97.5), axis=0)
    for place, (name, bounds) in enumerate(recall_intervals(found).items()):
        assert bounds == pytest.approx((low[place], high[place]), abs=0.1 * (high[place] - low[place])), name
        assert bounds[0] < metrics[name] < bounds[1]


def test_one_query_per_image_has_wilsons_interval():
    ranks = torch.tensor([1] * 17 + [7] * 3)
    found = recall_intervals(hits(ranks, ranks, torch.arange(20)))
    for name, bounds in found.items():
        right, best = (17 if name.endswith(("@1", "@5")) else 20), 100
        if name != "rsum":
            assert bounds == pytest.approx(tuple(best / 100 * end for end in wilson(right, 20))), name


def test_four_images_without_a_miss_are_not_certain():
    found = split_hits(4, 0.01)
    for name, (low, high) in recall_intervals(found).items():
        best = 600 if name == "rsum" else 100
        assert high == best and low == pytest.approx(best / 100 * wilson(4, 4)[0], rel=0.05), name
    for difference, low, high, p in paired_differences(found, found).values():
        assert low < difference == 0 < high and p == 1


def simulated(recall: tuple[float, ...], images: int, seed: int) -> Hits:
    """Images with five captions each, of which one is as hard as the next; `recall` are the true R@1|5|10."""
    rng = np.random.default_rng(seed)
    difficulty = 0.7 * rng.standard_normal((images, 1)) + math.sqrt(0.51) * rng.standard_normal((images, 6))
    bars = [NormalDist().inv_cdf(share) for share in recall]
    right = [(difficulty[:, :5] < bar).sum(1) for bar in bars] + [difficulty[:, 5] < bar for bar in bars]
    asked = np.broadcast_to(np.repeat([5.0, 1.0], 3), (images, 6))
    return Hits(np.stack(right, 1).astype(float), asked)


@pytest.mark.parametrize("images", [8, 100])
@pytest.mark.parametrize("recall", [(0.01, 0.03, 0.05), (0.3, 0.5, 0.7), (0.95, 0.98, 0.995)])
def test_intervals_cover_the_true_value(recall: tuple[float, ...], images: int):
    true, worse = np.array([*recall] * 2), np.array(recall) * 0.9
    covered: dict[str, list[bool]] = {}
    for seed in range(400):
        found = simulated(recall, images, seed)
        other = simulated(tuple(worse), images, seed + 10_000)
        goals = dict(zip(recall_intervals(found), 100 * np.append(true, true.sum()), strict=True))
        for name, (low, high) in recall_intervals(found).items():
            covered.setdefault(name, []).append(low <= goals[name] + 1e-9 and goals[name] <= high + 1e-9)
        for name, (_, low, high, _) in paired_differences(found, other).items():
            covered.setdefault(f"{name} difference", []).append(low <= 0.1 * goals[name] <= high)
    rates = {name: np.mean(held) for name, held in covered.items()}
    # Wilson's interval of single queries dips to 82 % at worst; 400 draws have a standard error of 1 %
    single = {name for name in rates if re.fullmatch(r"image_to_text_R@\d+", name)}
    lowest = {name: 0.8 if name in single else 0.93 for name in rates}
    assert np.mean([rates[name] for name in single]) > 0.89
    assert {name: rate for name, rate in rates.items() if rate < lowest[name]} == {}


def test_paired_test_sees_a_difference_and_none():
    better, worse = split_hits(150, 1.0), split_hits(150, 1.6)
    low, high = np.percentile(bootstrap(better, worse), (2.5, 97.5), axis=0)
    found = paired_differences(better, worse)
    for place, (difference, *bounds, p) in enumerate(found.values()):
        assert bounds == pytest.approx([low[place], high[place]], abs=0.2 * (high[place] - low[place]))
        assert bounds[0] < difference < bounds[1]
        assert (p < 0.05) == (bounds[0] > 0)
    difference, low, high, p = found["rsum"]
    assert 0 < low and p < 1e-4
    assert paired_differences(worse, better)["rsum"] == pytest.approx((-difference, -high, -low, p))
    with pytest.raises(ValueError, match="different images"):
        paired_differences(better, split_hits(150, 1.0, seed=1))


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
