"""Queries have the right answers, and similarities, recall and misses are those of loops and by hand."""

import math
from dataclasses import replace

import pytest
import torch
from small_splits import embedded, noisy, perfect, records

from clip_lightning.evaluation import predictions
from clip_lightning.evaluation.predictions import (
    Answer,
    captions_of,
    choose_captions,
    find_captions,
    find_images,
    histogram,
    merge_identical,
    recall_curve,
    separation,
    similarities,
    worst_queries,
)
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_metrics, retrieval_ranks

COUNTS = [1, 5, 0, 2, 7, 3]


def taken(whole: Embeddings, images: list[int], captions: list[int]) -> Embeddings:
    """Return only these rows."""
    rows = {"image": images, "image_id": images}
    rows |= dict.fromkeys(("text", "text_image_id", "text_id"), captions)
    return Embeddings(**{name: getattr(whole, name)[chosen] for name, chosen in rows.items()})


@pytest.mark.parametrize("missing", [[], [1]])
def test_each_caption_gets_its_own_text_and_image(missing: list[int]) -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    there = [n for n in range(6) if n not in missing]
    captions = [row for row in range(18) if whole.text_image_id[row] not in missing]
    queries = find_images(taken(whole, there, captions), images, range(18), k=3)
    assert [query.id for query in queries] == captions
    for query in queries:
        index, text = captions_of(images)[query.id]
        assert (query.item, query.wanted) == (text, (images[index].path,))
        assert (query.rank, query.hit, query.candidates, len(query.answers)) == (1, True, len(there), 3)
        assert query.answers[0] == Answer(images[index].path, 1.0, right=True)
        assert not any(answer.right for answer in query.answers[1:])
        assert not {images[n].path for n in missing} & {answer.item for answer in query.answers}


def test_each_image_gets_its_own_captions() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    queries = find_captions(whole, images, range(6), k=4)
    assert [query.id for query in queries] == [0, 1, 3, 4, 5]  # image 2 has no captions
    for query in queries:
        assert (query.item, query.wanted) == (images[query.id].path, images[query.id].captions)
        assert (query.rank, query.hit, query.candidates) == (1, True, 18)
        own = min(COUNTS[query.id], 4)
        assert query.answers[:own] == tuple(Answer(text, 1.0, right=True) for text in query.wanted[:own])
        assert not any(answer.right for answer in query.answers[own:])
    part = taken(whole, [0, 2, 3, 4, 5], [0, 3, 6, 8, 17])  # captions of images 0, 1, 3, 4, 5
    queries = find_captions(part, images, range(6), k=2)
    assert [(q.id, q.rank, q.candidates) for q in queries] == [(n, 1, 5) for n in (0, 3, 4, 5)]
    first = [query.answers[0].item[8:] for query in queries]
    assert first == ["0 caption 0", "3 caption 0", "4 caption 0", "5 caption 2"]


def test_an_image_is_known_by_its_id_not_by_its_place() -> None:
    images, whole = records([1] * 10), perfect([1] * 10)
    (query,) = find_images(taken(whole, [7, 8, 9], [7, 8, 9]), images, [9], k=3)
    assert [answer.item.stem for answer in query.answers] == ["9", "7", "8"]  # 7 and 8 are tied


def test_rank_is_that_of_the_metric_and_of_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = perfect([3] * 40)
    image = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many exact ties
    text = torch.randint(-1, 2, (120, 3), generator=generator).float()
    tied = replace(exact, image=image, text=text)
    both = retrieval_ranks(image, text, exact.text_image_id)
    for find, size, ranks in zip((find_images, find_captions), (40, 120), both, strict=True):
        queries = find(tied, records([3] * 40), range(len(ranks)), k=size)
        assert [query.rank for query in queries] == ranks.tolist()
        for query in queries:
            assert [answer.right for answer in query.answers].index(True) == query.rank - 1
            assert len({answer.item for answer in query.answers}) == size
            found = [answer.similarity for answer in query.answers]
            assert found == sorted(found, reverse=True)


def test_identical_images_count_as_one() -> None:
    images, axes = records([1] * 5), torch.eye(4)
    image = axes[[0, 1, 1, 2, 3]]  # images 1 and 2 are the same file under two names
    text = torch.tensor([[0.0, 0.9, 0.5, 0.0]])
    embeddings = Embeddings(image, text, torch.arange(5), torch.tensor([2]), torch.tensor([2]))
    (query,) = find_images(merge_identical(embeddings, images, [0, 1, 1, 3, 4]), images, [2], k=5)
    assert (query.rank, query.candidates, query.wanted[0].stem) == (1, 4, "2")
    assert [answer.item.stem for answer in query.answers] == ["1", "3", "0", "4"]
    assert [answer.right for answer in query.answers] == [True, False, False, False]


def test_the_captions_of_an_identical_image_are_its_own() -> None:
    images = records([1] * 4)
    image = torch.eye(3)[[0, 1, 1, 2]]  # images 1 and 2 are the same file under two names
    text = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.9], [0.0, 0.9, 0.5], [0.0, 0.8, 0.6]])
    merged = merge_identical(embedded(image, text, torch.arange(4)), images, [0, 1, 1, 3])
    (query,) = find_captions(merged, images, [1, 2], k=3)
    found = [(answer.item[8], answer.right) for answer in query.answers]
    assert found == [("2", True), ("3", False), ("1", True)]
    assert (query.rank, query.wanted) == (1, images[1].captions + images[2].captions)


