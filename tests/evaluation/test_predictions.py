"""Queries have the right images and captions, whatever is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.predictions import (
    Answer,
    captions_of,
    choose_captions,
    find_captions,
    find_images,
)
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks

COUNTS = [1, 5, 0, 2, 7, 3]


def records(counts: list[int]) -> list[CaptionedImage]:
    """Image n with as many captions as counts[n]; each caption says whose it is."""
    return [
        CaptionedImage(Path(f"{n}.png"), tuple(f"picture {n} caption {c}" for c in range(count)))
        for n, count in enumerate(counts)
    ]


def perfect(counts: list[int]) -> Embeddings:
    """Every image on an axis of its own, with its captions."""
    axes, ids = torch.eye(len(counts)), torch.arange(len(counts))
    owner = ids.repeat_interleave(torch.tensor(counts))
    return Embeddings(axes, axes[owner], ids, owner, torch.arange(len(owner)))


def taken(whole: Embeddings, images: list[int], captions: list[int]) -> Embeddings:
    """Return only these rows."""
    rows = {"image": images, "image_id": images} | dict.fromkeys(
        ("text", "text_image_id", "text_id"), captions
    )
    return Embeddings(**{name: getattr(whole, name)[chosen] for name, chosen in rows.items()})


@pytest.mark.parametrize("missing", [[], [1]])
def test_each_caption_gets_its_own_text_and_image(missing: list[int]) -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    there = [n for n in range(6) if n not in missing]
    captions = [row for row in range(18) if whole.text_image_id[row] not in missing]
    queries = find_images(taken(whole, there, captions), images, range(6), range(18), k=3)
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
    queries = find_captions(whole, images, range(6), range(6), k=4)
    assert [query.id for query in queries] == [0, 1, 3, 4, 5]  # image 2 has no captions
    for query in queries:
        assert (query.item, query.wanted) == (images[query.id].path, images[query.id].captions)
        assert (query.rank, query.hit, query.candidates) == (1, True, 18)
        own = min(COUNTS[query.id], 4)
        assert query.answers[:own] == tuple(Answer(text, 1.0, right=True) for text in query.wanted[:own])
        assert not any(answer.right for answer in query.answers[own:])
    part = taken(whole, [0, 2, 3, 4, 5], [0, 3, 6, 8, 17])  # captions of images 0, 1, 3, 4, 5
    queries = find_captions(part, images, range(6), range(6), k=2)
    assert [(q.id, q.rank, q.candidates) for q in queries] == [(n, 1, 5) for n in (0, 3, 4, 5)]
    first = [query.answers[0].item[8:] for query in queries]
    assert first == ["0 caption 0", "3 caption 0", "4 caption 0", "5 caption 2"]


def test_an_image_is_known_by_its_id_not_by_its_place() -> None:
    images, whole = records([1] * 10), perfect([1] * 10)
    (query,) = find_images(taken(whole, [7, 8, 9], [7, 8, 9]), images, range(10), [9], k=3)
    assert [answer.item.stem for answer in query.answers] == ["9", "7", "8"]  # 7 and 8 are tied


def test_rank_is_that_of_the_metric_and_of_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = perfect([3] * 40)
    image = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many exact ties
    text = torch.randint(-1, 2, (120, 3), generator=generator).float()
    noisy = replace(exact, image=image, text=text)
    both = retrieval_ranks(image, text, exact.text_image_id)
    for find, size, ranks in zip((find_images, find_captions), (40, 120), both, strict=True):
        queries = find(noisy, records([3] * 40), range(40), range(len(ranks)), k=size)
        assert [query.rank for query in queries] == ranks.tolist()
        for query in queries:
            assert [answer.right for answer in query.answers].index(True) == query.rank - 1
            assert len({answer.item for answer in query.answers}) == size
            found = [answer.similarity for answer in query.answers]
            assert found == sorted(found, reverse=True)


def test_identical_images_count_as_one() -> None:
    images, axes = records([1] * 5), torch.eye(4)
    image = axes[[0, 1, 1, 2, 3]]  # images 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[0.0, 0.9, 0.5, 0.0]]))
    embeddings = Embeddings(image, text, torch.arange(5), torch.tensor([2]), torch.tensor([2]))
    (query,) = find_images(embeddings, images, [0, 1, 1, 3, 4], [2], k=5)
    assert (query.rank, query.candidates, query.wanted[0].stem) == (1, 4, "2")
    assert [answer.item.stem for answer in query.answers] == ["1", "3", "0", "4"]
    assert [answer.right for answer in query.answers] == [True, False, False, False]


def test_the_captions_of_an_identical_image_are_its_own() -> None:
    images = records([1] * 4)
    image = torch.eye(3)[[0, 1, 1, 2]]  # images 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.9], [0.0, 0.9, 0.5], [0.0, 0.8, 0.6]]))
    embeddings = Embeddings(image, text, torch.arange(4), torch.arange(4), torch.arange(4))
    first, twin = find_captions(embeddings, images, [0, 1, 1, 3], [1, 2], k=3)
    assert first.answers == twin.answers
    found = [(answer.item[8], answer.right) for answer in first.answers]
    assert found == [("2", True), ("3", False), ("1", True)]
    assert (first.rank, twin.rank) == (1, 1)
    assert (first.wanted, twin.wanted) == (images[1].captions, images[2].captions)


@pytest.mark.parametrize("find", [find_images, find_captions])
def test_disagreement_is_an_error_not_a_wrong_image(find) -> None:
    whole = perfect([2, 2])
    shifted = replace(whole, text_image_id=whole.text_image_id.flip(0))
    with pytest.raises(ValueError, match="assign a caption to another image than the records"):
        find(shifted, records([2, 2]), range(2), [1], k=1)


def test_queries_are_fixed_spread_and_one_per_image() -> None:
    images = records([index % 4 for index in range(400)])
    chosen = choose_captions(images, 16, seed=3)
    assert chosen == choose_captions(images, 16, seed=3) != choose_captions(images, 16, seed=4)
    owners = [captions_of(images)[text_id][0] for text_id in chosen]
    assert len(set(owners)) == 16
    assert {owner // 100 for owner in owners} == {0, 1, 2, 3}
    assert len(choose_captions(images, 1000, seed=0)) == 300
    assert choose_captions(records([0, 0]), 4, seed=0) == choose_captions([], 4, seed=0) == []
