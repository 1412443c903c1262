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
    paths = [images[image_id].path for image_id in embeddings.image_id[rows].tolist()]
    vectors, text_rows = embeddings.image[rows].double(), _rows(embeddings.text_id)
    queries = []
    for text_id in text_ids:
        owner, text = captions[text_id]
        if text_id in text_rows and content[owner] in candidates:
            query = embeddings.text[text_rows[text_id]]
            rank, answers = _best(vectors, paths, query, groups == content[owner], k)
            queries.append(Query(text_id, text, (images[owner].path,), rank, len(rows), answers))
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
    texts = [captions[text_id][1] for text_id in embeddings.text_id.tolist()]
    groups = torch.as_tensor(content)[embeddings.text_image_id]
    vectors, image_rows = embeddings.text.double(), _rows(embeddings.image_id)
    queries = []
    for image_id in image_ids:
        is_right = groups == content[image_id]
        if image_id in image_rows and is_right.any():
            image, query = images[image_id], embeddings.image[image_rows[image_id]]
            rank, answers = _best(vectors, texts, query, is_right, k)
            queries.append(Query(image_id, image.path, image.captions, rank, len(texts), answers))
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


def _rows(ids: Tensor) -> dict[int, int]:
    return {number: row for row, number in enumerate(ids.tolist())}


def _best(
    vectors: Tensor, items: Sequence[Path | str], query: Tensor, is_right: Tensor, k: int
) -> tuple[int, tuple[Answer, ...]]:
    """Return the rank of the best right item, and the k best items; wrong ones come first in a tie."""
    scores = vectors @ query.double()
    rank = 1 + int((scores[~is_right] >= scores[is_right].max() - TIE).sum())
    order = np.lexsort((is_right.numpy(), -scores.numpy().round(9)))[:k].tolist()
    return rank, tuple(Answer(items[row], scores[row].item(), bool(is_right[row])) for row in order)