def test_queries_are_fixed_spread_and_one_per_image() -> None:
    images = records([index % 4 for index in range(400)])
    chosen = choose_captions(images, 16, seed=3)
    assert chosen == choose_captions(images, 16, seed=3) != choose_captions(images, 16, seed=4)
    owners = [captions_of(images)[text_id][0] for text_id in chosen]
    assert len(set(owners)) == 16
    assert {owner // 100 for owner in owners} == {0, 1, 2, 3}
    assert len(choose_captions(images, 1000, seed=0)) == 300
    assert choose_captions(records([0, 0]), 4, seed=0) == choose_captions([], 4, seed=0) == []


def test_similarities_by_hand() -> None:
    # Cosines, pictures down and captions across: 1.0 0.6 0.0 / 0.0 0.8 1.0, the owners being 0, 0, 1.
    pairs = similarities(embedded([[1, 0], [0, 1]], [[1, 0], [0.6, 0.8], [0, 1]], [0, 0, 1]))
    matched, unmatched = map(histogram, pairs)
    assert matched.sum() == unmatched.sum() == 3
    assert matched[199] == 2 and matched[159:161].sum() == 1  # 0.6 and 0.8 lie on borders
    assert unmatched[100] == 2 and unmatched[179:181].sum() == 1
    assert pairs[0].tolist() == pytest.approx([1, 0.6, 1])
    assert sorted(pairs[1].tolist()) == pytest.approx([0, 0, 0.8])
    assert separation(*pairs) == pytest.approx(100 * 8 / 9)  # 0.6 loses against 0.8 alone
    assert predictions.EDGES[[0, 100, -1]].tolist() == [-1, 0, 1]


def test_identical_pictures_are_no_unmatched_pair_and_missing_ones_no_matched_one() -> None:
    whole = embedded([[1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0], [0, 1]], [0, 1, 2])
    for part in (whole, taken(whole, [0, 1], [0, 1, 2])):
        matched, unmatched = similarities(merge_identical(part, records([1] * 3), [0, 0, 2]))
        assert matched.tolist() == [1] * len(part.image)
        assert unmatched.tolist() == ([0, 0, 0] if part is whole else [0])
    pairs = similarities(perfect([1]))
    assert len(pairs[1]) == 0 and math.isnan(separation(*pairs))


def test_samples_are_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = noisy(50, 3)
    matched, unmatched = similarities(embeddings)
    scores = (embeddings.image @ embeddings.text.T)[torch.arange(50)[:, None] != embeddings.text_image_id]
    assert len(scores) == 50 * 147
    torch.testing.assert_close(unmatched, scores)
    beaten = (embeddings.image[embeddings.text_image_id] * embeddings.text).sum(1)[:, None] > scores
    assert separation(matched, unmatched) == pytest.approx(100 * beaten.double().mean().item(), abs=0.5)
    monkeypatch.setattr(predictions, "MOST_IMAGES", 10)
    monkeypatch.setattr(predictions, "MOST_TEXTS", 30)
    few = similarities(embeddings)
    assert 300 - 30 <= len(few[1]) <= 300
    assert torch.equal(few[0], matched)
    assert torch.equal(few[1], similarities(embeddings)[1])


def test_recall_curve_by_hand_and_as_the_metric_has_it() -> None:
    ranks = torch.tensor([1, 3, 0, 2, 250, 3])  # 0 asked nothing
    assert recall_curve(ranks, 4).tolist() == [20, 40, 80, 80]
    assert recall_curve(torch.tensor([0]), 2).isnan().all()
    embeddings = noisy(60, 4)
    metrics = retrieval_metrics(embeddings.image, embeddings.text, embeddings.text_image_id)
    ranks, _ = retrieval_ranks(embeddings.image, embeddings.text, embeddings.text_image_id)
    curve = recall_curve(ranks, 100)
    assert len(curve) == 100 and (curve.diff() >= 0).all()
    for k in (1, 5, 10):
        assert curve[k - 1].item() == pytest.approx(metrics[f"text_to_image_R@{k}"])


def test_the_worst_queries_are_the_worst_one_a_picture() -> None:
    embeddings = noisy(60, 4)
    ranks, _ = retrieval_ranks(embeddings.image, embeddings.text, embeddings.text_image_id)
    worst = worst_queries(embeddings, 5)
    found = [int(ranks[text_id]) for text_id in worst]
    assert found == sorted(found, reverse=True) and found[0] == ranks.max()
    assert len({text_id // 4 for text_id in worst}) == 5
    others = [n for n in range(240) if n // 4 not in {text_id // 4 for text_id in worst}]
    assert ranks[others].max() <= found[-1]


def test_identical_pictures_and_hits_are_no_misses() -> None:
    embeddings = embedded([[1, 0], [1, 0], [0, 1]], [[1, 0], [1, 0.1], [1, 0.9]], [0, 1, 2])
    assert worst_queries(embeddings, 9) == [2, 0, 1]  # a picture's twin outranks it
    merged = merge_identical(embeddings, records([1] * 3), [0, 0, 2])
    assert (worst_queries(merged, 9), worst_queries(merged, 0)) == ([2], [])
