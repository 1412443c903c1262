"""Queries have the right images and captions, whatever is missing and in whatever order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.predictions import (
    Answer,
    choose_captions,
    find_captions,
    find_images,
    images_of,
)
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks

COUNTS = [1, 5, 0, 2, 7, 3]


def records(counts: list[int], folder: Path = Path("pictures")) -> list[CaptionedImage]:
    """Picture n with as many captions as counts[n]; each caption says whose it is."""
    return [
        CaptionedImage(folder / f"{n}.png", tuple(f"picture {n} caption {c}" for c in range(count)))
        for n, count in enumerate(counts)
    ]


def perfect(counts: list[int]) -> Embeddings:
    """Every picture on an axis of its own, with its captions."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    axes = one_hot(torch.arange(len(counts))).float()
    return Embeddings(axes, axes[owner], torch.arange(len(counts)), owner, torch.arange(len(owner)))


def taken(whole: Embeddings, pictures: list[int], captions: list[int]) -> Embeddings:
    """These rows, in this order."""
    return Embeddings(
        whole.image[pictures],
        whole.text[captions],
        whole.image_id[pictures],
        whole.text_image_id[captions],
        whole.text_id[captions],
    )


def test_each_caption_gets_its_own_text_and_picture() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    rows = find_images(whole, images, range(6), range(18), k=3)
    assert [row.item for row in rows] == [caption for image in images for caption in image.captions]
    for row in rows:
        assert row.item.startswith(f"picture {row.wanted[0].stem} ")
        assert (row.rank, row.hit, row.candidates, len(row.answers)) == (1, True, 6, 3)
        assert row.answers[0] == Answer(row.wanted[0], 1.0, right=True)
        assert not any(other.right for other in row.answers[1:])


def test_missing_pictures_and_another_order_move_nothing() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    captions = [row for row in range(18) if whole.text_image_id[row] != 1]  # picture 1 could not be read
    part = taken(whole, [5, 0, 4, 3, 2], captions[::-1])
    rows = find_images(part, images, range(6), range(18), k=5)
    assert [row.id for row in rows] == captions
    for row in rows:
        assert row.item.startswith(f"picture {row.wanted[0].stem} ")
        assert row.answers[0] == Answer(row.wanted[0], 1.0, right=True)
        assert images[1].path not in [prediction.item for prediction in row.answers]


def test_a_picture_is_known_by_its_id_not_by_its_place() -> None:
    """The ancestor's fault: positions among the embeddings used as positions in the whole list."""
    images, whole = records([1] * 10), perfect([1] * 10)
    (row,) = find_images(taken(whole, [8, 9, 7], [9, 8, 7]), images, range(10), [9], k=3)
    assert [prediction.item.stem for prediction in row.answers] == ["9", "7", "8"]  # 7 and 8 are level


def test_rank_is_that_of_the_metric_and_of_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3] * 40
    exact = perfect(counts)
    image = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many exact ties
    text = torch.randint(-1, 2, (120, 3), generator=generator).float()
    noisy = Embeddings(image, text, exact.image_id, exact.text_image_id, exact.text_id)
    ranks, _ = retrieval_ranks(image, text, exact.text_image_id)
    rows = find_images(noisy, records(counts), range(40), range(120), k=40)
    assert [row.rank for row in rows] == ranks.tolist()
    for row in rows:
        assert row.answers[row.rank - 1].right
        assert len({prediction.item for prediction in row.answers}) == 40
        similarities = [prediction.similarity for prediction in row.answers]
        assert similarities == sorted(similarities, reverse=True)


def test_identical_pictures_count_as_one() -> None:
    images, axes = records([1] * 5), torch.eye(4)
    image = axes[[0, 1, 1, 2, 3]]  # pictures 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[0.0, 0.9, 0.5, 0.0]]))
    embeddings = Embeddings(image, text, torch.arange(5), torch.tensor([2]), torch.tensor([2]))
    (row,) = find_images(embeddings, images, [0, 1, 1, 3, 4], [2], k=5)
    assert (row.rank, row.candidates, row.wanted[0].stem) == (1, 4, "2")
    assert [prediction.item.stem for prediction in row.answers] == ["2", "3", "0", "4"]
    assert [prediction.right for prediction in row.answers] == [True, False, False, False]


