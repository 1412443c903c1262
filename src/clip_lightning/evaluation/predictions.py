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
    """A caption with the images that were retrieved for it, or an image (its file) with captions."""

    id: int  # position of the caption among all captions of the split, or of the image in the split
    item: Path | str
    wanted: tuple[Path | str, ...]  # the right answers
    rank: int  # of the best right answer, from 1; ties count against the model
    candidates: int  # number of distinct images, or of captions, that were ranked
    answers: tuple[Answer, ...]  # the best matches, the best first

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
    """
    captions = _checked_captions(embeddings, images)
    candidates = different_images(embeddings, content)
    rows, groups = list(candidates.values()), torch.tensor(list(candidates))
    paths = [images[image_id].path for image_id in embeddings.image_id[rows].tolist()]
    vectors, queries = embeddings.image[rows].double(), []
    for text_id in text_ids:
        owner, text = captions[text_id]
        is_right, row = groups == content[owner], embeddings.text_id == text_id
        if row.any() and is_right.any():
            found = _best(vectors, paths, embeddings.text[row][0], is_right, k)
            queries.append(Query(text_id, text, (images[owner].path,), *found))
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
    vectors, queries = embeddings.text.double(), []
    for image_id in image_ids:
        image, is_right, row = images[image_id], groups == content[image_id], embeddings.image_id == image_id
        if row.any() and is_right.any():
            found = _best(vectors, texts, embeddings.image[row][0], is_right, k)
            queries.append(Query(image_id, image.path, image.captions, *found))
    return queries


def different_images(embeddings: Embeddings, content: Sequence[int]) -> dict[int, int]:
    """Map each group of byte-identical images to the row of its first image that was embedded."""
    first: dict[int, int] = {}
    for row, image_id in enumerate(embeddings.image_id.tolist()):
        first.setdefault(content[image_id], row)
    return first


def _checked_captions(embeddings: Embeddings, images: Sequence[CaptionedImage]) -> list[tuple[int, str]]:
    captions = captions_of(images)
    owners = [captions[text_id][0] for text_id in embeddings.text_id.tolist()]
    if owners != embeddings.text_image_id.tolist():
        raise ValueError("the embeddings assign a caption to another image than the records do")
    return captions


def _best(
    vectors: Tensor, items: Sequence[Path | str], query: Tensor, is_right: Tensor, k: int
) -> tuple[int, int, tuple[Answer, ...]]:
    """Return the rank of the best right item, the number of items, and the k best; in ties, wrong first."""
    scores = vectors @ query.double()
    rank = 1 + int((scores[~is_right] >= scores[is_right].max() - TIE).sum())
    order = np.lexsort((is_right.numpy(), -scores.numpy().round(9)))[:k].tolist()
    answers = [Answer(items[row], scores[row].item(), bool(is_right[row])) for row in order]
    return rank, len(items), tuple(answers)
