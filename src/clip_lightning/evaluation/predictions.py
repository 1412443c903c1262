"""What the model finds for a few held-out sentences and pictures, as plain records."""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.retrieval import TIE, Embeddings, retrieval_ranks


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


@dataclass(frozen=True)
class FoundCaption:
    """A sentence that the model offers for a picture; `similarity` is the cosine (-1 to 1)."""

    text: str
    similarity: float
    right: bool


@dataclass(frozen=True)
class PictureRow:
    """A picture, the sentences written for it, and the sentences the model finds.

    Attributes:
        image_id: position of the picture in the split.
        path: of the picture.
        own: the sentences written for it.
        rank: of the best of its own sentences, from 1, ties against the model.
        candidates: how many sentences were ranked.
        predictions: the best sentences, best first.
    """

    image_id: int
    path: Path
    own: tuple[str, ...]
    rank: int
    candidates: int
    predictions: tuple[FoundCaption, ...]

    @property
    def hit(self) -> bool:
        """Whether one of its own sentences is among the predictions."""
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


def choose_pictures(images: Sequence[CaptionedImage], count: int, seed: int) -> list[int]:
    """The pictures that the sentences of `choose_queries` were written for, as positions in the split."""
    offsets = _offsets(images)
    return [_owner(offsets, text_id) for text_id in choose_queries(images, count, seed)]


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
    offsets = _offsets(images)
    _check(embeddings, offsets, k)
    candidates = different_pictures(embeddings, content)
    text_row = {text_id: row for row, text_id in enumerate(embeddings.text_id.tolist())}
    queries = []  # (caption row, its picture)
    for text_id in text_ids:
        if not 0 <= text_id < offsets[-1]:
            raise ValueError(f"caption row {text_id} is outside the split's {offsets[-1]} captions")
        owner = _owner(offsets, text_id)
        if text_id in text_row and content[owner] in candidates:
            queries.append((text_id, owner))
    if not queries:
        return []

    picture = embeddings.image[list(candidates.values())].cpu().double()
    text = embeddings.text[[text_row[text_id] for text_id, _ in queries]].cpu().double()
    groups = torch.tensor(list(candidates))
    wanted = torch.tensor([content[owner] for _, owner in queries])
    ranks, _ = retrieval_ranks(picture, text, wanted, image_id=groups)
    shown = embeddings.image_id[list(candidates.values())].tolist()
    return [
        PredictionRow(
            text_id=text_id,
            text=images[owner].captions[text_id - offsets[owner]],
            true_path=images[owner].path,
            rank=rank,
            candidates=len(candidates),
            predictions=tuple(
                Prediction(images[owner if right else image_id].path, similarity, right)
                for image_id, similarity, right in _best(scores, groups == content[owner], shown, k)
            ),
        )
        for (text_id, owner), rank, scores in zip(queries, ranks.tolist(), text @ picture.T, strict=True)
    ]


def picture_rows(
    embeddings: Embeddings,
    images: Sequence[CaptionedImage],
    content: Sequence[int],
    image_ids: Sequence[int],
    k: int,
) -> list[PictureRow]:
    """The k best captions for each chosen picture, and the rank of the best of its own.

    A picture's own captions are also those of its byte-identical twins.

    Args:
        embeddings: of the split, in any order, pictures and captions possibly missing.
        images: the records of the whole split; `images[image_id]` is the picture of that id.
        content: for each picture of the split, the group of byte-identical pictures it is in.
        image_ids: pictures; those that were not embedded, and those none of whose captions was, are left out.
        k: captions a picture.

    Raises:
        ValueError: `k` below 1, or embeddings that name another picture for a caption than the records do.
    """
    offsets = _offsets(images)
    _check(embeddings, offsets, k)
    caption_group = torch.as_tensor(content)[embeddings.text_image_id.cpu()]
    captioned = set(caption_group.tolist())
    image_row = {image_id: row for row, image_id in enumerate(embeddings.image_id.tolist())}
    chosen = [each for each in image_ids if each in image_row and content[each] in captioned]
    if not chosen:
        return []

    groups = {content[image_id]: image_row[image_id] for image_id in chosen}  # twins are embedded alike
    picture, text = embeddings.image[list(groups.values())].cpu().double(), embeddings.text.cpu().double()
    _, ranks = retrieval_ranks(picture, text, caption_group, image_id=torch.tensor(list(groups)))
    of_group = dict(zip(groups, zip(ranks.tolist(), picture @ text.T, strict=True), strict=True))
    text_ids = embeddings.text_id.tolist()
    rows = []
    for image_id in chosen:
        rank, scores = of_group[content[image_id]]
        found = []
        for text_id, similarity, right in _best(scores, caption_group == content[image_id], text_ids, k):
            owner = _owner(offsets, text_id)
            found.append(FoundCaption(images[owner].captions[text_id - offsets[owner]], similarity, right))
        image = images[image_id]
        rows.append(PictureRow(image_id, image.path, image.captions, rank, len(text_ids), tuple(found)))
    return rows


def different_pictures(embeddings: Embeddings, content: Sequence[int]) -> dict[int, int]:
    """Group of byte-identical pictures → row of the first picture of it that was embedded."""
    first: dict[int, int] = {}
    for image_id, row in sorted(zip(embeddings.image_id.tolist(), range(len(embeddings.image)), strict=True)):
        first.setdefault(content[image_id], row)
    return first


def _offsets(images: Sequence[CaptionedImage]) -> list[int]:
    """For each picture the row of its first caption among all captions; at the end, their number."""
    return list(accumulate((len(image.captions) for image in images), initial=0))


def _owner(offsets: Sequence[int], text_id: int) -> int:
    """The picture that a caption row belongs to."""
    return bisect_right(offsets, text_id) - 1


def _check(embeddings: Embeddings, offsets: Sequence[int], k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    owners = torch.bucketize(embeddings.text_id, torch.tensor(offsets), right=True) - 1
    for row in (owners != embeddings.text_image_id).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"caption row {embeddings.text_id[row]} is of picture {owners[row]}, but the embeddings say "
            f"{embeddings.text_image_id[row]}"
        )


def _best(scores: Tensor, right: Tensor, ids: Sequence[int], k: int) -> list[tuple[int, float, bool]]:
    """(id, score, right) of the k best candidates; in a tie the wrong one first, as in the rank."""
    bar = scores.topk(min(k, len(scores))).values[-1] - TIE
    near = (scores >= bar).nonzero().flatten().tolist()
    return heapq.nsmallest(
        k,
        ((ids[row], float(scores[row]), bool(right[row])) for row in near),
        key=lambda hit: (-round(hit[1], 9), hit[2], hit[0]),
    )
