"""What the model finds for a few held-out captions and images, as plain records."""

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
    """An image (its file) or a caption that the model finds; `similarity` is the cosine (-1 to 1)."""

    item: Path | str
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A caption and the images that the model finds for it, or an image and the captions.

    Attributes:
        id: row of the caption among all captions of the split, or position of the image in the split.
        item: the caption, or the file of the image.
        wanted: the file of the caption's image, or the captions of the image.
        rank: of the best right answer, from 1, ties against the model.
        candidates: how many different images, or captions, were ranked.
        answers: the best ones, best first.
    """

    id: int
    item: Path | str
    wanted: tuple[Path | str, ...]
    rank: int
    candidates: int
    answers: tuple[Answer, ...]

    @property
    def hit(self) -> bool:
        """Whether a right answer is among the answers."""
        return self.rank <= len(self.answers)


def choose_captions(images: Sequence[CaptionedImage], count: int, seed: int) -> list[int]:
    """Choose the caption rows of at most `count` images spread over the split, one per image.

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
        embeddings: of the split, in any order; images and captions may be missing.
        images: the records of the whole split; `images[image_id]` is the image of that id.
        content: for each image of the split, the group of byte-identical images it is in.
        text_ids: caption rows; one that was not embedded, or whose image was not, is left out.
        k: images per caption.

    Raises:
        ValueError: `k` below 1, a caption row out of range, or embeddings that are not finite or name another
            image for a caption than the records do.
    """
    offsets = _checked_offsets(embeddings, images, k)
    candidates = different_images(embeddings, content)
    rows, groups = list(candidates.values()), torch.tensor(list(candidates))
    vectors, ids = embeddings.image[rows].cpu().double(), embeddings.image_id[rows].tolist()
    text_row = {text_id: row for row, text_id in enumerate(embeddings.text_id.tolist())}
    queries = []
    for text_id in text_ids:
        if not 0 <= text_id < offsets[-1]:
            raise ValueError(f"caption row {text_id} is outside the split's {offsets[-1]} captions")
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
    """Find the k best captions for each chosen image, where those of its byte-identical twins are right too.

    Arguments and errors as in `find_images`, with positions of images in place of caption rows; an image that
    was not embedded, or none of whose captions was, is left out.
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
    """For each image the row of its first caption among all captions; at the end, their number."""
    return list(accumulate((len(image.captions) for image in images), initial=0))


def _checked_offsets(embeddings: Embeddings, images: Sequence[CaptionedImage], k: int) -> list[int]:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    if not (embeddings.image.isfinite().all() and embeddings.text.isfinite().all()):
        raise ValueError("the embeddings hold NaN or infinity")
    offsets = _offsets(images)
    owners = torch.bucketize(embeddings.text_id, torch.tensor(offsets), right=True) - 1
    for row in (owners != embeddings.text_image_id).nonzero().flatten().tolist()[:1]:
        raise ValueError(
            f"caption row {embeddings.text_id[row]} is of image {owners[row]}, but the embeddings say "
            f"{embeddings.text_image_id[row]}"
        )
    return offsets


def _best(
    scores: Tensor, right: Tensor, ids: Sequence[int], k: int
) -> tuple[int, list[tuple[int, float, bool]]]:
    """The rank, and (id, score, right) of the k best candidates; in a tie the wrong one is first in both."""
    rank = 1 + int((scores[~right] >= scores[right].max() - TIE).sum())
    bar = scores.topk(min(k, len(scores))).values[-1] - TIE
    near = (scores >= bar).nonzero().flatten().tolist()
    best = heapq.nsmallest(
        k,
        ((ids[row], float(scores[row]), bool(right[row])) for row in near),
        key=lambda hit: (-round(hit[1], 9), hit[2], hit[0]),
    )
    return rank, best
