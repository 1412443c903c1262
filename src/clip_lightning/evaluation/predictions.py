"""Records the best matches of a few held-out captions and images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.retrieval import TIE, Embeddings


@dataclass(frozen=True)
class Answer:
    """A retrieved image (its file) or caption, with its cosine similarity to the query."""

    item: Path | str
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A caption with the images that were retrieved for it, or an image (its file) with captions.

    Attributes:
        id: position of the caption among all captions of the split, or of the image in the split.
        wanted: the right answers.
        rank: rank of the best right answer, from 1; ties count against the model.
        candidates: number of distinct images, or of captions, that were ranked.
        answers: the best matches, the best first.
    """

    id: int
    item: Path | str
    wanted: tuple[Path | str, ...]
    rank: int
    candidates: int
    answers: tuple[Answer, ...]

    @property
    def hit(self) -> bool:
        """Whether the answers include a right one."""
        return self.rank <= len(self.answers)


def choose_captions(images: Sequence[CaptionedImage], count: int, seed: int) -> list[int]:
    """Choose one caption of each of at most `count` images spread over the split, and return their ids.

    The choice depends only on the arguments, so that it is the same in every epoch and after a resume.
    """
    rng = random.Random(seed)
    first_ids = list(accumulate((len(image.captions) for image in images), initial=0))
    captioned = [index for index, image in enumerate(images) if image.captions]
    count = min(count, len(captioned))
    chosen = []
    for part in range(count):
        start, stop = len(captioned) * part // count, len(captioned) * (part + 1) // count
        index = captioned[rng.randrange(start, stop)]
        chosen.append(first_ids[index] + rng.randrange(len(images[index].captions)))
    return chosen


def captions_of(images: Sequence[CaptionedImage]) -> list[tuple[int, str]]:
    """Return all captions of a split, by their ids, with the positions of their images."""
    return [(index, caption) for index, image in enumerate(images) for caption in image.captions]


def find_images(
    embeddings: Embeddings,
    images: Sequence[CaptionedImage],
    content: Sequence[int],
    text_ids: Sequence[int],
    k: int,
) -> list[Query]:
    """Find the k best different images for each chosen caption.

    Byte-identical images, which `content` assigns to the same group, count as one, in the list and in the
    rank. `images` are the records of the complete split. Captions that were not embedded, or whose images
    were not, are left out.

    Raises:
        ValueError: the embeddings assign a caption to another image than the records do.
    """
    captions = _checked_captions(embeddings, images)
    candidates = different_images(embeddings, content)
    rows, groups = list(candidates.values()), torch.tensor(list(candidates))
    vectors, ids = embeddings.image[rows].double(), embeddings.image_id[rows].tolist()
    text_rows = {text_id: row for row, text_id in enumerate(embeddings.text_id.tolist())}
    queries = []
    for text_id in text_ids:
        owner, text = captions[text_id]
        if text_id not in text_rows or content[owner] not in candidates:
            continue
        own = images[owner].path
        rank, best = _best(vectors, embeddings.text[text_rows[text_id]], groups == content[owner], k)
        found = ((own if right else images[ids[row]].path, score, right) for row, score, right in best)
        answers = tuple(Answer(*answer) for answer in found)
        queries.append(Query(text_id, text, (own,), rank, len(rows), answers))
    return queries


def find_captions(
    embeddings: Embeddings,
    images: Sequence[CaptionedImage],
    content: Sequence[int],
    image_ids: Sequence[int],
    k: int,
) -> list[Query]:
    """Find the k best captions for each chosen image; captions of byte-identical copies are right, too.

    Everything else is as in `find_images`.
    """
    captions = _checked_captions(embeddings, images)
    groups = torch.as_tensor(content)[embeddings.text_image_id]
    vectors, ids = embeddings.text.double(), embeddings.text_id.tolist()
    image_rows = {image_id: row for row, image_id in enumerate(embeddings.image_id.tolist())}
    queries = []
    for image_id in image_ids:
        is_right = groups == content[image_id]
        if image_id not in image_rows or not is_right.any():
            continue
        image = images[image_id]
        rank, best = _best(vectors, embeddings.image[image_rows[image_id]], is_right, k)
        answers = (Answer(captions[ids[row]][1], score, right) for row, score, right in best)
        queries.append(Query(image_id, image.path, image.captions, rank, len(ids), tuple(answers)))
    return queries


def different_images(embeddings: Embeddings, content: Sequence[int]) -> dict[int, int]:
    """Map each group of byte-identical images to the row of its first image that was embedded."""
    first: dict[int, int] = {}
    for row, image_id in enumerate(embeddings.image_id.tolist()):
        first.setdefault(content[image_id], row)
    return first


def _checked_captions(embeddings: Embeddings, images: Sequence[CaptionedImage]) -> list[tuple[int, str]]:
    captions = captions_of(images)
    for text_id, image_id in zip(embeddings.text_id.tolist(), embeddings.text_image_id.tolist(), strict=True):
        if captions[text_id][0] != image_id:
            raise ValueError(
                f"caption {text_id} belongs to image {captions[text_id][0]}, but the embeddings assign it to "
                f"image {image_id}"
            )
    return captions


def _best(
    vectors: Tensor, query: Tensor, is_right: Tensor, k: int
) -> tuple[int, list[tuple[int, float, bool]]]:
    """Return the rank and (row, score, right) of the k best vectors; wrong ones come first in a tie."""
    scores = vectors @ query.double()
    rank = 1 + int((scores[~is_right] >= scores[is_right].max() - TIE).sum())
    order = np.lexsort((is_right.numpy(), -scores.numpy().round(9)))[:k].tolist()
    return rank, [(row, scores[row].item(), bool(is_right[row])) for row in order]
