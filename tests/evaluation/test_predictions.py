"""The rows show the right pictures and sentences, whatever is missing and in whatever order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.predictions import (
    FoundCaption,
    Prediction,
    choose_pictures,
    choose_queries,
    picture_rows,
    prediction_rows,
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
    rows = prediction_rows(whole, images, range(6), range(18), k=3)
    assert [row.text for row in rows] == [caption for image in images for caption in image.captions]
    for row in rows:
        assert row.text.startswith(f"picture {row.true_path.stem} ")
        assert (row.rank, row.hit, row.candidates, len(row.predictions)) == (1, True, 6, 3)
        assert row.predictions[0] == Prediction(row.true_path, 1.0, right=True)
        assert not any(other.right for other in row.predictions[1:])


def test_missing_pictures_and_another_order_move_nothing() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    captions = [row for row in range(18) if whole.text_image_id[row] != 1]  # picture 1 could not be read
    part = taken(whole, [5, 0, 4, 3, 2], captions[::-1])
    rows = prediction_rows(part, images, range(6), range(18), k=5)
    assert [row.text_id for row in rows] == captions
    for row in rows:
        assert row.text.startswith(f"picture {row.true_path.stem} ")
        assert row.predictions[0] == Prediction(row.true_path, 1.0, right=True)
        assert images[1].path not in [prediction.path for prediction in row.predictions]


def test_a_picture_is_known_by_its_id_not_by_its_place() -> None:
    """The ancestor's fault: positions among the embeddings used as positions in the whole list."""
    images, whole = records([1] * 10), perfect([1] * 10)
    (row,) = prediction_rows(taken(whole, [8, 9, 7], [9, 8, 7]), images, range(10), [9], k=3)
    assert [prediction.path.stem for prediction in row.predictions] == ["9", "7", "8"]  # 7 and 8 are level


def test_rank_is_that_of_the_metric_and_of_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3] * 40
    exact = perfect(counts)
    image = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many exact ties
    text = torch.randint(-1, 2, (120, 3), generator=generator).float()
    noisy = Embeddings(image, text, exact.image_id, exact.text_image_id, exact.text_id)
    ranks, _ = retrieval_ranks(image, text, exact.text_image_id)
    rows = prediction_rows(noisy, records(counts), range(40), range(120), k=40)
    assert [row.rank for row in rows] == ranks.tolist()
    for row in rows:
        assert row.predictions[row.rank - 1].right
        assert len({prediction.path for prediction in row.predictions}) == 40
        similarities = [prediction.similarity for prediction in row.predictions]
        assert similarities == sorted(similarities, reverse=True)


def test_identical_pictures_count_as_one() -> None:
    images, axes = records([1] * 5), torch.eye(4)
    image = axes[[0, 1, 1, 2, 3]]  # pictures 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[0.0, 0.9, 0.5, 0.0]]))
    embeddings = Embeddings(image, text, torch.arange(5), torch.tensor([2]), torch.tensor([2]))
    (row,) = prediction_rows(embeddings, images, [0, 1, 1, 3, 4], [2], k=5)
    assert (row.rank, row.candidates, row.true_path.stem) == (1, 4, "2")
    assert [prediction.path.stem for prediction in row.predictions] == ["2", "3", "0", "4"]
    assert [prediction.right for prediction in row.predictions] == [True, False, False, False]


def test_disagreement_is_an_error_not_a_wrong_picture() -> None:
    images, whole = records([2, 2]), perfect([2, 2])
    shifted = Embeddings(whole.image, whole.text, whole.image_id, whole.text_image_id.flip(0), whole.text_id)
    for rows in (prediction_rows, picture_rows):
        with pytest.raises(ValueError, match="caption row 0 is of picture 0, but the embeddings say 1"):
            rows(shifted, images, range(2), [1], k=1)
        with pytest.raises(ValueError, match="k must be"):
            rows(whole, images, range(2), [1], k=0)
    with pytest.raises(ValueError, match="outside the split's 4 captions"):
        prediction_rows(whole, images, range(2), [4], k=1)


def test_queries_are_fixed_spread_and_one_a_picture() -> None:
    images = records([index % 4 for index in range(400)])
    owner = [n for n, image in enumerate(images) for _ in image.captions]
    chosen = choose_queries(images, 16, seed=3)
    assert chosen == choose_queries(images, 16, seed=3) != choose_queries(images, 16, seed=4)
    pictures = [owner[text_id] for text_id in chosen]
    assert len(set(pictures)) == 16
    assert {picture // 100 for picture in pictures} == {0, 1, 2, 3}
    assert len(choose_queries(images, 1000, seed=0)) == 300
    assert choose_queries(records([0, 0]), 4, seed=0) == choose_queries([], 4, seed=0) == []
    assert choose_pictures(images, 16, seed=3) == pictures
    assert choose_pictures([], 4, seed=0) == []


def test_each_picture_gets_its_own_captions() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    rows = picture_rows(whole, images, range(6), range(6), k=4)
    assert [row.image_id for row in rows] == [0, 1, 3, 4, 5]  # nobody wrote anything for picture 2
    for row in rows:
        assert (row.path, row.own) == (images[row.image_id].path, images[row.image_id].captions)
        assert (row.rank, row.hit, row.candidates) == (1, True, 18)
        own = min(COUNTS[row.image_id], 4)
        assert row.predictions[:own] == tuple(FoundCaption(text, 1.0, right=True) for text in row.own[:own])
        assert not any(found.right for found in row.predictions[own:])


def test_missing_captions_and_another_order_move_nothing_of_the_pictures() -> None:
    images, whole = records(COUNTS), perfect(COUNTS)
    part = taken(whole, [5, 0, 4, 3, 2], [17, 6, 0, 8, 3])  # captions of pictures 5, 3, 0, 4, 1
    rows = picture_rows(part, images, range(6), range(6), k=2)
    assert [(row.image_id, row.rank, row.candidates) for row in rows] == [
        (0, 1, 5),
        (3, 1, 5),
        (4, 1, 5),
        (5, 1, 5),
    ]
    assert [row.predictions[0].text for row in rows] == [
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
    rows = picture_rows(noisy, records(counts), range(40), range(40), k=120)
    assert [row.rank for row in rows] == ranks.tolist()
    for row in rows:
        assert next(n for n, found in enumerate(row.predictions, 1) if found.right) == row.rank
        assert len({found.text for found in row.predictions}) == 120
        found = [found.similarity for found in row.predictions]
        assert found == sorted(found, reverse=True)


def test_the_captions_of_an_identical_picture_are_its_own() -> None:
    images = records([1] * 4)
    image = torch.eye(3)[[0, 1, 1, 2]]  # pictures 1 and 2 are the same file under two names
    text = normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.9], [0.0, 0.9, 0.5], [0.0, 0.8, 0.6]]))
    embeddings = Embeddings(image, text, torch.arange(4), torch.arange(4), torch.arange(4))
    first, twin = picture_rows(embeddings, images, [0, 1, 1, 3], [1, 2], k=3)
    assert first.predictions == twin.predictions
    assert [(found.text[8], found.right) for found in first.predictions] == [
        ("2", True),
        ("3", False),
        ("1", True),
    ]
    assert (first.rank, twin.rank, first.own, twin.own) == (1, 1, images[1].captions, images[2].captions)