def test_disagreement_is_an_error_not_a_wrong_picture() -> None:
    images, whole = records([2, 2]), perfect([2, 2])
    shifted = Embeddings(whole.image, whole.text, whole.image_id, whole.text_image_id.flip(0), whole.text_id)
    for rows in (find_images, find_captions):
        with pytest.raises(ValueError, match=r"row 0 belongs to image 0, .* assign it to image 1"):
            rows(shifted, images, range(2), [1], k=1)
        with pytest.raises(ValueError, match="expected k of 1"):
            rows(whole, images, range(2), [1], k=0)
    with pytest.raises(ValueError, match="expected a row below 4"):
        find_images(whole, images, range(2), [4], k=1)


def test_queries_are_fixed_spread_and_one_a_picture() -> None:
    images = records([index % 4 for index in range(400)])
    owner = [n for n, image in enumerate(images) for _ in image.captions]
    chosen = choose_captions(images, 16, seed=3)
    assert chosen == choose_captions(images, 16, seed=3) != choose_captions(images, 16, seed=4)
    pictures = [owner[text_id] for text_id in chosen]
    assert len(set(pictures)) == 16
    assert {picture // 100 for picture in pictures} == {0, 1, 2, 3}
    assert len(choose_captions(images, 1000, seed=0)) == 300
    assert choose_captions(records([0, 0]), 4, seed=0) == choose_captions([], 4, seed=0) == []
    assert images_of(images, chosen) == pictures


def test_each_picture_gets_its_own_captions() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    rows = find_captions(whole, images, range(6), range(6), k=4)
    assert [row.id for row in rows] == [0, 1, 3, 4, 5]  # nobody wrote anything for picture 2
    for row in rows:
        assert (row.item, row.wanted) == (images[row.id].path, images[row.id].captions)
        assert (row.rank, row.hit, row.candidates) == (1, True, 18)
        own = min(COUNTS[row.id], 4)
        assert row.answers[:own] == tuple(Answer(text, 1.0, right=True) for text in row.wanted[:own])
        assert not any(found.right for found in row.answers[own:])


def test_missing_captions_and_another_order_move_nothing_of_the_pictures() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    part = taken(whole, [5, 0, 4, 3, 2], [17, 6, 0, 8, 3])  # captions of pictures 5, 3, 0, 4, 1
    rows = find_captions(part, images, range(6), range(6), k=2)
    assert [(row.id, row.rank, row.candidates) for row in rows] == [
        (0, 1, 5),
        (3, 1, 5),
        (4, 1, 5),
        (5, 1, 5),
    ]
    assert [row.answers[0].item for row in rows] == [
        "picture 0 caption 0",
        "picture 3 caption 0",
        "picture 4 caption 0",
        "picture 5 caption 2",
    ]


def test_rank_of_a_picture_is_that_of_the_metric_and_of_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3] * 40
    exact = perfect(counts)
    image = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many exact ties
    text = torch.randint(-1, 2, (120, 3), generator=generator).float()
    noisy = Embeddings(image, text, exact.image_id, exact.text_image_id, exact.text_id)
    _, ranks = retrieval_ranks(image, text, exact.text_image_id)
    rows = find_captions(noisy, records(counts), range(40), range(40), k=120)
    assert [row.rank for row in rows] == ranks.tolist()
    for row in rows:
        assert next(n for n, found in enumerate(row.answers, 1) if found.right) == row.rank
        assert len({found.item for found in row.answers}) == 120
        found = [found.similarity for found in row.answers]
        assert found == sorted(found, reverse=True)


def test_the_captions_of_an_identical_picture_are_its_own() -> None:
    images = records([1] * 4)
    image = torch.eye(3)[[0, 1, 1, 2]]  # pictures 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.9], [0.0, 0.9, 0.5], [0.0, 0.8, 0.6]]))
    embeddings = Embeddings(image, text, torch.arange(4), torch.arange(4), torch.arange(4))
    first, twin = find_captions(embeddings, images, [0, 1, 1, 3], [1, 2], k=3)
    assert first.answers == twin.answers
    assert [(found.item[8], found.right) for found in first.answers] == [
        ("2", True),
        ("3", False),
        ("1", True),
    ]
    assert (first.rank, twin.rank, first.wanted, twin.wanted) == (
        1,
        1,
        images[1].captions,
        images[2].captions,
    )
