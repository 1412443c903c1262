"""Which pictures the model finds for a few held-out sentences, as plain records."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.retrieval import Embeddings, retrieval_ranks


@dataclass(frozen=True)
class Prediction:
    """A picture that the model offers for a sentence; `similarity` is the cosine (-1 to 1)."""

    path: Path
    similarity: float
    right: bool


@dataclass(frozen=True)
class PredictionRow:
    """A sentence, the picture it was written for, and the pictures the model finds.

    Attributes:
        text_id: row of the sentence among all captions of the split.
        text: the sentence.
        true_path: the picture it belongs to.
        rank: of the right picture, from 1, ties against the model.
        candidates: how many different pictures were ranked.
        predictions: the best different pictures, best first.
    """

    text_id: int
    text: str
    true_path: Path
    rank: int
    candidates: int
    predictions: tuple[Prediction, ...]

    @property
    def hit(self) -> bool:
        """Whether the right picture is among the predictions."""
        return self.rank <= len(self.predictions)


def choose_queries(images: Sequence[CaptionedImage], count: int, seed: int) -> list[int]:
    """Caption rows of at most `count` pictures spread over the split, one a picture.

    The choice depends on nothing but the arguments, so it is the same in every epoch and after a resume.
    """
    rng = random.Random(seed)
    offsets = _offsets(images)
    captioned = [index for index, image in enumerate(images) if image.captions]
    count = min(count, len(captioned))
    chosen = []
    for part in range(count):
        start, stop = len(captioned) * part // count, len(captioned) * (part + 1) // count
        index = captioned[rng.randrange(start, stop)]
        chosen.append(offsets[index] + rng.randrange(len(images[index].captions)))
    return chosen


def prediction_rows(
    embeddings: Embeddings,
    images: Sequence[CaptionedImage],
    content: Sequence[int],
    text_ids: Sequence[int],
    k: int,
) -> list[PredictionRow]:
    """The k best different pictures for each chosen caption, and the rank of the right one.

    Byte-identical pictures count as one, in the list and in the rank.

    Args:
        embeddings: of the split, in any order, pictures and captions possibly missing.
        images: the records of the whole split; `images[image_id]` is the picture of that id.
        content: for each picture of the split, the group of byte-identical pictures it is in.
        text_ids: caption rows; those that were not embedded, or whose picture was not, are left out.
        k: pictures a caption.

    Raises:
        ValueError: `k` below 1, a caption row out of range, or embeddings that name another picture for
            a caption than the records do.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    candidates = _different_pictures(embeddings, content)
    text_row = {text_id: row for row, text_id in enumerate(embeddings.text_id.tolist())}
    offsets = _offsets(images)
    queries = []  # (caption row, its picture)
    for text_id in text_ids:
        if not 0 <= text_id < offsets[-1]:
            raise ValueError(f"caption row {text_id} is outside the split's {offsets[-1]} captions")
        owner = bisect_right(offsets, text_id) - 1
        if text_id not in text_row or content[owner] not in candidates:
            continue
        if (said := int(embeddings.text_image_id[text_row[text_id]])) != owner:
            raise ValueError(f"caption row {text_id} is of picture {owner}, but the embeddings say {said}")
        queries.append((text_id, owner))
    if not queries:
        return []

    image_row = {image_id: row for row, image_id in enumerate(embeddings.image_id.tolist())}
    picture = embeddings.image[[image_row[image_id] for image_id in candidates.values()]].cpu().double()
    text = embeddings.text[[text_row[text_id] for text_id, _ in queries]].cpu().double()
    wanted = torch.tensor([content[owner] for _, owner in queries])
    ranks, _ = retrieval_ranks(picture, text, wanted, image_id=torch.tensor(list(candidates)))
    return [
        PredictionRow(
            text_id=text_id,
            text=images[owner].captions[text_id - offsets[owner]],
            true_path=images[owner].path,
            rank=rank,
            candidates=len(candidates),
            predictions=tuple(
                Prediction(images[owner if right else image_id].path, similarity, right)
                for similarity, right, image_id in _best(scores, candidates, content[owner], k)
            ),
        )
        for (text_id, owner), rank, scores in zip(
            queries, ranks.tolist(), (text @ picture.T).tolist(), strict=True
        )
    ]


def _offsets(images: Sequence[CaptionedImage]) -> list[int]:
    """For each picture the row of its first caption among all captions; at the end, their number."""
    return list(accumulate((len(image.captions) for image in images), initial=0))


def _different_pictures(embeddings: Embeddings, content: Sequence[int]) -> dict[int, int]:
    """Group of byte-identical pictures → the first picture of it that was embedded."""
    first: dict[int, int] = {}
    for image_id in sorted(embeddings.image_id.tolist()):
        first.setdefault(content[image_id], image_id)
    return first


def _best(
    scores: Sequence[float], candidates: dict[int, int], wanted: int, k: int
) -> list[tuple[float, bool, int]]:
    """(score, right, image id) of the k best candidates; in a tie the wrong one first, as in the rank."""
    found = zip(scores, candidates.items(), strict=True)
    return heapq.nsmallest(
        k,
        ((score, group == wanted, image_id) for score, (group, image_id) in found),
        key=lambda hit: (-round(hit[0], 9), hit[1], hit[2]),
    )
