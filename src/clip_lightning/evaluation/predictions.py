"""Records the best matches of a few held-out captions and images."""

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
from clip_lightning.evaluation.retrieval import TIE, Embeddings


@dataclass(frozen=True)
class Answer:
    """A retrieved image (its file) or caption, with its cosine similarity to the query."""

    item: Path | str
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A caption with the images that were retrieved for it, or an image with its retrieved captions.

    Attributes:
        id: position of the caption among all captions of the split, or of the image in the split.
        item: the caption, or the file of the image.
        wanted: the right answers: the file of the caption's image, or the captions of the image.
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
    """Choose one caption of each of at most `count` images spread over the split, and return their rows.

    The choice depends only on the arguments, so that it is the same in every epoch and after a resume.
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


def images_of(images: Sequence[CaptionedImage], text_ids: Sequence[int]) -> list[int]:
    """Return the position in the split of each caption row's image."""
    offsets = _offsets(images)
    return [bisect_right(offsets, text_id) - 1 for text_id in text_ids]


def find_images(
    embeddings: Embeddings,
    images: Sequence[CaptionedImage],
    content: Sequence[int],
    text_ids: Sequence[int],
    k: int,
) -> list[Query]:
    """Find the k best different images for each chosen caption.

    Byte-identical images count as one, in the list and in the rank.

    Args:
        embeddings: embeddings of the split, in any order; images and captions may be missing.
        images: records of the complete split; `images[image_id]` is the image with that id.
        content: group of byte-identical images that each image of the split belongs to.
        text_ids: rows of captions; captions that were not embedded, or whose images were not, are left out.
        k: number of images per caption.

    Raises:
        ValueError: `k` is below 1, a caption row is out of range, or the embeddings are not finite or assign
            a caption to another image than the records do.
    """
    offsets = _checked_offsets(embeddings, images, k)
    candidates = different_images(embeddings, content)
    rows, groups = list(candidates.values()), torch.tensor(list(candidates))
    vectors, ids = embeddings.image[rows].cpu().double(), embeddings.image_id[rows].tolist()
    text_row = {text_id: row for row, text_id in enumerate(embeddings.text_id.tolist())}
    queries = []
    for text_id in text_ids:
        if not 0 <= text_id < offsets[-1]:
            raise ValueError(f"caption row {text_id} is out of range; expected a row below {offsets[-1]}")
        owner = bisect_right(offsets, text_id) - 1
        if text_id not in text_row or content[owner] not in candidates:
            continue
        right = groups == content[owner]
        rank, best = _best(vectors @ embeddings.text[text_row[text_id]].cpu().double(), right, ids, k)
        image = images[owner]
        answers = tuple(
            Answer(image.path if right else images[image_id].path, similarity, right)
            for image_id, similarity, right in best
        )
        text = image.captions[text_id - offsets[owner]]
        queries.append(Query(text_id, text, (image.path,), rank, len(rows), answers))
    return queries


def find_captions(
    embeddings: Embeddings,
    images: Sequence[CaptionedImage],
    content: Sequence[int],
    image_ids: Sequence[int],
    k: int,
) -> list[Query]:
    """Find the k best captions for each chosen image; captions of byte-identical copies are right, too.

    Arguments and errors are those of `find_images`, with positions of images instead of caption rows. Images
    that were not embedded, or whose captions were not, are left out.
    """
    offsets = _checked_offsets(embeddings, images, k)
    groups = torch.as_tensor(content)[embeddings.text_image_id.cpu()]
    vectors, ids = embeddings.text.cpu().double(), embeddings.text_id.tolist()
    image_row = {image_id: row for row, image_id in enumerate(embeddings.image_id.tolist())}
    queries = []
    for image_id in image_ids:
        right = groups == content[image_id]
        if image_id not in image_row or not right.any():
            continue
        rank, best = _best(vectors @ embeddings.image[image_row[image_id]].cpu().double(), right, ids, k)
        answers = []
        for text_id, similarity, is_right in best:
            owner = bisect_right(offsets, text_id) - 1
            answers.append(Answer(images[owner].captions[text_id - offsets[owner]], similarity, is_right))
        image = images[image_id]
        queries.append(Query(image_id, image.path, image.captions, rank, len(ids), tuple(answers)))
    return queries


def different_images(embeddings: Embeddings, content: Sequence[int]) -> dict[int, int]:
    """Map each group of byte-identical images to the row of its first image that was embedded."""
    first: dict[int, int] = {}
    for image_id, row in sorted(zip(embeddings.image_id.tolist(), range(len(embeddings.image)), strict=True)):
        first.setdefault(content[image_id], row)
    return first


def _offsets(images: Sequence[CaptionedImage]) -> list[int]:
    """Return the row of the first caption of each image, followed by the number of captions."""
    return list(accumulate((len(image.captions) for image in images), initial=0))


def _checked_offsets(embeddings: Embeddings, images: Sequence[CaptionedImage], k: int) -> list[int]:
    if k < 1:
        raise ValueError(f"expected k of 1 or more, got {k}")
    if not (embeddings.image.isfinite().all() and embeddings.text.isfinite().all()):
        raise ValueError("the embeddings contain NaN or infinity")
    offsets = _offsets(images)
    owners = torch.bucketize(embeddings.text_id, torch.tensor(offsets), right=True) - 1
    for row in (owners != embeddings.text_image_id).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"caption row {embeddings.text_id[row]} belongs to image {owners[row]}, but the embeddings "
            f"assign it to image {embeddings.text_image_id[row]}"
        )
    return offsets


def _best(
    scores: Tensor, right: Tensor, ids: Sequence[int], k: int
) -> tuple[int, list[tuple[int, float, bool]]]:
    """Return the rank and (id, score, right) of the k best candidates; wrong ones come first in a tie."""
    rank = 1 + int((scores[~right] >= scores[right].max() - TIE).sum())
    threshold = scores.topk(min(k, len(scores))).values[-1] - TIE
    rows = (scores >= threshold).nonzero().flatten().tolist()
    best = heapq.nsmallest(
        k,
        ((ids[row], float(scores[row]), bool(right[row])) for row in rows),
        key=lambda hit: (-round(hit[1], 9), hit[2], hit[0]),
    )
    return rank, best
