"""Retrieval figures against a brute-force loop, by hand, and under everything that must not matter."""

import random
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lightning.evaluation.retrieval import retrieval_metrics, retrieval_ranks

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def brute_force(image, text, text_image_id, image_id) -> dict[str, float]:
    """One loop a query, Python integers only."""
    images = dict(zip(image_id.tolist(), image.long().tolist(), strict=True))
    captions = list(zip(text_image_id.tolist(), text.long().tolist(), strict=True))

    def score(a: list[int], b: list[int]) -> int:
        return sum(x * y for x, y in zip(a, b, strict=True))

    ranks: dict[str, list[int]] = {"text_to_image": [], "image_to_text": []}
    for owner, words in captions:
        if owner in images:
            bar = score(images[owner], words)
            wrong = [score(picture, words) for name, picture in images.items() if name != owner]
            ranks["text_to_image"].append(1 + sum(s >= bar for s in wrong))
    for name, picture in images.items():
        right = [score(picture, words) for owner, words in captions if owner == name]
        if right:
            wrong = [score(picture, words) for owner, words in captions if owner != name]
            ranks["image_to_text"].append(1 + sum(s >= max(right) for s in wrong))
    metrics = {
        f"{way}_R@{k}": 100 * sum(r <= k for r in found) / len(found)
        for way, found in ranks.items()
        for k in (1, 5, 10)
    }
    metrics["rsum"] = sum(metrics.values())
    for way, found in ranks.items():
        metrics[f"{way}_median_rank"] = statistics.median(found)
        metrics[f"{way}_mean_rank"] = statistics.mean(found)
    return metrics


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small whole numbers, so that ties are many and exact; strays on both sides; any order."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    count, width, spread = draw(st.integers(1, 14)), draw(st.integers(1, 4)), draw(st.integers(0, 3))

    def vector() -> list[int]:
        return [rng.randint(-spread, spread) for _ in range(width)]

    images = [(name, vector()) for name in rng.sample(range(50), count)]
    captions = [(name, vector()) for name, _ in images for _ in range(rng.randint(1, 7))]
    images += [(100 + extra, vector()) for extra in range(draw(st.integers(0, 2)))]  # without captions
    captions += [(200, vector()) for _ in range(draw(st.integers(0, 3)))]  # without their image
    rng.shuffle(images)
    rng.shuffle(captions)
    return (
        torch.tensor([v for _, v in images], dtype=torch.float32),
        torch.tensor([v for _, v in captions], dtype=torch.float32),
        torch.tensor([name for name, _ in captions]),
        torch.tensor([name for name, _ in images]),
    )


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_equals_brute_force_at_any_chunk_size(case: Case, data: st.DataObject) -> None:
    image, text, text_image_id, image_id = case
    chunk_size = data.draw(st.integers(1, len(image) + 1))
    found = retrieval_metrics(image, text, text_image_id, image_id=image_id, chunk_size=chunk_size)
    assert found == pytest.approx(brute_force(*case), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.integers(1, 7), st.integers(1, 61))
def test_neither_order_nor_chunks_change_a_bit(seed: int, count: int, each: int, chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 33, generator=generator)
    image[count // 2] = image[0]  # two pictures alike: a tie that rounding could break
    image = F.normalize(image, dim=1)
    owner = torch.arange(count).repeat_interleave(each)
    text = F.normalize(torch.randn(len(owner), 33, generator=generator) + image[owner], dim=1)
    whole = retrieval_metrics(image, text, owner, chunk_size=count)
    i, t = torch.randperm(count, generator=generator), torch.randperm(len(owner), generator=generator)
    assert retrieval_metrics(image[i], text[t], owner[t], image_id=i, chunk_size=chunk_size) == whole


def test_by_hand() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])
    text_image_id = torch.tensor([0, 0, 1, 2, 9])  # picture 9 could not be read
    # caption:             0      1      2      3
    # scores by picture:   1 0 .6 0 1 .8 .8 .6 .96  .6 .8 1
    # rank of the own one: 1      3      3          1
    # picture 0: own 1.0, tied with the stray caption → 2; picture 1: own .6, below 1 and .8 → 3;
    # picture 2: own 1.0, first → 1
    text_rank, image_rank = retrieval_ranks(image, text, text_image_id)
    assert text_rank.tolist() == [1, 3, 3, 1, 0]
    assert image_rank.tolist() == [2, 3, 1]
    third = 100 / 3
    assert retrieval_metrics(image, text, text_image_id, ks=(1, 2)) == pytest.approx(
        {
            "text_to_image_R@1": 50, "text_to_image_R@2": 50,
            "text_to_image_median_rank": 2, "text_to_image_mean_rank": 2,
            "image_to_text_R@1": third, "image_to_text_R@2": 2 * third,
            "image_to_text_median_rank": 2, "image_to_text_mean_rank": 2,
            "rsum": 50 + third + 4 * 100,
        }
    )  # fmt: skip


def test_half_precision_context_leaves_the_scores_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(100, 16, generator=generator) for _ in range(2))
    plain = retrieval_metrics(image, text, torch.arange(100))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(image, text, torch.arange(100)) == plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.ones(3)}, r"image \(I, D\).*got \(3,\), \(4, 2\), \(4,\), \(3,\)"),
        ({"text": torch.ones(4, 5)}, r"text \(N, D\).*got \(3, 2\), \(4, 5\), \(4,\), \(3,\)"),
        ({"image": torch.ones(0, 2)}, r"I and N above 0, got \(0, 2\)"),
        ({"text_image_id": torch.arange(3)}, r"text_image_id \(N,\).*\(4, 2\), \(3,\), \(3,\)"),
        ({"image_id": torch.tensor([0, 1, 1])}, "twice"),
        ({"image": torch.tensor([[torch.nan, 0], [0, 1], [1, 0]])}, "1 of 3 image embeddings"),
        ({"text": torch.full((4, 2), torch.inf)}, "4 of 4 text embeddings"),
        ({"text_image_id": torch.full((4,), 7)}, "no caption belongs"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"ks": (0, 1)}, "ks"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], message: str) -> None:
    given = {"image": torch.eye(3, 2), "text": torch.ones(4, 2), "text_image_id": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**(given | change))
