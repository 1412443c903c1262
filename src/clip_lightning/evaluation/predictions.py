"""What a model finds in a complete split: answers to fixed queries, similarities, the worst misses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clip_lightning.data.captions import CaptionedImage
from clip_lightning.evaluation.retrieval import TIE, Embeddings, distinct, retrieval_ranks, rows_of

MOST_IMAGES, MOST_TEXTS = 1000, 5000  # sampled for the unmatched pairs
EDGES = np.linspace(-1, 1, 201)  # of the bins of cosines


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
    ends = accumulate((len(image.captions) for image in images), initial=0)
    captioned = [range(*ids) for ids in pairwise(ends) if ids[0] < ids[1]]  # ids of the captions of an image
    count = min(count, len(captioned))
    borders = [len(captioned) * part // max(count, 1) for part in range(count + 1)]
    return [rng.choice(rng.choice(captioned[start:stop])) for start, stop in pairwise(borders)]


def captions_of(images: Sequence[CaptionedImage]) -> list[tuple[int, str]]:
    """Return all captions of a split, by their ids, with the positions of their images."""
    return [(index, caption) for index, image in enumerate(images) for caption in image.captions]


def merge_identical(
    embeddings: Embeddings, images: Sequence[CaptionedImage], content: Sequence[int]
) -> Embeddings:
    """Replace byte-identical images by one image, which has the captions of all of them.

    `images` are the records of the complete split, and `content` has the position of the first image with
    the same bytes for each of them.
    """
    captions, first = captions_of(images), torch.as_tensor(content, dtype=torch.long)
    if [captions[text_id][0] for text_id in embeddings.text_id.tolist()] != embeddings.text_image_id.tolist():
        raise ValueError("the embeddings assign a caption to another image than the records do")
    image_id, rows = distinct(first[embeddings.image_id])
    owner = first[embeddings.text_image_id]
    return replace(embeddings, image=embeddings.image[rows], image_id=image_id, text_image_id=owner)


def find_images(
    embeddings: Embeddings, images: Sequence[CaptionedImage], text_ids: Sequence[int], k: int
) -> list[Query]:
    """Find the k best images for each chosen caption, with embeddings of `merge_identical`.

    Captions that were not embedded, or whose images were not, are left out.
    """
    captions, vectors, queries = captions_of(images), embeddings.image.double(), []
    paths = [images[image_id].path for image_id in embeddings.image_id.tolist()]
    for text_id in text_ids:
        owner, text = captions[text_id]
        row = embeddings.text_id == text_id
        is_right = torch.isin(embeddings.image_id, embeddings.text_image_id[row])
        if is_right.any():
            found = _best(vectors, paths, embeddings.text[row][0], is_right, k)
            queries.append(Query(text_id, text, (images[owner].path,), *found))
    return queries


def find_captions(
    embeddings: Embeddings, images: Sequence[CaptionedImage], image_ids: Sequence[int], k: int
) -> list[Query]:
    """Find the k best captions for each chosen image; otherwise like `find_images`."""
    captions, vectors, queries = captions_of(images), embeddings.text.double(), []
    texts = [captions[text_id][1] for text_id in embeddings.text_id.tolist()]
    for image_id in image_ids:
        row = embeddings.image_id == image_id
        is_right = torch.isin(embeddings.text_image_id, embeddings.image_id[row])
        if is_right.any():
            wanted = tuple(text for text, right in zip(texts, is_right.tolist(), strict=True) if right)
            found = _best(vectors, texts, embeddings.image[row][0], is_right, k)
            queries.append(Query(image_id, images[image_id].path, wanted, *found))
    return queries


def _best(
    vectors: Tensor, items: Sequence[Path | str], query: Tensor, is_right: Tensor, k: int
) -> tuple[int, int, tuple[Answer, ...]]:
    """Return the rank of the best right item, the number of items, and the k best; in ties, wrong first."""
    scores = vectors @ query.double()
    rank = 1 + int((scores[~is_right] >= scores[is_right].max() - TIE).sum())
    order = np.lexsort((is_right.numpy(), -scores.numpy().round(9)))[:k].tolist()
    answers = [Answer(items[row], scores[row].item(), bool(is_right[row])) for row in order]
    return rank, len(items), tuple(answers)


def worst_queries(embeddings: Embeddings, count: int) -> list[int]:
    """Return the ids of the captions whose images rank worst in the complete split, the worst first.

    At most `count` captions are returned, at most one per image, and none whose image has rank 1.
    """
    ranks, _ = retrieval_ranks(
        embeddings.image, embeddings.text, embeddings.text_image_id, image_id=embeddings.image_id
    )
    worst: dict[int, int] = {}  # image → id of the caption
    for row in ranks.argsort(descending=True, stable=True).tolist():
        if ranks[row] > 1:
            worst.setdefault(int(embeddings.text_image_id[row]), int(embeddings.text_id[row]))
    return list(worst.values())[:count]


def similarities(embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """Return the cosines of all captions with their images, and of a sample of unmatched pairs.

    The sample combines at most `MOST_IMAGES` images with at most `MOST_TEXTS` captions, evenly spaced, so
    that time and memory are bounded and every epoch has the same pairs.
    """
    image, text = embeddings.image, embeddings.text
    owner = rows_of(embeddings.text_image_id, embeddings.image_id)
    known = owner >= 0
    matched = (image[owner[known]] * text[known]).sum(1)
    images, texts = spaced(len(image), MOST_IMAGES), spaced(len(text), MOST_TEXTS)
    different = embeddings.image_id[images, None] != embeddings.text_image_id[texts]
    return matched, (image[images] @ text[texts].T)[different]


def histogram(cosines: Tensor) -> Tensor:
    """Count cosines in the bins between `EDGES`."""
    # rounding may put a cosine slightly outside -1 to 1
    return torch.histc(cosines.clamp(-1, 1), len(EDGES) - 1, -1, 1).double()


def separation(matched: Tensor, unmatched: Tensor) -> float:
    """Return the percentage of comparisons in which a matched pair is more similar than an unmatched pair.

    This is the area under the ROC curve: 50 is chance, 100 is perfect. Pairs in the same bin count half.
    """
    own, others = histogram(matched), histogram(unmatched)
    below = others.cumsum(0) - others / 2
    return (100 * (own * below).sum() / (own.sum() * others.sum())).item()


def recall_curve(ranks: Tensor, most: int) -> Tensor:
    """Return R@1 ... R@most in percent (most,) of ranks from 1; ranks of 0 are not counted."""
    queries = ranks[ranks > 0]
    hits = torch.bincount(queries, minlength=most + 1)[1 : most + 1].cumsum(0)
    return 100 * hits.double() / len(queries)


def spaced(length: int, most: int) -> Tensor:
    """Return at most `most` evenly spaced integers below `length`, including the first and the last one."""
    return torch.linspace(0, length - 1, min(length, most), dtype=torch.float64).round().long()
