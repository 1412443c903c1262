"""What the page answers: pictures for a sentence or a picture, probabilities for labels, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from clip_lightning.data.images import BrokenImage, decode_bytes
from clip_lightning.errors import UserError
from clip_lightning.evaluation.prompts import TEMPLATES
from clip_lightning.evaluation.zero_shot import probabilities, zero_shot_classifier
from clip_lightning.search.index import FoundPicture, ImageIndex

MOST_FOUND = 60
MOST_LABELS = 200
LONGEST = 10_000
# An upload of 20 MB may unfold to gigabytes.
MOST_PIXELS = 50_000_000
# Labels are judged as they are typed, and each time the image is sent again.
_MOST_KEPT = 4


@dataclass(frozen=True)
class Probabilities:
    """How well each label fits a picture.

    Attributes:
        reading: `softmax`, one of the labels is taken to be right, or `sigmoid`, each is judged by itself.
        by_label: label → probability from 0 to 1, the likeliest first.
    """

    reading: str
    by_label: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """The fields as plain JSON values."""
        return {"reading": self.reading, "probabilities": self.by_label}


class Answers:
    """Answers from an index and its model; may be asked from several threads.

    All methods raise UserError for what cannot be answered.
    """

    def __init__(self, index: ImageIndex) -> None:
        self.index = index
        self.clip = index.clip
        # Fast tokenizers refuse a second thread, and torch has all cores busy with one query anyway.
        self._lock = Lock()
        self._embed = lru_cache(_MOST_KEPT)(self._embedded)

    def search(self, sentence: str, k: int) -> list[FoundPicture]:
        """The k pictures most similar to a sentence, the best first."""
        sentence = _short(" ".join(sentence.split()), "the sentence")
        if not sentence:
            raise UserError("the sentence to search for is empty; give some words")
        with self._lock:
            return self.index.search([sentence], _checked(k))[0]

    def search_by_image(self, picture: bytes, k: int) -> list[FoundPicture]:
        """Return the k images most similar to the one in the content of a file, the best first."""
        with self._lock:
            return self.index.search(self._embed(picture), _checked(k))[0]

    def classify(self, picture: bytes, labels: str, templates: str) -> Probabilities:
        """Return how well labels, given with commas between, fit an image.

        Args:
            picture: the content of its file.
            labels: names; those of a file are not read, unlike `clip-lightning classify --labels`.
            templates: the name of a set, no file either.
        """
        names = _labels(labels)
        if templates not in TEMPLATES:
            raise UserError(f"templates {templates!r}: expected {', '.join(TEMPLATES)}")
        with self._lock:
            classes = zero_shot_classifier(self.clip, names, TEMPLATES[templates])
            similarity = self._embed(picture) @ classes.T
        bias = self.clip.bias
        shares = probabilities(similarity, self.clip.scale.item(), bias)[0].tolist()
        ordered = sorted(zip(names, shares, strict=True), key=lambda entry: -entry[1])
        return Probabilities("softmax" if bias is None else "sigmoid", dict(ordered))

    @torch.inference_mode()
    def _embedded(self, picture: bytes) -> Tensor:
        """Unit length, (1, D), on the CPU."""
        try:
            pixels = self.clip.transform(decode_bytes(picture, max_pixels=MOST_PIXELS))
        except BrokenImage as error:
            raise UserError(f"the picture cannot be read: {error}") from error
        return self.clip.encode_image(pixels[None].to(self.clip.logit_scale.device)).cpu()


def _labels(given: str) -> Sequence[str]:
    words = (" ".join(word.split()) for word in _short(given, "the list of labels").split(","))
    names = list(dict.fromkeys(filter(None, words)))
    if not names:
        raise UserError("there are no labels; give some, with commas between")
    if len(names) > MOST_LABELS:
        raise UserError(f"{len(names)} labels are more than {MOST_LABELS}; give fewer")
    return names


def _short(text: str, what: str) -> str:
    if len(text) > LONGEST:
        raise UserError(f"{what} has {len(text):,} characters; give at most {LONGEST:,}")
    return text


def _checked(k: int) -> int:
    if not 1 <= k <= MOST_FOUND:
        raise UserError(f"k is {k}; expected 1 to {MOST_FOUND}")
    return k
